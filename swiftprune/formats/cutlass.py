"""The layout in which CUTLASS, and so torch's semi-structured sparse tensors, keep a packed weight.

For a weight of shape (N, K), N a multiple of 32 and K of 64, in float16 or bfloat16:

    <module>.weight       (N, K/2)          the packed values, as in the packed format
    <module>.weight_meta  (N, K/16) int16   the same nibbles, four to a word, in CUTLASS' own order
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from swiftprune.errors import FormatError
from swiftprune.formats.spec import METADATA_SUFFIX, Packed24, Quantized, declaration

FORMAT = "2:4-cutlass"
_METADATA_WORD = {1: torch.int32, 2: torch.int16}  # by bytes of a value
_ROWS_APART = 8  # rows 8 apart stand next to each other in the metadata


class Cutlass24:
    """A CheckpointFormat: the layout of CUTLASS, under the names of the packed format."""

    def unsupported_reason(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        return unsupported_reason(shape, dtype)

    def names(self, weight: str) -> list[str]:
        return [weight, weight + METADATA_SUFFIX]

    def encode(self, weight: str, packed: Packed24) -> dict[str, Tensor]:
        return dict(zip(self.names(weight), to_cutlass(packed.values, packed.metadata, weight), strict=True))

    def decode(self, weight: str, tensors: dict[str, Tensor]) -> Packed24 | None:
        metadata = tensors.get(weight + METADATA_SUFFIX)
        return None if metadata is None else Packed24(*from_cutlass(tensors[weight], metadata))

    def quantization_config(self, dense: list[str], quantized: Quantized | None = None) -> dict[str, Any]:
        return declaration(FORMAT, dense)


def unsupported_reason(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why CUTLASS cannot take a weight of this shape (N, K) and dtype, or None when it can."""
    return operator_reason(SparseSemiStructuredTensorCUTLASS, shape, dtype)


def operator_reason(kind: type[SparseSemiStructuredTensor], shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why the operator behind torch's tensors of this `kind` cannot take such a weight, or None when it can.

    The limits are those of the installed torch.
    """
    backend, named = kind.BACKEND, str(dtype).removeprefix("torch.")
    limits = kind._DTYPE_SHAPE_CONSTRAINTS.get(dtype)
    if limits is None or dtype == torch.float32:  # of which these operators keep one of two
        return f"torch's {backend} does not take {named}"
    rows, cols = limits.sparse_min_rows, limits.sparse_min_cols
    if shape[0] % rows or shape[1] % cols:
        return f"torch's {backend} needs {named} weights in multiples of ({rows}, {cols}), not {shape}"
    return None


def to_cutlass(values: Tensor, metadata: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """The packed pair as CUTLASS takes it: values (N, K/2), and metadata (N, K/16) int16 or, of int8, (N, K/32) int32.

    CUTLASS keeps words column-major in columns of two. Rows 8 apart come to stand side by side, and every 2 x 2 block
    of words is transposed (reorder_meta of CUTLASS' host_reorder.h). Raises FormatError for unsuitable shapes.
    """
    if reason := unsupported_reason((values.shape[0], 2 * values.shape[1]), values.dtype):
        raise FormatError(f"{name}: {reason}")
    # Bytes of the canonical metadata, low nibble first, are little-endian words.
    words = metadata.contiguous().view(_METADATA_WORD[values.dtype.itemsize])
    tile, high, low, row, pair, column = range(6)
    split = words.view(*_cutlass_blocks(words))
    return values, split.permute(pair, tile, row, high, column, low).reshape(words.shape)


def from_cutlass(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_cutlass`: the canonical pair."""
    tiles, high, low, rows, pairs, columns = _cutlass_blocks(metadata)
    split = metadata.view(pairs, tiles, rows, high, columns, low)
    words = split.permute(1, 3, 5, 2, 0, 4).reshape(metadata.shape)
    return values, words.view(torch.uint8)


def _cutlass_blocks(words: Tensor) -> tuple[int, int, int, int, int, int]:
    """Sizes that (N, words) splits into: tiles of rows, which multiple of 8 (two bits), row, pair of words, which."""
    rows, count = words.shape
    high = 2 if words.dtype == torch.int16 else 1
    return rows // (high * 2 * _ROWS_APART), high, 2, _ROWS_APART, count // 2, 2
