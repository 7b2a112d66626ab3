"""Finds quantized weights again in an ONNX graph, whatever its exporter has named, transposed or joined them.

A weight is known by its rows: each row of a packed weight, unpacked, is the same float32 numbers in the graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats.spec import Packed24, Quantized
from swiftprune.kernels import packing


class PackedRows:
    """The rows of packed weights with quantized values, by what they are when unpacked."""

    def __init__(self, packed: Iterable[Packed24]) -> None:
        self.quantized: Quantized | None = None
        self._rows: dict[bytes, tuple[Packed24, int]] = {}
        for weight in packed:
            self.quantized = weight.quantized
            for index, key in enumerate(_keys(packing.unpack(weight))):
                self._rows[key] = (weight, index)

    def holds(self, weight: Tensor) -> bool:
        """Whether the first row of `weight` (N, K) is one of them."""
        return _keys(weight[:1])[0] in self._rows

    def find(self, weight: Tensor, name: str) -> Packed24:
        """`weight` (N, K), float32, as it was packed. Raises FormatError with `name` when a row is none of them."""
        found = [self._rows.get(key) for key in _keys(weight)]
        if missing := [row for row, where in enumerate(found) if where is None]:
            raise FormatError(f"{name}: row {missing[0]} is not among the quantized weights that were pruned")
        rows = [where for where in found if where is not None]
        values, metadata, scales = (
            torch.stack([packed.tensors[part][row] for packed, row in rows]) for part in range(3)
        )
        return Packed24(values, metadata, scales)


def _keys(weight: Tensor) -> list[bytes]:
    return [hashlib.blake2b(row, digest_size=16).digest() for row in weight.float().contiguous().numpy()]
