"""What a machine allows a model, worked out by hand for a tiny one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporters import export
from runtime_bench.roofline import Matrices, Peaks, best, linears, measure
from swiftprune.config import PruneSettings

BLOCK = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64  # q and o, k and v of two heads, gate, up and down
HEAD = 300 * 64
PEAKS = Peaks(threads=1, dtype="bfloat16", read_gb_per_s=1e-3, gemm_gflop_per_s=1e-3)  # a MB and a Mflop a second


def test_dense_and_packed(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    dense = Matrices.of(tiny_models("qwen2"), torch.bfloat16)
    assert dense == Matrices(nbytes=2 * (3 * BLOCK + HEAD), block_weights=3 * BLOCK, head_weights=HEAD)
    export(tiny_models("qwen2"), tmp_path / "packed", PruneSettings(calibration="none"))
    packed = Matrices.of(tmp_path / "packed", torch.bfloat16)
    assert packed == Matrices(nbytes=3 * BLOCK * 9 // 8 + 2 * HEAD, block_weights=3 * BLOCK // 2, head_weights=HEAD)
    assert [matrix.packed for matrix in linears(tmp_path / "packed")] == [True] * 21 + [False]


def test_the_slower_of_bytes_and_arithmetic_counts() -> None:
    matrices = Matrices(nbytes=8_000_000, block_weights=3_000_000, head_weights=1_000_000)
    assert PEAKS.seconds(matrices, 1, 1) == pytest.approx(8)  # both: 8 MB, and 2 flops for each of 4 M weights
    assert PEAKS.seconds(matrices, 10, 1) == pytest.approx(62)
    assert PEAKS.seconds(matrices, 10, 10) == pytest.approx(80)
    blind = PEAKS.model_copy(update={"read_gb_per_s": None})
    assert blind.seconds(Matrices(10**9, 1, 0), 1, 1) == pytest.approx(2e-6)


def test_the_best_of_each_is_kept() -> None:
    other = PEAKS.model_copy(update={"read_gb_per_s": 5.0, "gemm_gflop_per_s": 1e-4})
    assert best(PEAKS, other) == PEAKS.model_copy(update={"read_gb_per_s": 5.0})


def test_this_machine_has_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime_bench.roofline.READ_BYTES", 1 << 22)
    monkeypatch.setattr("runtime_bench.roofline._GEMM_SIZES", (128,))
    before = torch.get_num_threads()
    found = measure(torch.float32, 1)
    assert torch.get_num_threads() == before
    assert (found.threads, found.dtype) == (1, "float32")
    assert found.read_gb_per_s
    assert found.gemm_gflop_per_s > 0


def test_a_type_that_the_machine_is_slow_in_does_not_bound_it_nor_hold_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like bfloat16 without AVX-512: 2048 x 2048 took half a minute a product there, and float32 is open to kernels."""
    monkeypatch.setattr("runtime_bench.roofline.READ_BYTES", 1 << 22)
    product = torch.mm
    sizes: dict[torch.dtype, list[int]] = {torch.bfloat16: [], torch.float32: []}

    def slow_in_bfloat16(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        sizes[a.dtype].append(len(a))
        if a.dtype == torch.float32:
            return product(a, b, out=out)
        time.sleep(len(a) / 4000)
        return out

    monkeypatch.setattr(torch, "mm", slow_in_bfloat16)
    found = measure(torch.bfloat16, 1)
    assert set(sizes[torch.bfloat16]) == {128, 256}
    assert found.gemm_gflop_per_s > 2 * 256**3 / 0.064 / 1e9
