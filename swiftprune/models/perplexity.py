"""Perplexity of a causal LM on a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swiftprune.errors import CheckpointError
from swiftprune.progress import ProgressCallback, no_progress


def _nothing(_: Tensor) -> None:
    pass


@torch.no_grad()
def perplexity(
    model: Any,
    windows: Tensor,
    *,
    stage: str = "evaluate",
    progress: ProgressCallback = no_progress,
    watch: Callable[[Tensor], None] = _nothing,
) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each of `windows` (W, T) int64.

    Windows do not see each other, as usual for these tables (GPTQ, SparseGPT, Wanda). `watch` is given the log
    probabilities (T - 1, V) fp32 of each window in turn.
    """
    total = 0.0
    for index, window in enumerate(windows):
        logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1].float()
        log_probabilities = logits.log_softmax(-1)
        total += float(F.nll_loss(log_probabilities, window[1:].to(model.device), reduction="sum"))
        watch(log_probabilities)
        progress(stage, index + 1, len(windows))
    return of_loss(total / (windows.shape[0] * (windows.shape[1] - 1)))


def of_loss(mean: float) -> float:
    """exp of the mean negative log-likelihood of a token, infinite where that does not fit."""
    return math.exp(mean) if mean < 700 else math.inf


def dense_perplexity(
    model: Any,
    windows: Tensor,
    *,
    stage: str = "evaluate",
    progress: ProgressCallback = no_progress,
    watch: Callable[[Tensor], None] = _nothing,
) -> float:
    """`perplexity` of the model before pruning, which others are compared with.

    Raises CheckpointError when it is not finite: then nothing can be said about the pruned model.
    """
    value = perplexity(model, windows, stage=stage, progress=progress, watch=watch)
    if not math.isfinite(value):
        raise CheckpointError(
            f"{model.name_or_path}: the dense model's own perplexity is {value}: its logits are not finite, or this is "
            "not its tokenizer"
        )
    return value
