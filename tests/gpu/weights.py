"""Random weights that are 2:4 with their zeros in place, and their packed pairs, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.kernels.packing import pack


def masked(weight: Tensor, generator: torch.Generator) -> Tensor:
    """`weight` (N, K) with two zeros in each group of four, in places drawn evenly."""
    groups = weight.view(len(weight), -1, 4)
    dropped = torch.rand(groups.shape, generator=generator).argsort(-1) < 2
    return torch.where(dropped, 0, groups).view_as(weight)


def random_weight(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return masked(torch.randn(rows, cols, generator=generator), generator).to(dtype)


def packed_pair(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Through float32, which holds all of the types."""
    pair = pack(weight.float())
    return pair.values.to(weight.dtype), pair.metadata
