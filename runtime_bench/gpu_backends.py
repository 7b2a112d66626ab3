"""The contestants of the GPU benchmark: the ways to multiply by a masked weight on a CUDA device, and their checks.

Unmeasured: written against the sources of torch 2.13, checked on CPU tensors only; none of this has run on a GPU yet.

A weight is (N, K), inputs are (M, K) and outputs (M, N), for M tokens.

With 16-bit inputs all but the dense ones are layers, `Linear24` on that backend: what is measured is what serves, with
whatever it does around the operators (filling up tokens with zeros, turning outputs around, quantizing inputs, scaling
outputs). `unpack` expands the weight and multiplies densely. `cublas-int8` and `cublas-fp8` are what the 8-bit backends
compete with: dense, and quantized in the same way.

With int8 or float8_e4m3fn inputs it is torch's operators alone, all scales 1, giving int32 and bfloat16: no layer runs
that, but it tells what of an 8-bit layer's time is the product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from swiftprune.formats import cutlass
from swiftprune.formats.spec import unpackable_reason
from swiftprune.kernels import dispatch, gpu, reference, semi_structured, triton_linear
from swiftprune.kernels.gpu import CAPABILITY
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import pack, unpack
from swiftprune.kernels.semi_structured import ACCUMULATED, filled

DENSE = "cublas"
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "int8", "float8_e4m3fn")}
"""By their names in results; the most informative first."""
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3, torch.int8: 0.0, torch.float8_e4m3fn: 2e-2}
"""Of the relative Frobenius error. int8 is exact in int32; Hopper adds fp8 products up in less than fp32."""
QUANTIZED_TOLERANCE = {torch.int8: 3e-2, torch.float8_e4m3fn: 6e-2}
"""The same where 16-bit weights, and inputs perhaps, were taken to 8 bits."""
_CUBLAS_MULTIPLE = {torch.int8: 8, torch.float8_e4m3fn: 16}  # of N and K
_INT_MM_ROWS = 32  # torch._int_mm refuses up to 16 tokens
_CHUNK = 512  # tokens
_CPU = torch.device("cpu")
_NEWEST = (semi_structured.CUTLASS_MAJOR, 9)  # where every backend has kernels; `major` and `quantized` tell the rest
CHECKED_SHAPES = ((64, 128), (256, 512))
ODD_SHAPE = (24, 132)  # 33 groups in a row
CHECKED_TOKENS = (1, 7, 16, 33)

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to multiply by a weight that is 2:4 with its zeros in place."""

    name: str
    limits: Callable[[tuple[int, int], torch.dtype], str | None]
    """Why a weight of this shape (N, K) and dtype is refused, or None."""
    prepare: Callable[[Tensor], Run]
    """Lays out the weight, on its device, and returns what multiplies inputs by it. May raise anything."""
    major: int | None = None
    """The only major compute capability that it has kernels for, if there is just one."""
    quantized: torch.dtype | None = None
    """The type of 8 bits that it takes 16-bit weights, and inputs perhaps, to."""

    def unsupported_reason(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        """Why a device of this compute capability cannot do it, or None when nothing is known to be in the way."""
        if self.quantized and dtype.itemsize == 1:
            return f"{self.name} quantizes 16-bit inputs"
        if self.quantized and capability < (least := CAPABILITY[self.quantized]):
            return f"{self.name} needs compute capability {version(least)}, and this is {version(capability)}"
        if capability < (least := CAPABILITY[dtype]):
            return f"{short(dtype)} needs compute capability {version(least)}, and this is {version(capability)}"
        if self.major not in (None, capability[0]):
            return f"{self.name} needs compute capability {self.major}.x, and this is {version(capability)}"
        return self.limits(shape, dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def version(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def masked_weight(rows: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """A random (rows, cols) weight in which each group of four has two zeros, in places drawn evenly."""
    random = torch.Generator(device).manual_seed(seed)
    kept = [[place in pair for place in range(4)] for pair in itertools.combinations(range(4), 2)]
    masks = torch.tensor(kept, device=device)
    drawn = torch.randint(len(kept), (rows, cols // 4), generator=random, device=device)
    mask = masks[drawn].view(rows, cols)
    if dtype == torch.int8:
        return torch.where(mask, inputs(rows, cols, dtype, device, seed + 1), 0)
    weight = inputs(rows, cols, torch.float32, device, seed + 1)
    if dtype.itemsize > 1:
        weight = weight * cols**-0.5  # outputs as large as inputs
    rounded = torch.where(mask, weight, 0).to(dtype).float()
    return (rounded + 0.0).to(dtype)  # fp8 rounds the smallest to zero, and the negative of them to -0.0


def inputs(tokens: int, cols: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Random inputs (tokens, cols): standard normal, or all of int8 but -128."""
    random = torch.Generator(device).manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (tokens, cols), generator=random, dtype=dtype, device=device)
    return torch.randn(tokens, cols, generator=random, device=device).to(dtype)


def truth(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float64 of what `x` and `weight` hold."""
    exact = weight.double().t()
    return torch.cat([x[start : start + _CHUNK].double() @ exact for start in range(0, x.shape[0], _CHUNK)])


def relative_error(y: Tensor, expected: Tensor) -> float | None:
    """Frobenius norm of the difference over that of `expected`; None when shapes differ or `y` is not finite."""
    if y.shape != expected.shape or not torch.isfinite(y).all():
        return None
    return float((y.double() - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))


def fault(
    y: Tensor, expected: Tensor, dtype: torch.dtype, quantized: torch.dtype | None = None
) -> tuple[float | None, str | None]:
    """The relative error of `y` for a weight of `dtype` that was `quantized` or not, and why it disqualifies `y`."""
    tolerance = QUANTIZED_TOLERANCE[quantized] if quantized else TOLERANCE[dtype]
    error = relative_error(y, expected)
    if error is None:
        wrong = f"of shape {tuple(y.shape)}" if y.shape != expected.shape else "with NaN or infinities"
        return None, f"gave a result {wrong}"
    if error > tolerance:
        return error, f"wrong result: relative error {error:.2g}, tolerance {tolerance:g}"
    return error, None


def _pair(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The packed pair of a masked weight of any dtype (float32 holds them all), on its device."""
    packed = pack(weight.cpu().float())
    return packed.values.to(weight.dtype).to(weight.device), packed.metadata.to(weight.device)


def _cutlass(weight: Tensor) -> Run:
    if weight.dtype.itemsize > 1:
        return _linear24("cutlass", weight)
    values, metadata = cutlass.to_cutlass(*_pair(weight))
    return partial(semi_structured.cutlass_linear, values=values, metadata=metadata)


def _cusparselt(weight: Tensor) -> Run:
    if weight.dtype.itemsize > 1:
        return _linear24("cusparselt", weight)
    return partial(semi_structured.cusparselt_linear, compressed=semi_structured.compress_cusparselt(*_pair(weight)))


def _cublas_quantized(quantized: torch.dtype, weight: Tensor) -> Run:
    """Dense, with 8-bit weights and inputs as `Linear24` has them."""
    rows, weight_scale = semi_structured.quantize_rows(weight, quantized)
    product = _cublas(rows)

    def run(x: Tensor) -> Tensor:
        numbers, x_scale = semi_structured.quantize_rows(x, quantized)
        return semi_structured.scaled(product(numbers), x_scale, weight_scale, None, x.dtype)

    return run


def _cublas(weight: Tensor) -> Run:
    transposed = weight.t()
    if weight.dtype == torch.int8:
        return lambda x: torch._int_mm(filled(x, _INT_MM_ROWS) if x.shape[0] <= 16 else x, transposed)[: x.shape[0]]
    if weight.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=weight.device)
        return lambda x: torch._scaled_mm(x, transposed, one, one, out_dtype=ACCUMULATED[x.dtype])
    return lambda x: F.linear(x, weight)


def _linear24(backend: str, weight: Tensor) -> Run:
    packed = pack(weight.cpu())
    return Linear24.from_packed(packed, backend=dispatch.REFERENCE).to(weight.device).use_backend(backend)


def _triton_limits(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    return _packed_limits(shape, dtype) or triton_linear.unsupported_reason(shape, dtype)


def _packed_limits(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    reason = unpackable_reason(shape, dtype)
    return f"Linear24 cannot hold it: {reason}" if reason else None


def _cublas_limits(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    return _multiples("cuBLAS", dtype, shape, (_CUBLAS_MULTIPLE.get(dtype, 1),) * 2)


def _served(name: str) -> Backend:
    """An 8-bit backend of `Linear24`."""
    backend = gpu.BACKENDS[name]

    def limits(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        return _packed_limits(shape, dtype) or backend.unsupported_reason(dtype, shape, _NEWEST)

    major = semi_structured.CUTLASS_MAJOR if name.startswith("cutlass") else None
    return Backend(name, limits, partial(_linear24, name), major=major, quantized=backend.quantized)


def _multiples(name: str, dtype: torch.dtype, shape: tuple[int, int], of: tuple[int, int]) -> str | None:
    if shape[0] % of[0] or shape[1] % of[1]:
        return f"{name} needs {short(dtype)} weights in multiples of {of}, not {shape}"
    return None


BACKENDS = (
    Backend(DENSE, _cublas_limits, _cublas),
    Backend("cusparselt", partial(semi_structured.unsupported_reason, "cusparselt"), _cusparselt),
    Backend(
        "cutlass", partial(semi_structured.unsupported_reason, "cutlass"), _cutlass, major=semi_structured.CUTLASS_MAJOR
    ),
    Backend("triton", _triton_limits, partial(_linear24, "triton")),
    Backend("unpack", _triton_limits, partial(_linear24, "unpack")),
    Backend(dispatch.REFERENCE, _packed_limits, partial(_linear24, dispatch.REFERENCE)),
    Backend(f"{DENSE}-int8", _cublas_limits, partial(_cublas_quantized, torch.int8), quantized=torch.int8),
    Backend(
        f"{DENSE}-fp8", _cublas_limits, partial(_cublas_quantized, torch.float8_e4m3fn), quantized=torch.float8_e4m3fn
    ),
    *(_served(name) for name, backend in gpu.BACKENDS.items() if backend.quantized),
)
"""The dense one first; it multiplies the zeros too."""


class MismatchError(Exception):
    """A check found something computed wrong."""


def checks(
    place: torch.device, backends: Sequence[Backend], capability: tuple[int, int]
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Names, and what checks it on `place`: it returns what it found, and raises when that is wrong.

    What a backend refuses by rule is not checked.
    """
    yield "Linear24 reference: the CPU's products", lambda: _check_linear24(place)
    yield "packed pair: unpacked on the device", lambda: _check_unpack(place)
    for backend in backends:
        for dtype in DTYPES.values():
            if not backend.unsupported_reason(dtype, CHECKED_SHAPES[0], capability):
                yield f"{backend.name} {short(dtype)}: products", partial(_check_products, place, backend, dtype)
        if not backend.unsupported_reason(torch.bfloat16, CHECKED_SHAPES[0], capability):
            yield f"{backend.name}: -0.0 and groups of zeros", partial(_check_zeros, place, backend)
        if backend.name == "cutlass" and not backend.unsupported_reason(torch.bfloat16, CHECKED_SHAPES[0], capability):
            yield "CUTLASS layout: the products of torch's own", lambda: _check_cutlass_layout(place)


def _check_linear24(place: torch.device) -> str:
    """Also with a bias, and an odd number of groups in a row."""
    worst = 0.0
    for rows, cols in (*CHECKED_SHAPES, ODD_SHAPE):
        weight = masked_weight(rows, cols, torch.bfloat16, _CPU)
        layer = Linear24.from_packed(pack(weight), torch.arange(rows) / rows, backend=dispatch.REFERENCE)
        x = inputs(7, cols, torch.bfloat16, _CPU)
        expected = layer(x).double()
        worst = max(worst, _right(layer.to(place)(x.to(place)).cpu(), expected, x.dtype, f"({rows}, {cols})"))
    return f"largest relative difference {worst:.1e}"


def _check_unpack(place: torch.device) -> str:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, cols in (*CHECKED_SHAPES, ODD_SHAPE):
            packed = pack(masked_weight(rows, cols, dtype, _CPU))
            values, metadata = packed.values.to(place), packed.metadata.to(place)
            weight = reference.scatter(values, reference.stored_positions(values, metadata))
            if not torch.equal(weight.cpu(), unpack(packed)):
                raise MismatchError(f"({rows}, {cols}) {short(dtype)}: differs from the weight unpacked on the CPU")
    return "bit for bit the CPU's, in three dtypes"


def _check_products(place: torch.device, backend: Backend, dtype: torch.dtype) -> str:
    worst = 0.0
    for rows, cols in CHECKED_SHAPES:
        weight = masked_weight(rows, cols, dtype, place)
        run = backend.prepare(weight)
        for tokens in CHECKED_TOKENS:
            x = inputs(tokens, cols, dtype, place)
            y, where = run(x), f"({rows}, {cols}), {tokens} tokens"
            worst = max(worst, _right(y, truth(x, weight), dtype, where, backend.quantized))
    return f"largest relative error {worst:.1e}"


def _check_zeros(place: torch.device, backend: Backend) -> str:
    """-0.0 is a zero, and a group may have fewer than two other values."""
    rows, cols = CHECKED_SHAPES[0]
    weight = masked_weight(rows, cols, torch.bfloat16, place)
    weight[0::4] = 0
    weight[1::4, 0::2] = 0
    weight[0:-1:2] = torch.where(weight[0:-1:2] == 0, -0.0, weight[0:-1:2])
    x = inputs(7, cols, torch.bfloat16, place)
    y = backend.prepare(weight)(x)
    error = _right(y, truth(x, weight), torch.bfloat16, f"({rows}, {cols})", backend.quantized)
    if (y[:, 0::4] != 0).any():
        raise MismatchError("rows of zeros gave something else than zeros")
    return f"relative error {error:.1e}"


def _check_cutlass_layout(place: torch.device) -> str:
    """The same kernel over the same bits gives the same bits."""
    for dtype in (torch.bfloat16, torch.float16):
        for rows, cols in CHECKED_SHAPES:
            weight = masked_weight(rows, cols, dtype, place)
            own = SparseSemiStructuredTensorCUTLASS.from_dense(weight)
            assert own.packed is not None
            assert own.meta is not None
            x = inputs(7, cols, dtype, place)
            if not torch.equal(_cutlass(weight)(x), semi_structured.cutlass_linear(x, own.packed, own.meta)):
                raise MismatchError(f"({rows}, {cols}) {short(dtype)}: not the product of torch's own layout")
    return "bit for bit the same products"


def _right(y: Tensor, expected: Tensor, dtype: torch.dtype, where: str, quantized: torch.dtype | None = None) -> float:
    """The relative error; raises when it is too large."""
    error, wrong = fault(y, expected, dtype, quantized)
    if wrong or error is None:
        raise MismatchError(f"{where}: {wrong}")
    return error
