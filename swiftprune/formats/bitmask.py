"""The `sparse-24-bitmask` format of compressed-tensors (0.8 to 0.14), which vLLM served until 0.18, beside ours.

    <module>.compressed  (N, K/2)  the stored values of each group of four, in ascending position: as in our `weight`
    <module>.bitmask     (N, K/8)  uint8; bit i of byte b is set where column 8 b + i is stored
    <module>.shape       (2, 1)    int64: N, K

Both formats describe eight columns in a byte, so one is turned into the other byte by byte.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats import spec
from swiftprune.formats.spec import GROUP, Packed24, Quantized

FORMAT = "sparse-24-bitmask"
VALUES, MASK, SHAPE = "compressed", "bitmask", "shape"
_NIBBLE_OF = {1 << low | 1 << high: low | high << 2 for high in range(GROUP) for low in range(high)}
"""Four bits of the mask, two of them set -> the nibble of our metadata."""


class BitmaskFormat:
    """A CheckpointFormat: what compressed-tensors wrote."""

    def unsupported_reason(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        return unsupported_reason(shape)

    def names(self, weight: str) -> list[str]:
        return list(names(weight).values())

    def encode(self, weight: str, packed: Packed24) -> dict[str, Tensor]:
        stored = names(weight)
        return {stored[part]: tensor for part, tensor in to_bitmask(packed).items()}

    def decode(self, weight: str, tensors: dict[str, Tensor]) -> Packed24 | None:
        stored = names(weight)
        if stored[MASK] not in tensors:
            return None
        return from_bitmask(tensors[stored[VALUES]], tensors[stored[MASK]], weight)

    def quantization_config(self, dense: list[str], quantized: Quantized | None = None) -> dict[str, Any]:
        return quantization_config(dense)


def names(weight: str) -> dict[str, str]:
    """The names of the three tensors that stand for `<module>.weight`, by their last part."""
    module = weight.removesuffix("weight")
    return {part: module + part for part in (VALUES, MASK, SHAPE)}


def quantization_config(ignore: list[str]) -> dict[str, Any]:
    """What compressed-tensors 0.14 wrote into config.json, the linears in `ignore` being dense."""
    return {
        "quant_method": "compressed-tensors",
        "version": "0.14.0.1",
        "sparsity_config": {
            "format": FORMAT,
            "sparsity_structure": spec.FORMAT,
            "targets": ["Linear"],
            "ignore": ignore,
        },
    }


def to_bitmask(packed: Packed24) -> dict[str, Tensor]:
    """The three tensors for `packed`, whose K must be a multiple of 8, keyed by the last part of their names."""
    rows, cols = packed.shape
    if reason := unsupported_reason(packed.shape):
        raise FormatError(f"cannot be stored as {FORMAT}: {reason}")
    table = torch.zeros(256, dtype=torch.uint8)
    for low_bits, low in _NIBBLE_OF.items():
        for high_bits, high in _NIBBLE_OF.items():
            table[low | high << 4] = low_bits | high_bits << 4
    return {
        VALUES: packed.values,
        MASK: table[packed.metadata.long()],
        SHAPE: torch.tensor([[rows], [cols]], dtype=torch.int64),
    }


def from_bitmask(values: Tensor, mask: Tensor, name: str = "weight") -> Packed24:
    """Our form of `values` (N, K/2) and `mask` (N, K/8) uint8, K a multiple of 8.

    Stored zeros stay where they are, which a reader takes and a writer may not write: `packing.canonical` moves them.
    Raises FormatError, naming row and columns, when a group of four has not exactly two bits.
    """
    if values.ndim != 2 or mask.dtype != torch.uint8 or mask.shape != (values.shape[0], values.shape[1] // GROUP):
        raise FormatError(
            f"{name}: {VALUES} {tuple(values.shape)} {values.dtype} and {MASK} {tuple(mask.shape)} {mask.dtype} do not "
            f"belong together; {MASK} must be (N, K/8) torch.uint8 beside {VALUES} (N, K/2)"
        )
    table = torch.full((256,), -1, dtype=torch.int16)
    for low_bits, low in _NIBBLE_OF.items():
        for high_bits, high in _NIBBLE_OF.items():
            table[low_bits | high_bits << 4] = low | high << 4
    metadata = table[mask.long()]
    if (bad := metadata < 0).any():
        row, byte = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: the bitmask of row {row}, columns {8 * byte} to {8 * byte + 7} is {int(mask[row, byte]):#010b}, "
            "which has not two bits in each group of four; the file is damaged or not 2:4"
        )
    return Packed24(values, metadata.to(torch.uint8))


def unsupported_reason(shape: tuple[int, int]) -> str | None:
    """Why a packed weight of this shape (N, K) cannot be stored so, or None when it can."""
    return f"in_features = {shape[1]} is not a multiple of 8" if shape[1] % 8 else None
