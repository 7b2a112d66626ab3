"""Whether an engine's answers are those of the checkpoint: the oracle before any timing.

The oracle is the sparse checkpoint with every packed weight unpacked, run densely in fp32 by transformers. It reads the
engine's own answers, so a token that rounding has swapped does not make all later ones differ.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from runtime_bench.results import Check
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import unpack
from swiftprune.models.load import load_whole_model

TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.25}
"""In log probability: what the rounding of an engine that computes in this dtype may cost a token."""


def against_reference(folder: Path, prompts: list[list[int]], answers: list[list[int]], dtype: str) -> Check:
    """Checks greedy `answers` to `prompts`, all of one length, given by an engine that runs in `dtype`.

    Works in a process of its own, so that the fp32 model's memory is given back.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        gaps = pool.submit(_gaps, folder, prompts, answers).result()
    return Check(
        tokens=len(gaps),
        equal=sum(gap == 0 for gap in gaps),
        largest_gap=max(gaps, default=0.0),
        tolerance=TOLERANCE[dtype],
    )


@torch.inference_mode()
def _gaps(folder: Path, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """How far each answered token was below the likeliest one."""
    disable_progress_bar()
    model = load_whole_model(folder, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear24):
            model.set_submodule(name, _unpacked(module))
    gaps: list[float] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].float()
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gaps += (logits.max(dim=1).values - chosen).tolist()
    return gaps


def _unpacked(layer: Linear24) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(unpack(layer.packed), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear
