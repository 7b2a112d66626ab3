"""Values of 8 and 4 bits for the kept weights of a 2:4 weight: scales, rounding to nearest, and packing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from swiftprune.formats.spec import CODEBOOK, SCALE_DTYPE, SCALED_INPUTS, Packed24, Quantized, check_finite
from swiftprune.kernels import dispatch, reference

LARGEST = 127
"""The largest value, of `int8` and of the codebook."""
# Of the scale at which the largest weight is just reached; a smaller one rounds the many finer and cuts off the few.
_SCALE_FACTORS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_ZERO_CODE = CODEBOOK.index(0)


def scaled_inputs(quantized: Quantized, in_features: int) -> int:
    """How many inputs of a row share a scale."""
    return SCALED_INPUTS if quantized == "int4" else in_features


def scales_of(weight: Tensor, quantized: Quantized, importance: Tensor | None = None) -> Tensor:
    """(N, 1) bfloat16: the scale of each row of `weight` (N, G) fp32, pruned weights being zero.

    Of `int8` it reaches the largest weight. Of `int4` it is the best of twenty, of either sign since the codebook is
    not symmetric, by the squared error of the non-zeros, times the `importance` (G,) of their inputs.
    """
    largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 2**10)
    if quantized == "int8":
        return (largest / LARGEST).to(SCALE_DTYPE)
    best = lowest = None
    for factor in _SCALE_FACTORS:
        for sign in (1, -1):
            scale = (sign * factor / LARGEST * largest).to(SCALE_DTYPE)
            error = (rounded(weight, scale, quantized) - weight).square() * (weight != 0)
            if importance is not None:
                error *= importance
            total = error.sum(1, keepdim=True)
            if best is None or lowest is None:
                best, lowest = scale, total
            else:
                best = torch.where(total < lowest, scale, best)
                lowest = torch.minimum(total, lowest)
    assert best is not None
    return best


def to_values(weight: Tensor, scale: Tensor, quantized: Quantized) -> Tensor:
    """What is stored for each of `weight` (N, G) under `scale` (N, 1): int8 values, or uint8 codes of the codebook."""
    wanted = weight / scale.float()
    if quantized == "int8":
        return wanted.round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return torch.bucketize(wanted, _between_levels(weight.device)).to(torch.uint8)


@functools.cache
def _between_levels(device: torch.device) -> Tensor:
    """(15,) fp32: where the nearest level of the codebook changes."""
    levels = reference.codebook(device)
    return (levels[1:] + levels[:-1]) / 2


def from_values(values: Tensor, scale: Tensor) -> Tensor:
    """The fp32 weights (N, G) that int8 `values`, or uint8 codes, stand for."""
    if values.dtype == torch.uint8:
        values = reference.codebook(values.device)[values.long()]
    return values.float() * scale.float()


def rounded(weight: Tensor, scale: Tensor, quantized: Quantized) -> Tensor:
    """`weight` (N, G) at the nearest that can be stored under `scale` (N, 1), fp32."""
    return from_values(to_values(weight, scale, quantized), scale)


def quantize(weight: Tensor, keep_mask: Tensor, quantized: Quantized, name: str = "weight") -> Packed24:
    """Rounds the weights of `weight` (N, K) that `keep_mask` keeps to nearest, and packs them.

    Raises FormatError for a weight that is not finite, or a mask that keeps three of a group.
    """
    check_finite(weight, name)
    weight = torch.where(keep_mask, weight, 0).float()
    parts = torch.split(weight, scaled_inputs(quantized, weight.shape[1]), dim=1)
    scales = torch.cat([scales_of(part, quantized) for part in parts], dim=1)
    return pack_values(_all_values(weight, scales, quantized), scales, keep_mask, name)


def _all_values(weight: Tensor, scales: Tensor, quantized: Quantized) -> Tensor:
    return to_values(weight, of_each_input(scales, weight.shape[1]), quantized)


def of_each_input(scales: Tensor, in_features: int) -> Tensor:
    """(N, K) of scales (N, S), or (N, 1) as they are."""
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(SCALED_INPUTS, dim=1)[:, :in_features]


def pack_values(values: Tensor, scales: Tensor, keep_mask: Tensor, name: str = "weight") -> Packed24:
    """Packs `values` (N, K), int8 or uint8 codes, with `scales` as the format has them, where `keep_mask` is True."""
    _, metadata = dispatch.kernels(values.device).pack(keep_mask.float(), name)
    quantized: Quantized = "int4" if values.dtype == torch.uint8 else "int8"
    values = torch.where(keep_mask, values, _ZERO_CODE if quantized == "int4" else 0)
    rows, cols = values.shape
    positions = reference.stored_positions(values.new_empty(rows, cols // 2), metadata)
    stored = values.view(rows, -1, 4).gather(-1, positions)
    if quantized == "int4":
        return Packed24(stored[..., 0] | stored[..., 1] << 4, metadata, scales)
    return Packed24(stored.flatten(1), metadata, scales)


def split_rows(packed: Packed24, rows: list[int]) -> list[Packed24]:
    """Consecutive rows of `packed`, so many for each."""
    return [Packed24(*parts) for parts in zip(*(torch.split(tensor, rows) for tensor in packed.tensors), strict=True)]
