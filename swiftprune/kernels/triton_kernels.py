"""The Triton programs behind `triton_linear.py`: products by a packed pair, expanded in registers.

One byte of metadata stands for two groups: four values and eight weights. K is a multiple of 8, so a row is a whole
number of such bytes; it is given as `units` of ALIGN bytes, from which the compiler knows how far it may widen loads.

`vector` is for few tokens, where only bytes count. It does not build weights: a group's four inputs are one 64-bit
word, and shifting it right by 16 times a position brings up the input of a kept value. That takes six instructions for
a group and a token, where placing the values into a dense group takes eleven, and no memory is shared between threads.

`dot` is for more tokens. It interleaves the values and zeros to a dense tile, which the tensor cores multiply.

A program sums up one of `tl.num_programs(1)` shares of K. Of several shares the sums are float32, and `finish` adds
them up in order, so that results do not depend on who was first.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What tiles are multiplied in. Triton's interpreter does not know products of bfloat16; float32 holds them."""
    return tl.float32 if triton.knobs.runtime.interpret and dtype == torch.bfloat16 else _DTYPES[dtype]


@triton.jit
def _number(word, PLACE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Float32 of the number of DTYPE at bits PLACE * BITS of `word`."""
    if BITS == 16:
        return (word >> (PLACE * 16)).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    return (word >> (PLACE * 8)).to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _input(word, shift, DTYPE: tl.constexpr):
    return (word >> shift).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _share(length, width):
    """First byte of metadata that this program sums up, and the one after its last."""
    begin = tl.program_id(1) * length
    return begin, tl.minimum(begin + length, width)


@triton.jit
def _completed(y, scale_ptr, bias_ptr, row, rows, SCALED: tl.constexpr, BIASED: tl.constexpr):
    """One token's sums of `row`, scaled, with the bias."""
    if SCALED:
        y *= tl.load(scale_ptr + row, mask=row < rows)
    if BIASED:
        y += tl.load(bias_ptr + row, mask=row < rows).to(tl.float32)
    return y


@triton.jit
def vector(
    x_ptr,
    values_ptr,
    metadata_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    units,
    share,
    ALIGN: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Out (shares, tokens, rows) for up to BM tokens; BN rows of BYTES bytes of metadata at a time."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    width = units * ALIGN
    begin, end = _share(share * ALIGN, width)
    kept_ptr = values_ptr.to(tl.pointer_type(tl.uint64 if BITS == 16 else tl.uint32))
    group_ptr = x_ptr.to(tl.pointer_type(tl.uint64))
    start = row.to(tl.int64)[:, None] * width
    # One sum per token, two-dimensional: in a third dimension their layout would not be that of the loads.
    sums = (tl.zeros((BN, BYTES), tl.float32),) * BM
    for first in range(begin, end, BYTES):
        byte = first + tl.arange(0, BYTES)
        here = (row < rows)[:, None] & (byte < end)[None, :]
        kept = tl.load(kept_ptr + start + byte[None, :], mask=here, other=0)
        positions = tl.load(metadata_ptr + start + byte[None, :], mask=here, other=0).to(tl.uint32)
        shift0 = ((positions & 3) * 16).to(tl.uint64)
        shift1 = ((positions & 12) * 4).to(tl.uint64)
        shift2 = (positions & 48).to(tl.uint64)
        shift3 = (positions >> 6 << 4).to(tl.uint64)
        value0 = _number(kept, 0, BITS, DTYPE)
        value1 = _number(kept, 1, BITS, DTYPE)
        value2 = _number(kept, 2, BITS, DTYPE)
        value3 = _number(kept, 3, BITS, DTYPE)
        added = ()
        for token in tl.static_range(BM):
            at = group_ptr + token * width * 2 + byte * 2
            there = byte < tl.where(token < tokens, end, 0)
            even = tl.load(at, mask=there, other=0)[None, :]
            odd = tl.load(at + 1, mask=there, other=0)[None, :]
            total = sums[token]
            total += value0 * _input(even, shift0, DTYPE)
            total += value1 * _input(even, shift1, DTYPE)
            total += value2 * _input(odd, shift2, DTYPE)
            total += value3 * _input(odd, shift3, DTYPE)
            added = added + (total,)
        sums = added
    for token in tl.static_range(BM):
        y = tl.sum(sums[token], 1)
        y = _completed(y, scale_ptr, bias_ptr, row, rows, SCALED, BIASED)
        at = (tl.program_id(1) * tokens + token) * rows + row
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=row < tl.where(token < tokens, rows, 0))


@triton.jit
def _placed(first, second, place0, place1, PLACE: tl.constexpr):
    """What stands at PLACE of each group."""
    return tl.where(place0 == PLACE, first, tl.where(place1 == PLACE, second, tl.zeros_like(first)))


@triton.jit
def _dense_tile(
    values_ptr,
    metadata_ptr,
    row,
    first,
    end,
    rows,
    width,
    BN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """(BN, 8 * BYTES) weights of `row`, from byte `first` of its metadata on; zeros from `end` on."""
    byte = first + tl.arange(0, BYTES)
    value = first * 4 + tl.arange(0, 4 * BYTES)
    start = row.to(tl.int64)[:, None] * width
    below = (row < rows)[:, None]
    kept = tl.load(values_ptr + start * 4 + value[None, :], mask=below & (value < end * 4)[None, :], other=0)
    positions = tl.load(metadata_ptr + start + byte[None, :], mask=below & (byte < end)[None, :], other=0)
    nibble = tl.reshape(tl.join(positions & 15, positions >> 4), (BN, 2 * BYTES))
    value0, value1 = tl.split(tl.reshape(kept, (BN, 2 * BYTES, 2)))
    place0 = nibble & 3
    place1 = nibble >> 2
    even = tl.join(_placed(value0, value1, place0, place1, 0), _placed(value0, value1, place0, place1, 2))
    odd = tl.join(_placed(value0, value1, place0, place1, 1), _placed(value0, value1, place0, place1, 3))
    return tl.reshape(tl.join(even, odd), (BN, 8 * BYTES))


@triton.jit
def dot(
    x_ptr,
    values_ptr,
    metadata_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    units,
    share,
    ALIGN: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Out (shares, tokens, rows), BM tokens by BN rows a program; 8 * BYTES weights of a row at a time.

    Tiles are multiplied in DTYPE.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(2) * BM + tl.arange(0, BM)
    width = units * ALIGN
    begin, end = _share(share * ALIGN, width)
    x_row = x_ptr + token.to(tl.int64)[None, :] * (width * 8)
    sums = tl.zeros((BN, BM), tl.float32)
    for first in range(begin, end, BYTES):
        weight = _dense_tile(values_ptr, metadata_ptr, row, first, end, rows, width, BN, BYTES)
        column = first * 8 + tl.arange(0, 8 * BYTES)
        there = (token < tokens)[None, :] & (column < end * 8)[:, None]
        x = tl.load(x_row + column[:, None], mask=there, other=0.0)
        sums = tl.dot(weight.to(DTYPE), x.to(DTYPE), sums)
    if SCALED:
        sums *= tl.load(scale_ptr + row, mask=row < rows)[:, None]
    if BIASED:
        sums += tl.load(bias_ptr + row, mask=row < rows).to(tl.float32)[:, None]
    at = (tl.program_id(1) * tokens + token).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=(token < tokens)[None, :] & (row < rows)[:, None])


@triton.jit
def finish(
    sums_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    shares,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BN: tl.constexpr,
):
    """Out (tokens, rows): the sums (shares, tokens, rows) added up in order, scaled, with the bias."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    at = tl.program_id(1).to(tl.int64) * rows + row
    apart = tl.num_programs(1).to(tl.int64) * rows
    y = tl.zeros((BN,), tl.float32)
    for share in range(shares):
        y += tl.load(sums_ptr + share * apart + at, mask=row < rows, other=0.0)
    y = _completed(y, scale_ptr, bias_ptr, row, rows, SCALED, BIASED)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit
def unpack(values_ptr, metadata_ptr, out_ptr, rows, units, ALIGN: tl.constexpr, BN: tl.constexpr, BYTES: tl.constexpr):
    """Out (rows, K): the dense weight."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    width = units * ALIGN
    first = tl.program_id(1) * BYTES
    weight = _dense_tile(values_ptr, metadata_ptr, row, first, width, rows, width, BN, BYTES)
    column = first * 8 + tl.arange(0, 8 * BYTES)
    here = (row < rows)[:, None] & (column < width * 8)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * (width * 8) + column[None, :], weight, mask=here)
