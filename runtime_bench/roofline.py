"""What this machine can do at best, measured, and what that allows a model.

A decode step reads every matrix once and multiplies each by one vector per sequence, so it takes at least
max(bytes / bandwidth, flops / peak). So does a prompt, of which only the last token goes through the head. Of a 2:4
weight only kept values are counted. Attention and its cache are left out, which lowers the bound for long prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig

from runtime_bench.measure import interleaved
from runtime_bench.stored import Stored
from swiftprune.formats.spec import GROUP, KEPT, QUANT_METHOD, Quantized, WeightSpec, find_quantized
from swiftprune.kernels import native
from swiftprune.models.load import auto_class

READ_BYTES = 512 << 20
_GEMM_SIZES = (128, 256, 512, 1024, 2048)
_LONG_ENOUGH = 0.05  # seconds of a product: no larger one is tried
_REPEATS = 5
_HEAD_BITS: dict[Quantized, float] = {"int8": 8.25, "int4": 5}  # of a dense head's weight, scales of blocks included


class Peaks(Stored):
    """Medians of a few passes on so many threads."""

    threads: int
    dtype: str
    read_gb_per_s: float | None
    """Reading a buffer larger than any cache; None without native kernels."""
    gemm_gflop_per_s: float
    """torch.mm of two square matrices in `dtype` or in float32, which `dtype` can be widened to: the faster."""

    def seconds(self, matrices: Matrices, tokens: int, head_tokens: int) -> float:
        """The least that a pass of `tokens` through the blocks and of `head_tokens` through the head can take."""
        products = matrices.block_weights * tokens + matrices.head_weights * head_tokens
        arithmetic = 2 * products / (self.gemm_gflop_per_s * 1e9)
        return max(arithmetic, matrices.nbytes / (self.read_gb_per_s * 1e9) if self.read_gb_per_s else 0.0)


def measure(dtype: torch.dtype, threads: int) -> Peaks:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm = max(_gemm_flop_per_s(each) for each in {dtype, torch.float32})
        read = None
        if native.supported_isas():
            memory = torch.empty(READ_BYTES, dtype=torch.uint8).random_()
            read = read_gb_per_s(memory)
    finally:
        torch.set_num_threads(before)
    return Peaks(
        threads=threads,
        dtype=str(dtype).removeprefix("torch."),
        read_gb_per_s=read,
        gemm_gflop_per_s=gemm / 1e9,
    )


def read_gb_per_s(memory: torch.Tensor) -> float:
    """How fast `memory`, larger than any cache, is read: median of a few passes. Needs the native kernels."""
    return memory.nbytes / _median_seconds(lambda: native.read_bandwidth_pass(memory)) / 1e9


def _gemm_flop_per_s(dtype: torch.dtype) -> float:
    """The best of several sizes. A CPU without instructions for `dtype` may run it at a hundredth of float32's rate."""
    reached = 0.0
    for size in _GEMM_SIZES:
        a = torch.randn(size, size).to(dtype)
        out = torch.empty_like(a)
        seconds = _median_seconds(partial(torch.mm, a, a, out=out))
        reached = max(reached, 2 * size**3 / seconds)
        if seconds > _LONG_ENOUGH:
            break
    return reached


def best(a: Peaks, b: Peaks) -> Peaks:
    """The higher of each: a peak is what was ever reached, and a machine has slow spells."""
    reads = [peaks.read_gb_per_s for peaks in (a, b) if peaks.read_gb_per_s is not None]
    return a.model_copy(
        update={
            "read_gb_per_s": max(reads, default=None),
            "gemm_gflop_per_s": max(a.gemm_gflop_per_s, b.gemm_gflop_per_s),
        }
    )


def _median_seconds(run: Callable[[], object]) -> float:
    return interleaved({"run": run}, rounds=_REPEATS)["run"].median


@dataclass(frozen=True)
class MatrixFacts:
    """A weight that every decode step reads: a linear of a decoder block, or the head."""

    rows: int
    cols: int
    packed: bool
    head: bool
    quantized: Quantized | None = None
    """How values are stored, if not in the type of the model."""

    @property
    def weights(self) -> int:
        """Those that are stored: of a packed one, half."""
        return self.rows * self.cols // (GROUP // KEPT if self.packed else 1)

    def nbytes(self, dtype: torch.dtype) -> int:
        """As the checkpoint stores it."""
        if self.packed:
            return WeightSpec((self.rows, self.cols), dtype, self.quantized).nbytes
        if self.quantized:
            return int(self.rows * self.cols * _HEAD_BITS[self.quantized] / 8)
        return self.rows * self.cols * dtype.itemsize


def linears(folder: Path) -> list[MatrixFacts]:
    """All of a checkpoint's, in its order, from its config.json alone."""
    config = AutoConfig.from_pretrained(folder)
    declared: dict[str, Any] = getattr(config, "quantization_config", None) or {}
    dense = set(declared.get("ignore") or ())
    with init_empty_weights():
        model: Any = auto_class(config).from_config(config)
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed = declared.get("quant_method") == QUANT_METHOD and name not in dense
            stored = declared.get("head") if module is head else declared.get("values") if packed else None
            quantized = find_quantized(str(stored))
            found.append(MatrixFacts(module.out_features, module.in_features, packed, module is head, quantized))
    return found


@dataclass(frozen=True)
class Matrices:
    """All of them together."""

    nbytes: int
    block_weights: int
    head_weights: int

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype, packed_dtype: torch.dtype | None = None) -> Matrices:
        """Of a checkpoint that is run in `dtype`, its packed values stored in `packed_dtype`, by default the same."""
        found = linears(folder)
        return cls(
            nbytes=sum(matrix.nbytes(packed_dtype or dtype if matrix.packed else dtype) for matrix in found),
            block_weights=sum(matrix.weights for matrix in found if not matrix.head),
            head_weights=sum(matrix.weights for matrix in found if matrix.head),
        )
