"""The C++ kernels behind `csrc/sparse24.h`: checks here, raw addresses there."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from swiftprune.sparse24.kernels import reference
from swiftprune.sparse24.score_factors import EwmaGains, ScoreFactors

_native: Any
try:
    _native = importlib.import_module("swiftprune.sparse24.kernels._native")
except ImportError:  # installed without a compiler: dispatch.py says so
    _native = None

ISAS = ("avx512", "avx2", "generic")
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
        weight = _on_cpu(weight)
        rows, cols = weight.shape
        values, metadata = _empty_packed(weight)
        column, cross = _vector(factors.column, cols), _vector(factors.cross, cols)
        row, curvature = _vector(factors.row, rows), _vector(factors.curvature, rows)
        fault, index = _native.prune_pack(
            self.isa, _DTYPES[weight.dtype], weight.data_ptr(), rows, cols, _address(column), _address(cross),
            _address(row), _address(curvature), values.data_ptr(), metadata.data_ptr(), self._threads(),
        )  # fmt: skip
        _raise_on(fault, index, weight, name)
        return values, metadata

    def pack(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        weight = _on_cpu(weight)
        values, metadata = _empty_packed(weight)
        fault, index = _native.pack(
            self.isa, _DTYPES[weight.dtype], weight.data_ptr(), *weight.shape,
            values.data_ptr(), metadata.data_ptr(), self._threads(),
        )  # fmt: skip
        _raise_on(fault, index, weight, name)
        return values, metadata

    def unpack(self, values: Tensor, metadata: Tensor, name: str) -> Tensor:
        values, metadata = _on_cpu(values), _on_cpu(metadata)
        rows, half = values.shape
        weight = torch.empty(rows, 2 * half, dtype=values.dtype)
        fault, index = _native.unpack(
            self.isa, _DTYPES[values.dtype], values.data_ptr(), metadata.data_ptr(), rows, 2 * half,
            weight.data_ptr(), self._threads(),
        )  # fmt: skip
        if fault:
            row, group = divmod(index, half // 2)
            raise reference.bad_metadata(name, row, group, int(metadata[row, group // 2]) >> group % 2 * 4 & 15)
        return weight

    def surprise(self, score: Tensor, mean: Tensor, deviation: Tensor, gains: EwmaGains) -> Tensor:
        score, mean, deviation = (_on_cpu(tensor).float() for tensor in (score, mean, deviation))
        rows, cols = score.shape
        out = torch.empty_like(score)
        _native.surprise(
            self.isa, score.data_ptr(), rows, cols, mean.data_ptr(), deviation.data_ptr(),
            gains.mean, gains.deviation, gains.floor, out.data_ptr(), self._threads(),
        )  # fmt: skip
        return out

    def ranked_value(self, values: Tensor, rank: int) -> float:
        values = _on_cpu(values).float()
        return float(_native.ranked_value(values.data_ptr(), values.numel(), rank, self._threads()))


def _on_cpu(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        raise ValueError(f"the native kernels work on CPU tensors, not on {tensor.device}")
    return tensor.detach().contiguous()


def _empty_packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    values = torch.empty(rows, cols // 2, dtype=weight.dtype)
    return values, torch.empty(rows, (cols // 4 + 1) // 2, dtype=torch.uint8)


def _vector(factor: Tensor | None, length: int) -> Tensor | None:
    if factor is None:
        return None
    if factor.shape != (length,):
        raise ValueError(f"a score factor has shape {tuple(factor.shape)}, expected ({length},)")
    return _on_cpu(factor).float()


def _address(factor: Tensor | None) -> int:
    return 0 if factor is None else factor.data_ptr()


def _raise_on(fault: int, index: int, weight: Tensor, name: str) -> None:
    if not fault:
        return
    row, group = divmod(index, weight.shape[1] // 4)
    four = weight[row, 4 * group : 4 * group + 4]
    if fault == _native.NOT_FINITE:
        raise reference.not_finite(name, row, group, four.tolist())
    raise reference.too_many_non_zeros(name, row, group, int((four != 0).sum()))
