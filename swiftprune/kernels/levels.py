"""What stored values of 8 and 4 bits stand for, and which is nearest to a weight."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from swiftprune.formats.spec import CODEBOOK, Quantized

LARGEST = 127
"""The largest value, of `int8` and of the codebook."""


@functools.cache
def codebook(device: torch.device) -> Tensor:
    """(16,) fp32: what codes of 4 bits stand for."""
    return torch.tensor(CODEBOOK, dtype=torch.float32, device=device)


@functools.cache
def _between_levels(device: torch.device) -> Tensor:
    """(15,) fp32: where the nearest level of the codebook changes."""
    levels = codebook(device)
    return (levels[1:] + levels[:-1]) / 2


def to_values(weight: Tensor, scale: Tensor, quantized: Quantized) -> Tensor:
    """What is stored for each of `weight` (N, G) under `scale` (N, 1): int8 values, or uint8 codes of the codebook."""
    wanted = weight / scale.float()
    if quantized == "int8":
        return wanted.round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return torch.bucketize(wanted, _between_levels(weight.device)).to(torch.uint8)


def from_values(values: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weights (N, G) that int8 `values`, or uint8 codes, stand for."""
    if values.dtype == torch.uint8:
        values = codebook(values.device)[values.long()]
    return values.float() * scale.float()
