"""The C++ kernels behind `csrc/sparse24.h`: checks here, raw addresses there."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftprune.formats.spec import SCALE_DTYPE, SCALED_INPUTS, Packed24, Quantized, WeightSpec, check_shapes
from swiftprune.kernels import reference
from swiftprune.kernels.score_factors import EwmaGains, ScoreFactors

_native: Any
try:
    _native = importlib.import_module("swiftprune.kernels._native")
except ImportError:  # installed without a compiler: dispatch.py says so
    _native = None

ISAS = ("avx512", "avx2", "generic")
LINEAR_ISAS: tuple[str, ...] = _native.LINEAR_ISAS if _native is not None else ()
ONNXRUNTIME_LIBRARY: Path | None = (
    library
    if _native is not None and (library := Path(_native.__file__).with_name("libswiftprune_onnxruntime.so")).exists()
    else None
)
"""The linear kernels as a custom operator of ONNX Runtime, where they were built."""
SHARES_TORCH_THREADS: bool = _native is not None and _native.use_openmp_of("libtorch_cpu.so")
"""Whether the kernels run on torch's own OpenMP team. Without it they start threads for each call."""
_BYTES_PER_THREAD: int = _native.BYTES_PER_THREAD if _native is not None else 0
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def supported_isas() -> list[str]:
    """Instruction sets whose kernels were built and can run on this CPU, fastest first."""
    return [isa for isa in ISAS if _native is not None and _native.supports(isa)]


class NativeKernels:
    """See `dispatch.Kernels`. `isa` is one of `supported_isas()`; `threads` defaults to torch's."""

    def __init__(self, isa: str, threads: int | None = None) -> None:
        if isa not in supported_isas():
            raise ValueError(f"the {isa!r} kernels cannot run here; available: {supported_isas()}")
        self.isa = isa
        self.threads = threads

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def prune_pack(self, weight: Tensor, factors: ScoreFactors, name: str) -> tuple[Tensor, Tensor]:
        weight = _weight(weight)
        rows, cols = weight.shape
        values, metadata = _empty_packed(rows, cols, weight.dtype)
        column, cross = _vector(factors.column, cols), _vector(factors.cross, cols)
        row, curvature = _vector(factors.row, rows), _vector(factors.curvature, rows)
        fault, index = _native.prune_pack(
            self.isa,
            _DTYPES[weight.dtype],
            weight.data_ptr(),
            rows,
            cols,
            _address(column),
            _address(cross),
            _address(row),
            _address(curvature),
            values.data_ptr(),
            metadata.data_ptr(),
            self._threads(),
        )
        _raise_on(fault, index, weight, name)
        return values, metadata

    def pack(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        weight = _weight(weight)
        rows, cols = weight.shape
        values, metadata = _empty_packed(rows, cols, weight.dtype)
        fault, index = _native.pack(
            self.isa,
            _DTYPES[weight.dtype],
            weight.data_ptr(),
            rows,
            cols,
            values.data_ptr(),
            metadata.data_ptr(),
            self._threads(),
        )
        _raise_on(fault, index, weight, name)
        return values, metadata

    def unpack(self, values: Tensor, metadata: Tensor, name: str) -> Tensor:
        values, metadata = _pair(values, metadata)
        rows, half = values.shape
        weight = torch.empty(rows, 2 * half, dtype=values.dtype)
        fault, index = _native.unpack(
            self.isa,
            _DTYPES[values.dtype],
            values.data_ptr(),
            metadata.data_ptr(),
            rows,
            2 * half,
            weight.data_ptr(),
            self._threads(),
        )
        if fault:
            row, group = divmod(index, half // 2)
            raise reference.bad_metadata(name, row, group, int(metadata[row, group // 2]) >> group % 2 * 4 & 15)
        return weight

    def ewma_zscore(self, score: Tensor, mean: Tensor, deviation: Tensor, gains: EwmaGains) -> Tensor:
        score, mean, deviation = (_on_cpu(tensor).float() for tensor in (score, mean, deviation))
        rows, cols = score.shape
        if mean.shape != (rows,) or deviation.shape != (rows,):
            raise ValueError(f"mean {tuple(mean.shape)} and deviation {tuple(deviation.shape)} must be ({rows},)")
        out = torch.empty_like(score)
        _native.ewma_zscore(
            self.isa,
            score.data_ptr(),
            rows,
            cols,
            mean.data_ptr(),
            deviation.data_ptr(),
            gains.mean,
            gains.deviation,
            gains.floor,
            out.data_ptr(),
            self._threads(),
        )
        return out

    def kth_value(self, values: Tensor, rank: int) -> float:
        values = _on_cpu(values).float()
        if not 0 <= rank < values.numel():
            raise ValueError(f"rank {rank} of {values.numel()} values")
        return float(_native.kth_value(values.data_ptr(), values.numel(), rank, self._threads()))

    def prune_columns(self, weight: Tensor, factor: Tensor, keep: Tensor | tuple[int, int]) -> tuple[Tensor, Tensor]:
        weight, factor = _on_cpu(weight).float(), _on_cpu(factor).float()
        rows, cols = weight.shape
        mask = _on_cpu(keep) if isinstance(keep, Tensor) else None
        kept, group = (0, 1) if isinstance(keep, Tensor) else keep
        fits = mask is None or (mask.shape == weight.shape and mask.dtype == torch.bool)
        if not fits or factor.shape != (cols, cols) or cols > SCALED_INPUTS or cols % group:
            what = f"{group} together" if mask is None else f"a mask {tuple(mask.shape)} {mask.dtype}"
            raise ValueError(
                f"weights {tuple(weight.shape)}, {what}, and a factor {tuple(factor.shape)} do not belong together"
            )
        pruned, errors = torch.empty_like(weight), torch.empty_like(weight)
        _native.prune_columns(
            self.isa,
            _address(mask),
            kept,
            group,
            weight.data_ptr(),
            factor.data_ptr(),
            rows,
            cols,
            pruned.data_ptr(),
            errors.data_ptr(),
            self._threads(),
        )
        return pruned, errors

    def int4_scales(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        weight = _on_cpu(weight).float()
        rows, cols = weight.shape
        importance = _vector(importance, cols)
        scales = torch.empty(rows, -(-cols // SCALED_INPUTS), dtype=SCALE_DTYPE)
        _native.int4_scales(
            self.isa, weight.data_ptr(), rows, cols, _address(importance), scales.data_ptr(), self._threads()
        )
        return scales

    def round_columns(
        self, weight: Tensor, keep_mask: Tensor, factor: Tensor, scales: Tensor, quantized: Quantized
    ) -> tuple[Tensor, Tensor]:
        weight, keep_mask, factor, scales = _columns(weight, keep_mask, factor, scales)
        values = torch.empty(weight.shape, dtype=torch.uint8 if quantized == "int4" else torch.int8)
        errors = torch.empty_like(weight)
        _native.round_columns(
            self.isa,
            _BITS[quantized],
            weight.data_ptr(),
            keep_mask.data_ptr(),
            factor.data_ptr(),
            scales.data_ptr(),
            *weight.shape,
            values.data_ptr(),
            errors.data_ptr(),
            self._threads(),
        )
        return values, errors

    def descend_columns(
        self, stored: Tensor, gradient: Tensor, keep_mask: Tensor, gram: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient, keep_mask, gram, scales = _columns(gradient, keep_mask, gram, scales)
        stored = _on_cpu(stored).float().clone()
        if stored.shape != gradient.shape:
            raise ValueError(f"weights {tuple(stored.shape)} and their gradient {tuple(gradient.shape)} differ")
        values = torch.empty(stored.shape, dtype=torch.uint8)
        _native.descend_columns(
            self.isa,
            gradient.data_ptr(),
            keep_mask.data_ptr(),
            gram.data_ptr(),
            scales.data_ptr(),
            *stored.shape,
            values.data_ptr(),
            stored.data_ptr(),
            self._threads(),
        )
        return values, stored


def linear_isas(dtype: torch.dtype) -> list[str]:
    """Instruction sets whose linear kernel was built, can run on this CPU and takes `dtype`, fastest first."""
    return [isa for isa in LINEAR_ISAS if linear_kernel(isa, dtype)]


@functools.cache
def linear_kernel(isa: str, dtype: torch.dtype) -> int:
    """The address of a linear kernel, or 0 when it cannot run here."""
    return int(_native.linear24_for(isa, _DTYPES[dtype]))


def to_tiled(values: Tensor, metadata: Tensor) -> Tensor | None:
    """The packed pair of tensors in the layout of the linear kernels (csrc/tiled.h): uint8, 1-D.

    None when the pair breaks the format: `format.validate` says where.
    """
    values, metadata = _pair(values, metadata)
    rows, half = values.shape
    tiled = torch.empty(tiled_bytes(values.dtype, rows, 2 * half), dtype=torch.uint8)
    valid = _native.to_tiled(
        _DTYPES[values.dtype],
        values.data_ptr(),
        metadata.data_ptr(),
        rows,
        2 * half,
        tiled.data_ptr(),
        torch.get_num_threads(),
    )
    return tiled if valid else None


class MappedFiles:
    """The memory of this process that files are mapped to, and the way to let go of it (Linux; elsewhere nothing)."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._misses = 0

    def drop(self, tensor: Tensor) -> None:
        """Lets go of the pages of `tensor` if they are of a file, from which they are read again when need be."""
        begin = tensor.data_ptr()
        if not self._holds(begin, tensor.nbytes) and self._misses < 3:  # else it stands in memory of its own
            self._ranges = _ranges_of_files()
            self._misses += not self._holds(begin, tensor.nbytes)
        if self._holds(begin, tensor.nbytes):
            _native.drop_pages(begin, tensor.nbytes)

    def _holds(self, begin: int, nbytes: int) -> bool:
        return any(start <= begin and begin + nbytes <= end for start, end in self._ranges)


def _ranges_of_files() -> list[tuple[int, int]]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    ranges = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/") and "deleted" not in fields[5]:
            start, _, end = fields[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def from_tiled(tiled: Tensor, dtype: torch.dtype, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """(values, metadata) again, bit for bit."""
    _check_tiled(tiled, tiled_bytes(dtype, rows, cols), rows, cols, dtype)
    values, metadata = _empty_packed(rows, cols, dtype)
    _native.from_tiled(
        _DTYPES[dtype], tiled.data_ptr(), rows, cols, values.data_ptr(), metadata.data_ptr(), torch.get_num_threads()
    )
    return values, metadata


@functools.cache
def tiled_bytes(dtype: torch.dtype, rows: int, cols: int) -> int:
    return int(_native.tiled_bytes(_DTYPES[dtype], rows, cols))


def linear24(
    isa: str, x: Tensor, tiled: Tensor, bias: Tensor | None, rows: int, out_dtype: torch.dtype | None = None
) -> Tensor:
    """y (..., N) = x (..., K) W^T + bias (N), W the weight in `tiled`, sums in fp32, rounded once to `out_dtype`.

    x, the tiled values and bias are of one dtype and on the CPU; `out_dtype` is that or float32. Raises ValueError
    otherwise. Costs no dispatch: 210 of these make a token of a 30-layer model.
    """
    dtype = x.dtype
    shape = x.shape
    cols = shape[-1]
    kernel = linear_kernel(isa, dtype)
    if not kernel:
        raise ValueError(f"the {isa!r} linear kernel cannot run on {dtype} here; those that can: {linear_isas(dtype)}")
    if not x.is_cpu:
        raise ValueError(f"x is on {x.device}, the weight on the CPU; move the layer or x")
    _check_tiled(tiled, tiled_bytes(dtype, rows, cols), rows, cols, dtype)
    bias = _checked_bias(bias, rows, dtype)
    x, stride = _with_stride(x, cols)
    if out_dtype not in (None, dtype, torch.float32):
        raise ValueError(f"the output can be {dtype} or float32, not {out_dtype}")
    if out_dtype is None:  # spelled so that torch takes half the time
        out_dtype, y = dtype, x.new_empty(*shape[:-1], rows)
    else:
        y = x.new_empty(*shape[:-1], rows, dtype=out_dtype)
    if tokens := x.numel() // cols:
        _native.linear24(
            kernel,
            _DTYPES[dtype],
            _DTYPES[out_dtype],
            tiled.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            x.data_ptr(),
            stride,
            y.data_ptr(),
            tokens,
            rows,
            cols,
            _threads_for(tokens, tiled.numel()),
        )
    return y


QUANT_ISAS: tuple[str, ...] = _native.QUANT_ISAS if _native is not None else ()
"""Instruction sets whose kernel for 8- and 4-bit values was built and can run on this CPU, fastest first."""
_BITS: dict[Quantized | None, int] = {"int8": 8, "int4": 4}


def to_quant_tiled(packed: Packed24) -> Tensor | None:
    """A weight with quantized values in the layout of its kernels (csrc/quantized.h): uint8, 1-D.

    None when it breaks the format: `spec.validate` says where.
    """
    check_shapes(packed, "weight")
    values, metadata, scales = (_on_cpu(tensor) for tensor in packed.tensors)
    rows, cols = packed.shape
    bits = _BITS[packed.quantized]
    tiled = torch.empty(quant_bytes(bits, rows, cols), dtype=torch.uint8)
    valid = _native.to_quant_tiled(
        bits,
        values.data_ptr(),
        metadata.data_ptr(),
        scales.data_ptr(),
        rows,
        cols,
        tiled.data_ptr(),
        torch.get_num_threads(),
    )
    return tiled if valid else None


def from_quant_tiled(tiled: Tensor, spec: WeightSpec) -> Packed24:
    """The weight again, bit for bit."""
    bits = _BITS[spec.quantized]
    _check_tiled(tiled, quant_bytes(bits, *spec.shape), *spec.shape, spec.quantized)
    assert spec.scales is not None
    (shape, dtype), scales = spec.values, torch.empty(spec.scales, dtype=SCALE_DTYPE)
    values, metadata = torch.empty(shape, dtype=dtype), torch.empty(spec.metadata, dtype=torch.uint8)
    _native.from_quant_tiled(
        bits,
        tiled.data_ptr(),
        *spec.shape,
        values.data_ptr(),
        metadata.data_ptr(),
        scales.data_ptr(),
        torch.get_num_threads(),
    )
    return Packed24(values, metadata, scales)


@functools.cache
def quant_bytes(bits: int, rows: int, cols: int) -> int:
    return int(_native.quant_bytes(bits, rows, cols))


@functools.cache
def _quant_kernel(isa: str) -> int:
    return int(_native.quant_kernel(isa))


def quant24(isa: str, quantized: Quantized, x: Tensor, tiled: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """y (..., N) = x (..., K) W^T + bias (N), W the quantized weight in `tiled`.

    x is rounded to 8 bits first, for each token and each 128 inputs by the largest of them. Products are summed in
    integers within these, then in float32; y is rounded once, to the dtype of x. Raises ValueError for what is not a
    float on the CPU, or does not fit.
    """
    bits, dtype, shape = _BITS[quantized], x.dtype, x.shape
    cols = shape[-1]
    if not x.is_cpu or dtype not in _DTYPES:
        raise ValueError(f"x is {dtype} on {x.device}; the kernel takes floats on the CPU")
    _check_tiled(tiled, quant_bytes(bits, rows, cols), rows, cols, quantized)
    bias = _checked_bias(bias, rows, dtype)
    x, stride = _with_stride(x, cols)
    y = x.new_empty(*shape[:-1], rows)
    if tokens := x.numel() // cols:
        _native.quant24(
            _quant_kernel(isa),
            bits,
            _DTYPES[dtype],
            tiled.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            x.data_ptr(),
            stride,
            y.data_ptr(),
            tokens,
            rows,
            cols,
            _threads_for(tokens, tiled.numel()),
        )
    return y


def _threads_for(tokens: int, nbytes: int) -> int:
    """Of torch's threads, as many as a weight of so many bytes keeps busy."""
    threads = torch.get_num_threads()
    return min(threads, 1 + tokens * nbytes // _BYTES_PER_THREAD) if threads > 1 else 1


def _checked_bias(bias: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    if bias.dtype is not dtype or bias.shape != (rows,) or not bias.is_cpu:
        raise ValueError(f"bias is {tuple(bias.shape)} {bias.dtype} on {bias.device}, not ({rows},) {dtype} on the CPU")
    return bias.contiguous()


def _with_stride(x: Tensor, cols: int) -> tuple[Tensor, int]:
    """Rows of x that are each contiguous, and how far apart they are."""
    if x.is_neg():
        x = x.resolve_neg()
    if not x.data_ptr() and x.numel():
        raise ValueError(f"x is a {type(x).__name__}, which holds no numbers of its own that kernels could read")
    if x.is_contiguous():
        return x, cols
    x = x.reshape(-1, cols)
    return (x, x.stride(0)) if x.stride(1) == 1 else (x.contiguous(), cols)


def read_bandwidth_pass(memory: Tensor) -> None:
    """Reads a contiguous CPU tensor once with torch's threads; the yardstick of the memory-bound kernels."""
    memory = _on_cpu(memory)
    _native.read_bandwidth_pass(memory.data_ptr(), memory.nbytes, torch.get_num_threads())


def _on_cpu(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"the native kernels work on CPU tensors, not on {tensor.device}")
    tensor = tensor.detach().resolve_neg().contiguous()
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"a {type(tensor).__name__} holds no numbers of its own that kernels could read")
    return tensor


def _weight(weight: Tensor) -> Tensor:
    weight = _on_cpu(weight)
    if weight.ndim != 2 or weight.shape[1] % 4 or weight.dtype not in _DTYPES:
        raise ValueError(f"a weight must be (N, K), K a multiple of 4, not {tuple(weight.shape)} {weight.dtype}")
    return weight


def _pair(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    values, metadata = _on_cpu(values), _on_cpu(metadata)
    rows, half = values.shape
    expected = (rows, (half // 2 + 1) // 2)
    if values.dtype not in _DTYPES or half % 2 or metadata.dtype != torch.uint8 or metadata.shape != expected:
        raise ValueError(
            f"values {tuple(values.shape)} {values.dtype} and metadata {tuple(metadata.shape)} {metadata.dtype} "
            "do not belong together"
        )
    return values, metadata


def _check_tiled(tiled: Tensor, nbytes: int, rows: int, cols: int, stored: object) -> None:
    if not tiled.is_cpu or tiled.dtype is not torch.uint8 or not tiled.is_contiguous():
        raise ValueError(f"a tiled weight is uint8, contiguous and on the CPU, not {tiled.dtype} on {tiled.device}")
    if tiled.numel() != nbytes:
        raise ValueError(f"a weight ({rows}, {cols}) {stored} does not fit a tiled weight of {tiled.numel()} bytes")


def _empty_packed(rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = torch.empty(rows, cols // 2, dtype=dtype)
    return values, torch.empty(rows, (cols // 4 + 1) // 2, dtype=torch.uint8)


def _vector(factor: Tensor | None, length: int) -> Tensor | None:
    if factor is None:
        return None
    if factor.shape != (length,):
        raise ValueError(f"a score factor has shape {tuple(factor.shape)}, expected ({length},)")
    return _on_cpu(factor).float()


def _columns(weight: Tensor, keep_mask: Tensor, square: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """`weight` and `keep_mask` (N, B), `square` (B, B) and `scales` (N, 1), as the kernels of rounding take them."""
    weight, square = _on_cpu(weight).float(), _on_cpu(square).float()
    keep_mask, scales = _on_cpu(keep_mask), _on_cpu(scales)
    rows, cols = weight.shape
    fits = keep_mask.shape == weight.shape and square.shape == (cols, cols) and scales.shape == (rows, 1)
    if not fits or cols > SCALED_INPUTS or keep_mask.dtype != torch.bool or scales.dtype != SCALE_DTYPE:
        raise ValueError(
            f"weights {tuple(weight.shape)}, a mask {tuple(keep_mask.shape)} {keep_mask.dtype}, a factor "
            f"{tuple(square.shape)} and scales {tuple(scales.shape)} {scales.dtype} do not belong together"
        )
    return weight, keep_mask, square, scales


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _raise_on(fault: int, index: int, weight: Tensor, name: str) -> None:
    if not fault:
        return
    row, group = divmod(index, weight.shape[1] // 4)
    four = weight[row, 4 * group : 4 * group + 4]
    if fault == _native.NOT_FINITE:
        raise reference.not_finite(name, row, group, four.tolist())
    raise reference.too_many_non_zeros(name, row, group, int((four != 0).sum()))
