"""Perplexity of a causal LM on a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from swiftprune.pruning.progress import Progress, silent


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, *, stage: str = "evaluate", progress: Progress = silent) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each of `windows` (W, T) int64.

    Windows do not see each other, as usual for these tables (GPTQ, SparseGPT, Wanda).
    """
    total = 0.0
    for index, window in enumerate(windows):
        logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:].to(model.device), reduction="sum"))
        progress(stage, index + 1, len(windows))
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
