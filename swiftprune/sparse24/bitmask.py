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
from swiftprune.sparse24 import format as format24
from swiftprune.sparse24.format import GROUP, Packed24

FORMAT = "sparse-24-bitmask"
VALUES, MASK, SHAPE = "compressed", "bitmask", "shape"
_NIBBLE_OF = {1 << low | 1 << high: low | high << 2 for high in range(GROUP) for low in range(high)}
"""Four bits of the mask, two of them set -> the nibble of our metadata."""


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
            "sparsity_structure": format24.FORMAT,
            "targets": ["Linear"],
            "ignore": ignore,
        },
    }


def to_bitmask(packed: Packed24) -> dict[str, Tensor]:
    """The three tensors for `packed`, whose K must be a multiple of 8, keyed by the last part of their names."""
    rows, cols = packed.shape
    if reason := unsuitable_reason(packed.shape):
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

    -0.0 becomes +0, and stored zeros take the positions that format.py prescribes. Raises FormatError, naming row and
    columns, when a group of four has not exactly two bits.
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
    return format24.pack(format24.unpack(Packed24(values, metadata.to(torch.uint8)), name), name)


def unsuitable_reason(shape: tuple[int, int]) -> str | None:
    """Why a packed weight of this shape (N, K) cannot be stored so, or None when it can."""
    return f"in_features = {shape[1]} is not a multiple of 8" if shape[1] % 8 else None
