"""Packing one weight and unpacking it, on the kernels for the device that it is on."""

from __future__ import annotations

from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats.spec import (
    FORMAT,
    Packed24,
    Quantized,
    check_device,
    check_shapes,
    unpackable_reason,
)
from swiftprune.kernels import dispatch, quantize, reference
from swiftprune.kernels.score_factors import ScoreFactors


def _check_packable(weight: Tensor, name: str) -> None:
    if reason := unpackable_reason(tuple(weight.shape), weight.dtype):
        raise FormatError(f"{name}: cannot be packed as {FORMAT}: {reason}")
    check_device(name, weight)


def prune_and_pack(weight: Tensor, factors: ScoreFactors, name: str = "weight") -> Packed24:
    """Keeps the two highest scores of each group of four of `weight` (N, K) and packs them, in one pass.

    Of equal scores the lower position is kept, and any other weight before one that is zero.
    Raises FormatError when the weight is not packable or not finite.
    """
    _check_packable(weight, name)
    return Packed24(*dispatch.kernels(weight.device).prune_pack(weight, factors, name))


def pack(weight: Tensor, name: str = "weight", *, values: Quantized | None = None) -> Packed24:
    """Packs a `weight` (N, K) that is already 2:4. Raises FormatError naming row and group when it is not.

    With `values` its non-zeros are rounded to nearest, to 8 or 4 bits, with scales.
    """
    _check_packable(weight, name)
    if values:
        return quantize.quantize(weight, weight != 0, values, name)
    return Packed24(*dispatch.kernels(weight.device).pack(weight, name))


def unpack(packed: Packed24 | Tensor, name: str = "weight") -> Tensor:
    """The (N, K) weight with its zeros, of quantized values in float32. Raises FormatError when it breaks the format.

    A tensor is returned as it is, so that all that `prune` yields may be passed.
    """
    if isinstance(packed, Tensor):
        return packed
    check_shapes(packed, name)
    return dispatch.kernels(packed.values.device).unpack(reference.stored_values(packed), packed.metadata, name)


def keep_mask(packed: Packed24 | Tensor) -> Tensor:
    """(N, K) bool, True = kept: what the metadata of a packed weight says, and of a dense one what is not zero."""
    if isinstance(packed, Tensor):
        return packed != 0
    return reference.stored_mask(packed)


def canonical(packed: Packed24, name: str = "weight") -> Packed24:
    """The same weight as the specification has it written: stored zeros in their positions, -0.0 as +0."""
    return pack(unpack(packed, name), name)
