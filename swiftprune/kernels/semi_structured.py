"""The backends `cutlass` and `cusparselt`: 2:4 tensor cores through torch's own operators.

Both operators take the weight as the first factor, so inputs go in transposed and outputs come out transposed, and both
want the number of tokens in multiples: inputs are filled up with zeros, outputs cut. They are called by name and not
through F.linear of torch's tensor subclasses, so no dense product can take their place.

8-bit weights and inputs have a scale for each row, `quantize_rows`, which is multiplied in after the sum. cuSPARSELt
could scale only by one number, which it reads on the host: no CUDA graph could hold that.

Packing is checked bit for bit against torch's converter on the CPU; the products have not run on a GPU yet.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from swiftprune.errors import FormatError
from swiftprune.formats import cutlass
from swiftprune.kernels import reference

CUTLASS_MAJOR = 8
"""torch's operator has kernels for this major compute capability only."""
ACCUMULATED = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}
"""What products of 8-bit numbers come out as."""
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_BITS = {1: torch.int8, 2: torch.int16}
ALIGNMENT = 16
"""Bytes of the widest load."""


def unsupported_reason(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why torch's operator of this name cannot take a weight of this shape (N, K) and dtype, or None when it can."""
    return cutlass.operator_reason(_kind(backend), shape, dtype)


def cutlass_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x (M, K): (M, N) in the dtype of x, or what it is summed in for 8 bits (then without a bias)."""
    dense = filled(x, _tokens_multiple("cutlass", x.dtype)).t()
    out_dtype = ACCUMULATED.get(x.dtype)
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, metadata, dense, out_dtype=out_dtype)
    else:
        y = torch._sparse_semi_structured_addmm(bias, values, metadata, dense, out_dtype=out_dtype)
    return y[:, : x.shape[0]].t().contiguous()


def compress_cusparselt(values: Tensor, metadata: Tensor, name: str = "weight") -> Tensor:
    """The packed pair as cuSPARSELt takes it, on the device, which must be a GPU. Raises FormatError if unsuitable."""
    if reason := unsupported_reason("cusparselt", (values.shape[0], 2 * values.shape[1]), values.dtype):
        raise FormatError(f"{name}: {reason}")
    # As bits, since not every torch scatters 8-bit floats; the bits of +0 are zeros.
    bits = values.view(_BITS[values.dtype.itemsize])
    dense = reference.scatter(bits, reference.stored_positions(values, metadata)).view(values.dtype)
    compressed: Tensor = torch._cslt_compress(dense)
    return compressed


def cusparselt_linear(x: Tensor, compressed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x (M, K), as `cutlass_linear`; the bias is added within the product."""
    dense = filled(x, _tokens_multiple("cusparselt", x.dtype)).t()
    out_dtype = ACCUMULATED.get(x.dtype)
    y: Tensor = torch._cslt_sparse_mm(
        compressed,
        dense,
        bias,
        out_dtype=out_dtype,
        transpose_result=True,
        alg_id=_algorithm(compressed, dense, out_dtype),
    )
    return y[: x.shape[0]]


_algorithms: dict[tuple[object, ...], int] = {}


def _algorithm(compressed: Tensor, dense: Tensor, out_dtype: torch.dtype | None) -> int:
    """cuSPARSELt's fastest algorithm for a shape and tokens up to a power of two: searched once, and never in a graph.

    A search runs every algorithm and waits for the device; where that may not be, the default, 0, is used.
    """
    tokens = 1 << (dense.shape[1] - 1).bit_length()
    key = (compressed.device, compressed.dtype, compressed.shape, dense.shape[0], tokens)
    if key not in _algorithms:
        if compressed.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return 0
        _algorithms[key] = int(
            torch._cslt_sparse_mm_search(compressed, dense, out_dtype=out_dtype, transpose_result=True)
        )
    return _algorithms[key]


def quantize_rows(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows in int8 or float8_e4m3fn, scale (rows,) float32): a row is about its numbers times its scale.

    The largest number of a row becomes the largest of the type; a row of zeros has the scale 1.
    """
    numbers = numbers.float()
    largest = numbers.abs().amax(1)
    scale = torch.where(largest > 0, largest / _LARGEST[dtype], 1.0)
    divided = numbers / scale[:, None]
    return (divided.round() if dtype == torch.int8 else divided).to(dtype), scale


def scaled(sums: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the sums (M, N) of two factors that were quantized by rows stand for, with the bias, in `dtype`."""
    y = sums.float() * x_scale[:, None] * weight_scale
    return (y if bias is None else y + bias.float()).to(dtype)


@functools.cache
def _kind(backend: str) -> type[SparseSemiStructuredTensor]:
    return {"cutlass": SparseSemiStructuredTensorCUTLASS, "cusparselt": SparseSemiStructuredTensorCUSPARSELT}[backend]


def _tokens_multiple(backend: str, dtype: torch.dtype) -> int:
    """What the operator wants the number of tokens to be a multiple of."""
    return int(_kind(backend)._DTYPE_SHAPE_CONSTRAINTS[dtype].dense_min_rows)


def aligned_rows(x: Tensor) -> Tensor:
    """`x` (..., K) as (M, K), rows next to each other and at an address that vector loads take: a copy if need be.

    cuSPARSELt takes rows to be K apart, whatever their strides are.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat.clone() if flat.data_ptr() % ALIGNMENT else flat


def filled(x: Tensor, multiple: int) -> Tensor:
    """`x` (M, K) with rows of zeros after it, up to a multiple."""
    missing = -x.shape[0] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x
