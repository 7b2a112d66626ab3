"""Made-up results, the same every time, for what reads results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime_bench.conditions import Conditions
from runtime_bench.gpu import GpuCell, GpuCheck, GpuPeaks, GpuResult, GpuTime
from runtime_bench.layers import CallOverhead, CallTime, Cell, LayersResult
from runtime_bench.machine import Gpu, Machine
from runtime_bench.results import Case, Check, Metric, Quality, RunResult, SideFacts
from runtime_bench.roofline import Peaks
from runtime_bench.trade_off import Row, TradeOff

ROUNDS = 10
CASES = ((1, 64), (2, 64), (4, 64), (8, 64), (1, 256), (1, 1024))
"""At once, and tokens of the prompt."""


def machine(cpu: str = "AMD EPYC (family 25, model 17)") -> Machine:
    return Machine(
        cpu=cpu,
        cores=2,
        affinity=[0, 1],
        virtual=True,
        cpu_features=["avx2", "avx512f", "avx512_bf16"],
        threads=2,
        memory_gb=25.3,
        isas=["avx512", "avx2", "generic"],
        system="Linux x86_64",
        python="3.12.4",
        packages={"swiftprune": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        revision="a6b4748",
        date="2026-11-24",
    )


def conditions(warnings: Sequence[str] = ()) -> Conditions:
    return Conditions(
        load_before=0.2,
        steal=0.004,
        others=0.02,
        frequency_mhz=(2900.0, 3050.0),
        seconds=412.5,
        warnings=list(warnings),
    )


def metric(
    name: str,
    dense: Sequence[float],
    sparse: Sequence[float],
    *,
    unit: str = "ms",
    lower_is_better: bool = True,
    bound: dict[str, float] | None = None,
) -> Metric:
    return Metric(
        name=name, unit=unit, lower_is_better=lower_is_better, dense=list(dense), sparse=list(sparse), bound=bound or {}
    )


def case(
    concurrency: int = 1,
    prompt_tokens: int = 64,
    *,
    tpot: float = 110.0,
    speedup: float = 1.7,
    new_tokens: int = 48,
    void: str | None = None,
    seed: int = 0,
) -> Case:
    """A case of `ROUNDS` rounds whose dense side takes about `tpot` ms per token, and whose sparse side is faster."""
    empty = Case(
        workload="batch", concurrency=concurrency, prompt_tokens=prompt_tokens, new_tokens=new_tokens, void=void
    )
    if void:
        return empty
    noise = np.random.default_rng([seed, concurrency, prompt_tokens])

    def rounds(median: float) -> list[float]:
        return [round(float(x), 4) for x in median * noise.lognormal(0, 0.03, ROUNDS)]

    dense, sparse = rounds(tpot), rounds(tpot / speedup)
    itl = {side: _gaps(median, noise) for side, median in (("dense", tpot), ("sparse", tpot / speedup))}
    best = {"dense": 0.8 * tpot, "sparse": 0.7 * tpot / speedup}
    length = prompt_tokens / 64
    metrics = [
        metric(
            "ttft",
            rounds(2.5 * tpot * length),
            rounds(2.5 * tpot * length / (0.7 + speedup / 4)),
            bound={side: value * length for side, value in best.items()},
        ),
        metric("tpot", dense, sparse, bound=best),
        *(
            metric(f"itl_p{percent}", *([float(np.quantile(gaps, percent / 100))] * ROUNDS for gaps in itl.values()))
            for percent in (50, 95, 99)
        ),
        metric(
            "tokens_per_s",
            *([1e3 * concurrency / x for x in side] for side in (dense, sparse)),
            unit="tok/s",
            lower_is_better=False,
            bound={side: 1e3 * concurrency / value for side, value in best.items()},
        ),
    ]
    return empty.model_copy(update={"metrics": metrics, "itl_ms": itl})


def _gaps(median: float, noise: np.random.Generator) -> list[float]:
    """Inter-token latencies, a few of them late."""
    late = 1 + 0.4 * (noise.random(400) > 0.97)
    return [round(float(x), 3) for x in median * late * noise.lognormal(0, 0.05, 400)]


def run_result(
    model: str = "Llama-3.2-1B",
    engine: str = "transformers",
    *,
    tpot: float = 110.0,
    speedup: float = 1.7,
    cases: Sequence[Case] | None = None,
    warnings: Sequence[str] = (),
    seed: int = 0,
) -> RunResult:
    """A run of `cases`; without any, of CASES, whose speedup falls with the number at once."""
    if cases is None:
        cases = [
            case(n, tokens, tpot=tpot * (1 + 0.02 * n), speedup=1 + (speedup - 1) / (1 + 0.1 * n), seed=seed)
            for n, tokens in CASES
        ]
    return RunResult(
        machine=machine(),
        conditions=conditions(warnings),
        command=f"swiftprune-bench run ./sparse --dense ./dense --engine {engine}",
        engine=engine,
        engine_version="5.23.0",
        model=model,
        dtype="bfloat16",
        threads=2,
        rounds=ROUNDS,
        starts=2,
        dense_linears="onednn",
        dense=SideFacts(
            name=f"{model}-pruned", disk_bytes=2_471_645_608, linears={"dense": 112}, matrix_bytes=2_471_000_000
        ),
        sparse=SideFacts(
            name=f"{model}-2of4", disk_bytes=1_617_100_000, linears={"avx512_bf16": 112}, matrix_bytes=1_616_000_000
        ),
        check=Check(tokens=128, equal=127, largest_gap=0.031, tolerance=0.25),
        peaks=Peaks(threads=2, dtype="bfloat16", read_gb_per_s=38.2, gemm_gflop_per_s=512.0),
        load=[
            metric("load", [3.1, 3.3], [2.4, 2.2], unit="s"),
            metric("peak_memory", [3120.0, 3130.0], [2210.0, 2204.0], unit="MB"),
            metric("disk", [2471.6], [1617.1], unit="MB"),
        ],
        cases=list(cases),
        quality=[
            Quality(
                name="perplexity",
                source="WikiText-2, test",
                lower_is_better=True,
                dense=12.41,
                sparse=19.87,
                tokens=4096,
            ),
            Quality(
                name="hellaswag acc_norm",
                source="lm-evaluation-harness",
                lower_is_better=False,
                dense=0.604,
                sparse=0.521,
            ),
        ],
    )


def layers_result() -> LayersResult:
    """Three shapes, six numbers of tokens, one and two threads."""
    cells = []
    for rows, cols in ((2048, 2048), (8192, 2048), (2048, 8192)):
        for threads in (1, 2):
            for tokens in (1, 4, 16, 64, 256, 512):
                dense = rows * cols * (2 / 25e6 + tokens / 3e8) / threads**0.7
                gain = 1 + 1.2 / (1 + tokens / 40) + rows / 20000 - threads / 10
                cells.append(
                    Cell(
                        rows=rows,
                        cols=cols,
                        dtype="bf16",
                        tokens=tokens,
                        threads=threads,
                        backend="avx512_bf16",
                        sparse=_call(dense / gain),
                        dense={"torch F.linear": _call(1.4 * dense), "oneDNN prepacked": _call(dense)},
                        packed_bytes=rows * cols * 9 // 8,
                        read_gb_per_s=45.0 * threads**0.7,
                    )
                )
    return LayersResult(
        machine=machine(),
        conditions=conditions(),
        command="swiftprune-bench layers",
        shares_torch_threads=True,
        rotated_mb=512,
        overhead=CallOverhead(linear24_us=5.8, operator_us=7.7, nn_linear_us=5.3),
        cells=cells,
    )


def gpu_result() -> GpuResult:
    """Two shapes, three numbers of tokens, and every status."""
    cells = []
    for rows, cols in ((4096, 4096), (14336, 4096)):
        for tokens in (1, 64, 1024):
            dense = rows * cols * (2e-6 + tokens * 4e-9)
            times = [_gpu_time("cublas", dense), _gpu_time("cutlass", dense / (0.9 + tokens / 2000))]
            times.append(_gpu_time("triton", dense / (1.3 + rows / 50000), graph=False))
            missing = "torch was built without cuSPARSELt"
            times.append(GpuTime(backend="cusparselt", status="unavailable", reason=missing))
            if tokens == 1024:
                wrong = "relative error 0.31, more than 0.01"
                times[1] = GpuTime(backend="cutlass", status="void", reason=wrong, error=0.31)
            cells.append(GpuCell(rows=rows, cols=cols, tokens=tokens, dtype="bf16", times=times))
    gpu = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_gb=85.0, driver="570.1", cuda="13.0")
    return GpuResult(
        machine=machine().model_copy(update={"gpu": gpu}),
        conditions=conditions(),
        command="swiftprune-bench gpu-suite",
        cells=cells,
        l2_flush_mb=256,
        graph_capture=False,
        checks=[
            GpuCheck(name="pack and unpack", passed=True, detail="equal bits in 4 shapes"),
            GpuCheck(name="cutlass layout", passed=False, detail="relative error 0.31 at 256x512, M=7"),
        ],
        peaks=GpuPeaks(read_gb_per_s=2950.0, gemm_tflop_per_s={"bf16": 710.0}),
        left_out=2,
        stopped="the time was up",
    )


def trade_off_result() -> TradeOff:
    """Five recipes on two texts, not in the order of their time."""
    rows = [Row(recipe="dense", settings=None, seconds={}, perplexity={"wikipedia": 20, "news": 25}, validations=[])]
    for recipe, mask, distill, wikipedia, news in (
        ("wanda", 90, 0, 190.0, 260.0),
        ("fast", 9, 0, 180.0, 270.0),
        ("best", 300, 3200, 30.0, 40.0),
        ("sparsegpt", 120, 0, 180.0, 250.0),
        ("admm", 150, 0, 60.0, 80.0),
    ):
        seconds = {"calibrate": 3.0, "mask": mask, "distill": distill}
        rows.append(
            Row(
                recipe=recipe,
                settings=None,
                seconds=seconds,
                perplexity={"wikipedia": wikipedia, "news": news},
                validations=[],
                conditions=conditions(["the machine was busy"] * (recipe == "admm")),
            )
        )
    return TradeOff(
        machine=machine(),
        command="swiftprune-bench trade-off",
        model="SmolLM2-135M-Instruct",
        tokens={"wikipedia": 30720, "news": 30720},
        rows=rows,
    )


def _gpu_time(backend: str, microseconds: float, *, graph: bool = True) -> GpuTime:
    us = [microseconds * (1 + 0.02 * (index % 5)) for index in range(ROUNDS)]
    return GpuTime(backend=backend, status="ok", us=us, error=0.0012, graph=graph)


def _call(milliseconds: float) -> CallTime:
    turns = [milliseconds * (1 + 0.01 * (turn % 5)) for turn in range(20)]
    return CallTime(p20_ms=milliseconds, median_ms=1.02 * milliseconds, spread=0.01, rounds=20, turns_ms=turns)
