"""How fast masks are made: native kernels against memcpy, and against the ways other methods select."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from runtime_bench.demo_data import DemoData
from runtime_bench.machine import Machine, this_machine
from runtime_bench.measure import Timing, interleaved
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.kernels.packing import prune_and_pack
from swiftprune.kernels.score_factors import ScoreFactors
from swiftprune.methods.mask import ewma
from swiftprune.methods.scores import wanda
from swiftprune.methods.statistics import InputStats
from swiftprune.progress import ProgressCallback, no_progress
from swiftprune.stages.context import Run
from swiftprune.stages.run import stream_blocks

SHAPE = (4096, 14336)
ROUNDS = 9


class Comparison(BaseModel):
    """Two contestants measured in turn. `ratio` = slow.median / fast.median, or bytes per second where said."""

    name: str
    shape: tuple[int, int] | None
    slow_name: str
    slow: Timing
    fast_name: str
    fast: Timing
    target: float

    @property
    def ratio(self) -> float:
        return self.slow.median / self.fast.median


class PruningBench(BaseModel):
    machine: Machine
    comparisons: list[Comparison]


def measure_all(data: DemoData | None, progress: ProgressCallback = no_progress) -> PruningBench:
    comparisons = []
    dtypes: list[Literal["bfloat16", "float16", "float32"]] = ["bfloat16", "float16", "float32"]
    for index, dtype in enumerate(dtypes):
        progress("kernels", index, 5)
        comparisons.append(_against_memcpy(dtype))
    progress("kernels", 3, 5)
    comparisons.append(_against_wanda_24())
    progress("kernels", 4, 5)
    comparisons.append(_against_wanda_sort())
    progress("kernels", 5, 5)
    if data is not None:
        comparisons.append(_against_sparsegpt(data, progress))
    return PruningBench(machine=this_machine(), comparisons=comparisons)


def _against_memcpy(dtype: Literal["bfloat16", "float16", "float32"]) -> Comparison:
    """Bytes of weights read per second, scored, selected and packed, over bytes copied per second by memcpy.

    The packed tensors are allocated anew in each call, as in use; memcpy writes to memory it has touched before.
    """
    weight = torch.randn(SHAPE).to(getattr(torch, dtype))
    factors = ScoreFactors(torch.rand(SHAPE[1]))
    copy = torch.empty_like(weight)
    times = interleaved(
        {"memcpy": lambda: copy.copy_(weight), "prune": lambda: prune_and_pack(weight, factors)}, rounds=ROUNDS
    )
    return Comparison(
        name=f"score + select + pack over memcpy, bytes/s, {dtype}",
        shape=SHAPE,
        slow_name="memcpy",
        slow=times["memcpy"],
        fast_name="native prune_and_pack",
        fast=times["prune"],
        target=0.25,
    )


def _weight_and_stats() -> tuple[Tensor, InputStats]:
    weight = torch.randn(4096, 4096).bfloat16()
    return weight, InputStats(token_count=1, input_sq_sum=torch.rand(4096))


def _against_wanda_24() -> Comparison:
    """Wanda's N:M selection takes the two smallest of each group of four columns with topk, group after group."""
    weight, stats = _weight_and_stats()

    def by_topk() -> Tensor:
        metric = weight.abs() * _sq_sum(stats).sqrt()
        pruned = torch.zeros(metric.shape, dtype=torch.bool)
        for k in range(0, metric.shape[1], 4):
            lowest = metric[:, k : k + 4].topk(2, dim=1, largest=False).indices
            pruned.scatter_(1, k + lowest, True)
        return weight.masked_fill(pruned, 0)

    times = interleaved(
        {"topk": by_topk, "native": lambda: prune_and_pack(weight, wanda(weight, stats, 4))}, rounds=ROUNDS
    )
    return Comparison(
        name="2:4 selection over Wanda's topk per group",
        shape=(4096, 4096),
        slow_name="topk",
        slow=times["topk"],
        fast_name="native prune_and_pack",
        fast=times["native"],
        target=5,
    )


def _against_wanda_sort() -> Comparison:
    """Wanda's unstructured selection sorts each row; EWMA does not. Both go from weights to a mask."""
    weight, stats = _weight_and_stats()

    def by_sort() -> Tensor:
        metric = weight.abs() * _sq_sum(stats).sqrt()
        order = torch.sort(metric, dim=-1, stable=True).indices
        pruned = torch.zeros(weight.shape, dtype=torch.bool)
        return pruned.scatter_(1, order[:, : weight.shape[1] // 2], True)

    times = interleaved(
        {"sort": by_sort, "ewma": lambda: ewma(wanda(weight, stats, 1).scores(weight), 0.5)}, rounds=ROUNDS
    )
    return Comparison(
        name="unstructured 50% mask by EWMA over Wanda's sort",
        shape=(4096, 4096),
        slow_name="sort",
        slow=times["sort"],
        fast_name="ewma",
        fast=times["ewma"],
        target=5,
    )


def _sq_sum(stats: InputStats) -> Tensor:
    assert stats.input_sq_sum is not None
    return stats.input_sq_sum


def _against_sparsegpt(data: DemoData, progress: ProgressCallback) -> Comparison:
    """Mask seconds over all linears of the demo model, same calibration tokens: selection alone, not the forwards."""
    seconds: dict[str, list[float]] = {"sparsegpt": [], "swiftprune": []}
    calibration = None
    for method in ("swiftprune", "sparsegpt", "swiftprune"):

        def staged(stage: str, done: float, total: float, method: str = method) -> None:
            progress(f"{method}: {stage}", done, total)

        settings = PruneSettings(method=method, calibration=str(data.calibration), samples=16, seqlen=256)
        run = Run(Checkpoint.open(data.model), settings, data=calibration, progress=staged)
        for _ in stream_blocks(run):
            pass
        calibration = run.data
        seconds[method].append(run.clock.seconds["mask"])
    return Comparison(
        name="swiftprune masks over SparseGPT, whole demo model",
        shape=None,
        slow_name="sparsegpt",
        slow=Timing(seconds=seconds["sparsegpt"]),
        fast_name="swiftprune",
        fast=Timing(seconds=seconds["swiftprune"]),
        target=12.29,
    )


def markdown(bench: PruningBench) -> str:
    lines = ["| what | shape | from | to | ratio | target |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in bench.comparisons:
        shape = "x".join(map(str, row.shape)) if row.shape else ""
        lines.append(
            f"| {row.name} | {shape} | {row.slow_name} {_milliseconds(row.slow)} | {row.fast_name} "
            f"{_milliseconds(row.fast)} | {row.ratio:.2f}x | {row.target:g}x |"
        )
    return "\n".join(lines)


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median * 1e3:.1f} ms ±{timing.spread:.0%}"
