"""The `marlin-24` format of compressed-tensors (up to 0.14), which vLLM served until 0.14: read into ours, not written.

For a weight (N, K), N a multiple of 64 and K of 32, in b = 4 or 8 bits:

    <module>.weight_packed  (K/32, N b/2)      int32    the stored values of each group, plus 2^(b-1), so unsigned
    <module>.meta           (K/32, 2 N)        int16    the nibbles of our metadata, four to a word
    <module>.scale_packed   (1 or K/128, N)    float16  one a row, or one for each 128 inputs of a row

They lie as the threads of a GPU load them for Sparse Marlin (Frantar et al., arXiv 2408.11743). Split the number n of
a row, s of a value in it and w of a word of metadata in it into digits: n64 counts in steps of 64, n16 what is left in
steps of 16, and so on. In memory, from the slowest digit to the fastest, lie

    values of 4 bits   s16 n64 n16 n8 s2 n1 s1 n4 s8    eight to an int32, the first in the low bits
    values of 8 bits   s16 n64 n16 n8 s2 n1 n4 s1 s8    four to an int32
    words of metadata  w2 n64 n2 n8 n1 w1 n4
    scales             n8 n1 n4 for each 128 inputs, if K is more than 256; else row after row
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.errors import FormatError

FORMAT = "marlin-24"
VALUES, METADATA, SCALES = "weight_packed", "meta", "scale_packed"
BITS = (4, 8)
SCALED_INPUTS = 128
"""Inputs that share a scale, where those of a row do not."""
_ROWS, _COLUMNS = 64, 32  # what N and K are multiples of
# compressed-tensors compares the inputs of a scale with K/2, so up to here it leaves scales in order.
_ORDERED_COLUMNS = 2 * SCALED_INPUTS


def layout(values: tuple[int, ...], metadata: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int, int]:
    """N, K and bits of the weight whose three tensors have these shapes.

    Raises FormatError when they do not belong together.
    """
    tiles, width = (*metadata, 0, 0)[:2]
    rows, cols = width // 2, tiles * _COLUMNS
    counts = {1, cols // SCALED_INPUTS} if cols % SCALED_INPUTS == 0 else {1}
    fit = rows > 0 and cols > 0 and rows % _ROWS == 0 and scales in {(count, rows) for count in counts}
    for bits in BITS:
        if fit and values == (tiles, rows * bits // 2) and metadata == (tiles, 2 * rows):
            return rows, cols, bits
    raise FormatError(
        f"{VALUES} {values}, {METADATA} {metadata} and {SCALES} {scales} do not belong together; of a weight "
        f"(N, K) in b = 4 or 8 bits, N a multiple of {_ROWS} and K of {_COLUMNS}, they are (K/{_COLUMNS}, N b/2), "
        f"(K/{_COLUMNS}, 2 N) and (1, N) or (K/{SCALED_INPUTS}, N)"
    )


def from_marlin24(values: Tensor, metadata: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, K/2) int8, our metadata (N, K/8) uint8, and scales (N, 1) or (N, K/128) fp16.

    The shapes are those that `layout` takes; whether nibbles are valid is left to who unpacks them.
    """
    return _values(values, bits), _metadata(metadata), _scales(scales, len(values) * _COLUMNS)


def _values(words: Tensor, bits: int) -> Tensor:
    stored = words.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1)
    split = stored.view(len(words), -1, 4, 2, 4, 4, 2, 2, 2)
    s16, n64, n16, n8, s2, n1, *_, s8 = range(split.ndim)
    s1, n4 = (6, 7) if bits == 4 else (7, 6)
    ordered = split.permute(n64, n16, n8, n4, n1, s16, s8, s2, s1)
    unsigned = ordered.reshape(split.shape[n64] * _ROWS, -1).to(torch.int16)
    return (unsigned - (1 << bits - 1)).to(torch.int8)


def _metadata(metadata: Tensor) -> Tensor:
    split = metadata.contiguous().view(len(metadata), -1, 2, 8, 2, 2, 2)
    w2, n64, n2, n8, n1, w1, n4 = range(split.ndim)
    words = split.permute(n64, n8, n4, n2, n1, w2, w1).reshape(-1, 2 * len(metadata))
    return words.view(torch.uint8)


def _scales(scales: Tensor, cols: int) -> Tensor:
    groups = len(scales)
    if groups > 1 and cols > _ORDERED_COLUMNS:
        scales = scales.reshape(groups, -1, 4, 2).transpose(-1, -2).reshape(groups, -1)
    return scales.T.contiguous()
