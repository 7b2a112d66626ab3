"""How fast a packed model writes in transformers, token by token, beside the same model with dense weights.

The dense twin holds the same pruned weights unpacked, so both write the same text but for rounding. What stays dense in
the packed model (lm_head, most often) is done alike on both sides, once by torch's F.linear and once by oneDNN with
weights it has laid out beforehand: each dense way of running a model is compared with its own packed counterpart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

import swiftprune.serve.transformers  # noqa: F401 - registers the packed format
from exporters import export
from runtime_bench import known_models
from runtime_bench.machine import Machine, this_machine
from runtime_bench.measure import Timing
from swiftprune.errors import SettingsError
from swiftprune.pruning.pipeline import PruneSettings
from swiftprune.pruning.progress import Progress, silent
from swiftprune.sparse24 import dispatch
from swiftprune.sparse24.format import unpack
from swiftprune.sparse24.linear import Linear24

PROMPT_TOKENS = 16
LOGITS_ERROR = 0.05
WAYS = ("torch", "onednn")


class Decode(BaseModel):
    """One way of running the dense layers, on both sides. Milliseconds are per token."""

    way: str
    dense_ms: float
    packed_ms: float
    dense_spread: float
    packed_spread: float
    dense_linears_ms: float
    """Of the dense model's token: the linears that the packed model holds packed, called one after the other."""
    packed_linears_ms: float
    logits_error: float
    """Relative Frobenius norm, packed against dense, over the prompt."""
    same_tokens: int
    """Greedy tokens that agree before the first that does not."""

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.packed_ms

    @property
    def amdahl_bound(self) -> float:
        """The speedup if the packed linears took no time at all."""
        return self.dense_ms / (self.dense_ms - self.dense_linears_ms)

    @property
    def byte_bound(self) -> float:
        """The speedup if the packed linears took 9/16 of the time of the dense ones: their bytes over dense bytes."""
        return self.dense_ms / (self.dense_ms - self.dense_linears_ms * 7 / 16)


class DecodeBench(BaseModel):
    machine: Machine
    model: str
    dtype: str
    backend: str
    threads: int
    new_tokens: int
    rounds: int
    packed_linears: int
    ways: list[Decode]


class _Prepacked(nn.Module):
    """A dense linear in oneDNN's own layout for one token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        reorder: Any = torch.ops.mkldnn._reorder_linear_weight
        self.weight = reorder(linear.weight.detach().contiguous(), 1)
        self.bias = linear.bias
        self.in_features = linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        product: Any = torch.ops.mkldnn._linear_pointwise
        y: Tensor = product(x, self.weight, self.bias, "none", [], "")
        return y


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def find(model: str, folder: Path, progress: Progress = silent) -> Path:
    """The packed checkpoint at the path `model`, or one made under `folder` when `model` is a name known here."""
    if Path(model).is_dir():
        return Path(model)
    source, out = known_models.fetch(model, folder, progress), folder / f"{model}-2of4-decode"
    if not out.exists():
        export(source, out, PruneSettings(calibration="none"), progress=progress)
    return out


def measure(
    folder: Path, *, threads: int = 2, new_tokens: int = 32, rounds: int = 5, progress: Progress = silent
) -> DecodeBench:
    """Greedy decoding in bf16, batch 1, dense and packed in turns.

    Raises SettingsError when the checkpoint is not packed or no fast backend runs here.
    """
    backend = dispatch.linear_backend(torch.bfloat16)
    if backend == dispatch.REFERENCE:
        raise SettingsError("no native kernels were built here: the reference backend is not worth measuring")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ways = [_way(way, folder, new_tokens, rounds, progress) for way in WAYS]
        packed_linears = sum(isinstance(module, Linear24) for module in _load(folder).modules())
    finally:
        torch.set_num_threads(before)
    return DecodeBench(
        machine=this_machine(), model=folder.name, dtype="bf16", backend=backend, threads=threads,
        new_tokens=new_tokens, rounds=rounds, packed_linears=packed_linears, ways=ways,
    )  # fmt: skip


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def _way(way: str, folder: Path, new_tokens: int, rounds: int, progress: Progress) -> Decode:
    packed, dense = _load(folder), _load(folder)
    names = [name for name, module in packed.named_modules() if isinstance(module, Linear24)]
    if not names:
        raise SettingsError(f"{folder} holds no packed linears; make it with swiftprune-export --format 2:4")
    for name in names:
        dense.set_submodule(name, _unpacked(dense.get_submodule(name)))
    if way == "onednn":
        for model in (packed, dense):
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear):
                    model.set_submodule(name, _Prepacked(module))

    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, packed.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
    want, got = dense(prompt).logits.float(), packed(prompt).logits.float()
    error = float((got - want).norm() / want.norm())
    if not error < LOGITS_ERROR:
        raise RuntimeError(f"packed logits are off by {error:.0%}: nothing was measured")

    sides = {"dense": dense, "packed": packed}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    tokens: dict[str, list[int]] = {}
    linears: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(-1, rounds):
        for side, model in sides.items():
            clock = _Clock()
            tokens[side] = model.generate(
                prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
                streamer=clock,
            )[0].tolist()  # fmt: skip
            alone = _linears_seconds([model.get_submodule(name) for name in names])
            if index >= 0:  # the first round warms up; the first times are the prompt's and the first token's
                steps = clock.times[1:]
                seconds[side].append((steps[-1] - steps[0]) / (len(steps) - 1))
                linears[side].append(alone)
        progress(f"decode, {way}", index + 1, rounds)
    times = {side: Timing(seconds=values) for side, values in seconds.items()}
    return Decode(
        way=way,
        dense_ms=1e3 * times["dense"].median, packed_ms=1e3 * times["packed"].median,
        dense_spread=times["dense"].spread, packed_spread=times["packed"].spread,
        dense_linears_ms=1e3 * statistics.median(linears["dense"]),
        packed_linears_ms=1e3 * statistics.median(linears["packed"]),
        logits_error=error, same_tokens=agreement(tokens["dense"], tokens["packed"]) - PROMPT_TOKENS,
    )  # fmt: skip


def _unpacked(layer: Linear24) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(unpack(layer.packed), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear


def _linears_seconds(linears: Sequence[Any]) -> float:
    """Of one call of each, one token."""
    widths = [module.in_features for module in linears]
    inputs = {width: torch.randn(1, 1, width).bfloat16() for width in widths}
    start = time.perf_counter()
    for module, width in zip(linears, widths, strict=True):
        module(inputs[width])
    return time.perf_counter() - start


def agreement(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items agree before the first that does not."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def markdown(bench: DecodeBench) -> str:
    lines = [
        f"{bench.model}, {bench.dtype}, {bench.threads} threads, {bench.packed_linears} linears packed, backend "
        f"{bench.backend}, {bench.new_tokens} tokens x {bench.rounds} turns, batch 1, greedy, transformers",
        "",
        "| dense layers by | dense tok/s | packed tok/s | speedup | by bytes | by Amdahl | linears, dense ms "
        "| packed ms | logits off by | same tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in bench.ways:
        lines.append(
            f"| {row.way} | {1e3 / row.dense_ms:.1f} ±{row.dense_spread:.0%} | {1e3 / row.packed_ms:.1f} "
            f"±{row.packed_spread:.0%} | {row.speedup:.2f}x | {row.byte_bound:.2f}x | {row.amdahl_bound:.2f}x "
            f"| {row.dense_linears_ms:.1f} of {row.dense_ms:.1f} | {row.packed_linears_ms:.1f} of {row.packed_ms:.1f} "
            f"| {row.logits_error:.1%} | {row.same_tokens} |"
        )
    return "\n".join(lines)
