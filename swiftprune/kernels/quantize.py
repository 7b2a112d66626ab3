"""Values of 8 and 4 bits for the kept weights of a 2:4 weight: scales, rounding to nearest, and packing."""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.formats.spec import CODEBOOK, SCALE_DTYPE, SCALED_INPUTS, Packed24, Quantized, check_finite
from swiftprune.kernels import dispatch, reference
from swiftprune.kernels.levels import LARGEST, to_values

_ZERO_CODE = CODEBOOK.index(0)


def scales_of(weight: Tensor, quantized: Quantized, importance: Tensor | None = None) -> Tensor:
    """(N, S) bfloat16, as the format has them: the scales of `weight` (N, K) fp32, pruned weights being zero.

    Of `int8` it reaches the largest weight of a row. Of `int4` it is the best of twenty, of either sign since the
    codebook is not symmetric, by the squared error of the non-zeros, times the `importance` (K,) of their inputs.
    """
    if quantized == "int4":
        return dispatch.kernels(weight.device).int4_scales(weight, importance)
    largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 2**10)
    return (largest / LARGEST).to(SCALE_DTYPE)


def quantize(weight: Tensor, keep_mask: Tensor, quantized: Quantized, name: str = "weight") -> Packed24:
    """Rounds the weights of `weight` (N, K) that `keep_mask` keeps to nearest, and packs them.

    Raises FormatError for a weight that is not finite, or a mask that keeps three of a group.
    """
    check_finite(weight, name)
    weight = torch.where(keep_mask, weight, 0).float()
    scales = scales_of(weight, quantized)
    values = to_values(weight, of_each_input(scales, weight.shape[1]), quantized)
    return pack_values(values, scales, keep_mask, name)


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
