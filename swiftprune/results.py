"""What pruning gives: weights of a block, and what it did to each linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from swiftprune.formats.spec import Packed24
from swiftprune.kernels import packing, reference
from swiftprune.methods.statistics import InputStats
from swiftprune.models.plan import Block, Linear

PrunedWeight = Packed24 | Tensor
"""A pruned weight: packed when the pattern is 2:4, else dense (N, K) with zeros."""


_W = TypeVar("_W", Tensor, Packed24 | Tensor)


def moved(weights: Mapping[str, _W], device: torch.device) -> dict[str, _W]:
    """`weights` on `device`."""
    return {name: weight.to(device) for name, weight in weights.items()}


class LayerResult(BaseModel):
    """What pruning did to one linear."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    """Share of weights that are zero."""
    kept_energy: float
    """Sum of squares after pruning over that before; above 1 when an update made weights larger."""
    output_error: float | None
    """||X W^T - X W'^T|| / ||X W^T|| on a sample of calibration tokens; None without calibration."""
    on_all_tokens: bool = False
    """Of an expert: whether it was calibrated on all tokens, as too few were routed to it."""
    mask_seconds: float = Field(exclude=True, default=0.0)

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


class Continuation(BaseModel):
    """What both models write after the same text, by the likeliest token each time."""

    text: str
    dense: str
    pruned: str


class Check(BaseModel):
    """How good the pruned model is on calibration text that was held back: nothing was calibrated or trained on it."""

    windows: int
    seqlen: int
    dense: float
    """Perplexity of the model before pruning."""
    pruned: float
    divergence: float | None = None
    """Kullback-Leibler, from what the dense model predicts, in nats a token; None in results of earlier versions."""
    agreement: float | None = None
    """The share of tokens for which both models find the same one likeliest."""
    continuations: list[Continuation] = []

    @property
    def ratio(self) -> float:
        return self.pruned / self.dense


@dataclass
class PrunedBlock:
    """One finished decoder block."""

    block: Block
    weights: dict[str, PrunedWeight]
    """By tensor name in the checkpoint."""
    results: list[LayerResult]


def kept_energy(before: Tensor, after: Tensor) -> float:
    """Sum of squares of `after` over that of `before`; 1 when both are all zeros."""
    energy = float(torch.linalg.vector_norm(before, dtype=torch.float32))
    return (float(torch.linalg.vector_norm(after, dtype=torch.float32)) / energy) ** 2 if energy else 1.0


def layer_result(
    linear: Linear, before: Tensor, after: PrunedWeight, stats: InputStats | None, seconds: float
) -> LayerResult:
    kept = reference.stored_values(after) if isinstance(after, Packed24) else after
    error = None
    if stats is not None and stats.sample is not None:
        dense = before.float()
        change = torch.linalg.matrix_norm(stats.sample @ (packing.unpack(after, linear.name).float() - dense).T)
        error = float(change / torch.linalg.matrix_norm(stats.sample @ dense.T).clamp_min(1e-30))
    return LayerResult(
        name=linear.name,
        shape=(before.shape[0], before.shape[1]),
        sparsity=1 - int(torch.count_nonzero(kept)) / before.numel(),
        kept_energy=kept_energy(before, kept),
        output_error=error,
        on_all_tokens=stats is not None and stats.on_all_tokens,
        mask_seconds=seconds,
    )
