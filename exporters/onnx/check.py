"""Which weights of an ONNX model are 2:4 along the axis that is summed over: what TensorRT looks for.

TensorRT takes its structured-sparsity kernels for a MatMul, Gemm or Conv whose constant weight has, among each four
consecutive input channels at a fixed output channel (and, of a convolution, a fixed place in the kernel), at least two
zeros. In a MatMul's (K, N) weight the channels run along the first axis, in a Gemm's transB weight along the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporters.onnx.weights import find_weights, load_graph
from swiftprune.formats.spec import GROUP, KEPT
from swiftprune.methods.mask import first_violation
from swiftprune.progress import ProgressCallback, no_progress


@dataclass(frozen=True)
class WeightCheck:
    """One weight's answer."""

    name: str
    op: str
    shape: tuple[int, ...]
    axis: int
    """The axis of `shape` that is summed over."""
    sparsity: float
    """Share of zeros."""
    problem: str | None
    """Why it is not 2:4, or None when it is."""
    impossible: bool = False
    """Whether no pruning could make it 2:4: it has too few input channels for groups of four, or not whole ones."""


def check_weights(path: Path, *, progress: ProgressCallback = no_progress) -> list[WeightCheck]:
    """Every constant that a MatMul, Gemm or Conv multiplies by, read one at a time; see `weights`.

    Weights in layouts of quantized operators are listed too, as not checked. Raises CheckpointError for a damaged file.
    """
    weights = find_weights(load_graph(path))
    checks = []
    for index, weight in enumerate(weights.found):
        progress("check", index, len(weights.found))
        rows = weight.read()
        zeros = 1 - int(torch.count_nonzero(rows)) / max(1, rows.numel())
        impossible = _impossible(rows)
        problem = impossible or _problem(rows)
        checks.append(
            WeightCheck(weight.name, weight.op, weight.shape, weight.axis, zeros, problem, impossible is not None)
        )
    progress("check", len(weights.found), len(weights.found))
    for name, kind in weights.quantized.items():
        checks.append(WeightCheck(name, kind, (), 0, 0.0, "quantized: not checked"))
    return checks


def _impossible(rows: Tensor) -> str | None:
    if rows.shape[1] % GROUP == 0 and rows.numel():
        return None
    return f"{rows.shape[1]} input channels are not a multiple of {GROUP}"


def _problem(rows: Tensor) -> str | None:
    if (violation := first_violation(rows, KEPT, GROUP)) is not None:
        row, group, count = violation
        return f"{count} non-zeros in group {group} of output {row}"
    return None
