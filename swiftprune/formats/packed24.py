"""The packed format in a checkpoint: `<module>.weight`, `weight_meta` and `weight_scale`, as `spec` says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftprune.formats.spec import (
    FORMAT,
    METADATA_SUFFIX,
    SCALE_SUFFIX,
    Packed24,
    Quantized,
    declaration,
    unpackable_reason,
)


class PackedFormat:
    """A CheckpointFormat: the tensors as they are."""

    def unsupported_reason(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        return unpackable_reason(shape, dtype)

    def names(self, weight: str) -> list[str]:
        return [weight, weight + METADATA_SUFFIX, weight + SCALE_SUFFIX]

    def encode(self, weight: str, packed: Packed24) -> dict[str, Tensor]:
        return dict(zip(self.names(weight), packed.tensors, strict=False))  # not all have scales

    def decode(self, weight: str, tensors: dict[str, Tensor]) -> Packed24 | None:
        metadata = tensors.get(weight + METADATA_SUFFIX)
        return None if metadata is None else Packed24(tensors[weight], metadata, tensors.get(weight + SCALE_SUFFIX))

    def quantization_config(self, dense: list[str], quantized: Quantized | None = None) -> dict[str, Any]:
        return declaration(FORMAT, dense, quantized)
