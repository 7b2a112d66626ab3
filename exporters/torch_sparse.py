"""The `torch` target: weights in the CUTLASS layout of torch's own semi-structured sparse tensors.

For every packed linear of shape (N, K), N a multiple of 32 and K of 64, in float16 or bfloat16:

    <module>.weight       (N, K/2)          the packed values, as in the packed format
    <module>.weight_meta  (N, K/16) int16   the same nibbles, four to a word, in CUTLASS' own order

`load` rebuilds `SparseSemiStructuredTensorCUTLASS` from them; multiplying needs a CUDA device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from swiftprune.errors import FormatError
from swiftprune.pruning.checkpoint import Checkpoint
from swiftprune.sparse24.format import METADATA_SUFFIX, Packed24

FORMAT = "2:4-cutlass"
_ROWS, _COLUMNS = 32, 64


def unsuitable_reason(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why CUTLASS cannot take a weight of this shape (N, K) and dtype, or None when it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"CUTLASS 2:4 takes float16 or bfloat16, not {dtype}"
    if shape[0] % _ROWS or shape[1] % _COLUMNS:
        return f"CUTLASS 2:4 needs a shape in multiples of ({_ROWS}, {_COLUMNS}), not {shape}"
    return None


def to_cutlass(packed: Packed24, name: str = "weight") -> tuple[Tensor, Tensor]:
    """(values (N, K/2), metadata (N, K/16) int16 in CUTLASS order). Raises FormatError for unsuitable shapes."""
    if reason := unsuitable_reason(packed.shape, packed.values.dtype):
        raise FormatError(f"{name}: {reason}")
    # Two bytes of the canonical metadata, low nibble first, are one little-endian word of four groups.
    words = packed.metadata.contiguous().view(torch.int16)
    return packed.values, words.flatten().index_select(0, _cutlass_order(*words.shape)).view(words.shape)


def from_cutlass(values: Tensor, metadata: Tensor) -> Packed24:
    """The inverse of `to_cutlass`."""
    words = torch.empty_like(metadata).flatten()
    words[_cutlass_order(*metadata.shape)] = metadata.flatten()
    return Packed24(values, words.view(metadata.shape).view(torch.uint8))


def _cutlass_order(rows: int, words: int) -> Tensor:
    """For each word in CUTLASS' order, its index in row-major order.

    CUTLASS keeps metadata column-major in columns of two words. Within 32 rows, row 8 a + b goes to 4 b + a; then in
    every 2 x 2 block of words the two off the diagonal change places.
    """
    position = torch.arange(rows * words)
    pair, within = position // (2 * rows), position % (2 * rows)
    row, column = within // 2, 2 * pair + within % 2
    swap = (row % 2) != (column % 2)
    row, column = torch.where(swap, row ^ 1, row), torch.where(swap, column ^ 1, column)
    tile, inside = row // 32, row % 32
    return (tile * 32 + inside % 4 * 8 + inside // 4) * words + column


def load(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a `--target torch` export by name, linears as `SparseSemiStructuredTensorCUTLASS` (N, K).

    Raises CheckpointError for a damaged folder and FormatError for one of another format.
    """
    checkpoint = Checkpoint(Path(folder))
    found = checkpoint.config.get("quantization_config", {}).get("format")
    if found != FORMAT:
        raise FormatError(f"{folder}: has the format {found!r}, not {FORMAT!r}; export with --target torch")
    tensors: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        tensors.update(load_file(checkpoint.folder / shard))
    for name in [name for name in tensors if name + METADATA_SUFFIX in tensors]:
        values, metadata = tensors[name], tensors.pop(name + METADATA_SUFFIX)
        shape = torch.Size((values.shape[0], 2 * values.shape[1]))
        tensors[name] = SparseSemiStructuredTensorCUTLASS(shape, values, metadata, None, None, None)
    return tensors
