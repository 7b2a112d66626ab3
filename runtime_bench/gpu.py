"""Correctness and speed of 2:4 products on a GPU: all checks and measurements within ten minutes.

Unmeasured: nothing here has run on a GPU yet. Tests run it on a stand-in for the device, up to the calls of CUDA.

For each dtype, shape of Llama-3-8B and number of tokens, the backends of `gpu_backends` multiply by the same masked
weight. A call is captured into a CUDA graph where the backend allows that, so that the time is the device's and not
Python's; where it does not, the result says so. Contestants take turns in an order drawn anew for each round, and
before each call more than the L2 cache holds is written, so that weights come from memory as in a model. Times are
those between two CUDA events and hold the microsecond or two that these cost.

A result that differs from the fp64 product by more than a tolerance makes a time void, and no figure of it is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from runtime_bench.conditions import FREQUENCY_LIMIT, Conditions, judged, watch
from runtime_bench.gpu_backends import (
    BACKENDS,
    DENSE,
    DTYPES,
    Backend,
    MismatchError,
    Run,
    checks,
    fault,
    inputs,
    masked_weight,
    truth,
)
from runtime_bench.layers import SHAPES
from runtime_bench.machine import Gpu, this_machine
from runtime_bench.results import Result
from runtime_bench.statistics import Interval, ratio_interval, ratios, spread
from runtime_bench.stored import Stored
from swiftprune.errors import SettingsError
from swiftprune.progress import ProgressCallback, no_progress

TOKENS = (1, 16, 64, 256, 1024, 4096)
ROUNDS = 30
LEAST_FLUSH = 256 << 20  # bytes; writing them also takes longer than the host needs to enqueue a call
READ_BYTES = 1 << 30
GEMM = 8192
PEAK_CALLS = 7


class GpuTime(Stored):
    """One backend in one cell."""

    backend: str
    """`cublas` (dense), `cusparselt`, `cutlass`, `triton`, or `reference` (unpacks for every call)."""
    status: Literal["ok", "void", "unavailable"]
    """`void`: it ran, and what it gave is wrong. `unavailable`: it cannot run, or did not."""
    reason: str | None = None
    us: list[float] = Field(default_factory=list)
    """Microseconds of one call, per round; round i of all backends of a cell belong together."""
    error: float | None = None
    """Relative Frobenius error against the fp64 product of the same weight and inputs."""
    graph: bool = False
    """Whether a CUDA graph was replayed; else the host launched every call, and small ones measure the host."""

    @model_validator(mode="after")
    def _figures_of_what_is_right(self) -> Self:
        if (self.status == "ok") != bool(self.us) or (self.status == "ok") != (self.reason is None):
            raise ValueError("an ok time has figures and no reason, any other a reason and no figures")
        return self


class GpuCell(Stored):
    """One weight (rows, cols) of `dtype` by one number of tokens."""

    rows: int
    cols: int
    tokens: int
    dtype: str
    times: list[GpuTime]
    sm_clock_mhz: float | None = None
    """Right after the last round."""

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.cols} {self.dtype} M={self.tokens}"

    @property
    def speedups(self) -> dict[str, Interval]:
        """Of every other backend over `cublas`, from paired rounds; empty when `cublas` has no times."""
        ok = {time.backend: time.us for time in self.times if time.status == "ok"}
        dense = ok.pop(DENSE, None)
        if dense is None:
            return {}
        return {name: ratio_interval(ratios(dense, us, lower_is_better=True)) for name, us in ok.items()}


class GpuCheck(Stored):
    """Whether something is computed right."""

    name: str
    passed: bool
    detail: str


class GpuPeaks(Stored):
    """What this device did at best here."""

    read_gb_per_s: float | None
    """Summing a buffer larger than the L2 cache."""
    gemm_tflop_per_s: dict[str, float]
    """Of two square matrices by cuBLAS, by dtype (int8: TOP/s)."""


class GpuResult(Result):
    """`swiftprune-bench gpu-suite`."""

    kind: Literal["gpu"] = "gpu"
    checks: list[GpuCheck]
    peaks: GpuPeaks | None
    cells: list[GpuCell]
    left_out: int = 0
    """Cells that were planned and not measured."""
    stopped: str | None = None
    """Why cells were left out."""
    l2_flush_mb: int
    graph_capture: bool
    """Whether all times are of CUDA graphs."""


class Call(NamedTuple):
    """What is timed: `run` returns the output, (M, N)."""

    run: Callable[[], Tensor]
    graph: bool


class Device(Protocol):
    """What is needed of a GPU."""

    place: torch.device
    flush_bytes: int

    def facts(self) -> Gpu:
        """Name, compute capability, clocks of this moment."""
        ...

    def captured(self, run: Callable[[], Tensor]) -> Call:
        """`run` as a graph, or as it is where it cannot be captured. What `run` raises by itself is raised.

        A graph reads where the inputs were: keep them as long as it is used.
        """
        ...

    def timed(self, run: Callable[[], object], rounds: int) -> list[float]:
        """Microseconds of each of so many calls, each from a cache that holds nothing of use."""
        ...


class CudaDevice:
    """A GPU by torch.cuda. Not run yet. Raises SettingsError when there is none."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        require(device)
        index = torch.device(device).index
        self.place = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.cuda.set_device(self.place)
        self.flush_bytes = max(2 * torch.cuda.get_device_properties(self.place).L2_cache_size, LEAST_FLUSH)
        self._flush = torch.empty(self.flush_bytes, dtype=torch.uint8, device=self.place)

    def facts(self) -> Gpu:
        return facts(self.place)

    def captured(self, run: Callable[[], Tensor]) -> Call:
        aside = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries set themselves up in the first calls, which no graph may hold
                run()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize(self.place)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream, which torch does not where ending the capture fails.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=aside):
                output = run()
        except RuntimeError:
            torch.cuda.synchronize(self.place)
            return Call(run, graph=False)

        def replay() -> Tensor:
            graph.replay()
            return output

        return Call(replay, graph=True)

    def timed(self, run: Callable[[], object], rounds: int) -> list[float]:
        event = partial(torch.cuda.Event, enable_timing=True)
        events = [(event(), event()) for _ in range(rounds)]
        for start, end in events:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.place)
        return [1e3 * start.elapsed_time(end) for start, end in events]


def require(device: torch.device | str = "cuda") -> None:
    """Raises SettingsError, saying what was looked for, when torch cannot use this NVIDIA GPU."""
    wanted = torch.device(device)
    if wanted.type != "cuda":
        raise SettingsError(f"{device} is no GPU; the GPU benchmark runs on cuda devices")
    if torch.version.cuda is None:
        raise SettingsError(
            f"there is no GPU to measure: torch {torch.__version__} is built without CUDA; install a CUDA build of "
            f"torch on a machine with an NVIDIA GPU ({_driver()})"
        )
    if not torch.cuda.is_available():
        raise SettingsError(
            f"there is no GPU to measure: torch {torch.__version__} is built for CUDA {torch.version.cuda} but finds "
            f"no device ({_driver()}; CUDA_VISIBLE_DEVICES may hide it)"
        )
    if wanted.index is not None and wanted.index >= (count := torch.cuda.device_count()):
        raise SettingsError(f"there is no GPU {device}: torch finds {count}, counted from cuda:0")


def _driver() -> str:
    return "nvidia-smi is installed" if shutil.which("nvidia-smi") else "no nvidia-smi found, so perhaps no driver"


def facts(device: torch.device | str = "cuda") -> Gpu:
    """Of a CUDA device; clocks and driver as nvidia-smi reports them, None where it does not."""
    properties = torch.cuda.get_device_properties(device)
    driver, sm_clock, memory_clock = _nvidia_smi(f"GPU-{properties.uuid}", "driver_version", "clocks.sm", "clocks.mem")
    library = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return Gpu(
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_gb=round(properties.total_memory / 1e9, 1),
        driver=driver,
        cuda=torch.version.cuda,
        cusparselt=None if library is None else str(library),
        sm_clock_mhz=_number(sm_clock),
        memory_clock_mhz=_number(memory_clock),
    )


def _nvidia_smi(gpu: str, *fields: str) -> list[str | None]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", gpu]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return [None] * len(fields)
    values: list[str | None] = [value.strip() for value in answer.split(",")]
    return values if len(values) == len(fields) else [None] * len(fields)


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def suite(
    device: Device | None = None,
    budget_seconds: float = 540,
    progress: ProgressCallback = no_progress,
    *,
    backends: Sequence[Backend] = BACKENDS,
    dtypes: Sequence[str] = tuple(DTYPES),
    shapes: Sequence[tuple[int, int]] = SHAPES["llama-3-8b"],
    tokens: Sequence[int] = TOKENS,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.monotonic,
    keep: Callable[[GpuResult], None] = lambda _: None,
) -> GpuResult:
    """Checks, then measures cell after cell (16-bit types first, one shape through all tokens) within the budget.

    `device` is the first GPU by default; SettingsError when there is none. `clock` counts seconds. `keep` is given what
    there is after the checks and after every cell, since rented machines go away. Ctrl-C ends it with what there is.
    """
    end = clock() + budget_seconds
    device = device or CudaDevice()
    gpu = device.facts()
    machine = this_machine(gpu=gpu)
    major, minor = map(int, gpu.compute_capability.split("."))
    contest = _Contest(device, backends, (major, minor), rounds)
    planned = [(dtype, shape, m) for dtype in dtypes for shape in shapes for m in tokens]
    checked: list[GpuCheck] = []
    cells: list[GpuCell] = []
    peaks = None
    stopped: str | None = "it was not finished"

    def so_far(conditions: Conditions | None = None) -> GpuResult:
        times = [time for cell in cells for time in cell.times if time.status == "ok"]
        return GpuResult(
            machine=machine,
            conditions=conditions,
            command="swiftprune-bench gpu-suite",
            checks=checked,
            peaks=peaks,
            cells=cells,
            left_out=len(planned) - len(cells),
            stopped=stopped,
            l2_flush_mb=device.flush_bytes >> 20,
            graph_capture=bool(times) and all(time.graph for time in times),
        )

    with torch.inference_mode(), watch() as seen:
        for name, check in checks(device.place, backends, contest.capability):
            progress(f"check {name}", len(cells), len(planned))
            checked.append(_checked(name, check))
        keep(so_far())
        try:
            peaks = contest.peaks(dtypes)
            longest = 0.0
            for dtype, shape, m in planned:
                progress(f"{shape[0]}x{shape[1]} {dtype}", len(cells), len(planned))
                begin = clock()
                if begin + longest > end:
                    stopped = f"the budget of {budget_seconds:g} s was used"
                    break
                cells.append(contest.cell(dtype, shape, m))
                keep(so_far())
                longest = max(longest, clock() - begin)
            else:
                stopped = None
        except KeyboardInterrupt:
            stopped = "it was stopped"
        except RuntimeError as error:
            # After an illegal access, say, CUDA answers nothing more; what was measured before it stands.
            stopped = f"the device gave up: {_said(error)}"
    assert seen.result
    ok = {f"{cell.label} {time.backend}": time for cell in cells for time in cell.times if time.status == "ok"}
    conditions = judged(seen.result, {name: spread(time.us) for name, time in ok.items()})
    clocks = [cell.sm_clock_mhz for cell in cells if cell.sm_clock_mhz]
    if clocks and min(clocks) < (1 - FREQUENCY_LIMIT) * max(clocks):
        conditions.warnings.append(f"GPU clocks went from {min(clocks):.0f} to {max(clocks):.0f} MHz")
    return so_far(conditions)


def _said(error: Exception) -> str:
    """Without torch's advice on debugging, which follows on further lines."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass
class _Entry:
    """A GpuTime in the making."""

    backend: str
    status: Literal["ok", "void", "unavailable"] = "ok"
    reason: str | None = None
    error: float | None = None
    call: Call | None = None
    us: list[float] = field(default_factory=list)

    def time(self) -> GpuTime:
        graph = self.call.graph if self.call and self.status == "ok" else False
        return GpuTime(
            backend=self.backend, status=self.status, reason=self.reason, us=self.us, error=self.error, graph=graph
        )


class _Contest:
    """Measures cells; holds the layouts of one weight at a time."""

    def __init__(self, device: Device, backends: Sequence[Backend], capability: tuple[int, int], rounds: int) -> None:
        self.device = device
        self.backends = backends
        self.capability = capability
        self.rounds = rounds
        self._held: tuple[str, tuple[int, int]] | None = None

    def cell(self, dtype: str, shape: tuple[int, int], tokens: int) -> GpuCell:
        if self._held != (dtype, shape):
            self._weight = masked_weight(*shape, DTYPES[dtype], self.device.place)
            self._runs = {backend.name: self._prepared(backend, self._weight) for backend in self.backends}
            self._held = (dtype, shape)
        x = inputs(tokens, shape[1], DTYPES[dtype], self.device.place, seed=tokens)
        expected = truth(x, self._weight)
        entries = [self._entry(backend, self._runs[backend.name], x, expected) for backend in self.backends]
        contestants = [(entry, entry.call.run) for entry in entries if entry.call]
        order = random.Random(tokens)
        for _ in range(self.rounds):
            for entry, call in order.sample(contestants, len(contestants)):
                entry.us += self.device.timed(call, 1)
        return GpuCell(
            rows=shape[0],
            cols=shape[1],
            tokens=tokens,
            dtype=dtype,
            times=[entry.time() for entry in entries],
            sm_clock_mhz=self.device.facts().sm_clock_mhz,
        )

    def _prepared(self, backend: Backend, weight: Tensor) -> Run | str:
        """What multiplies by `weight`, or why nothing does."""
        rows, cols = weight.shape
        if reason := backend.unsupported_reason(weight.dtype, (rows, cols), self.capability):
            return reason
        try:
            return backend.prepare(weight)
        except Exception as error:
            return _said(error)

    def _entry(self, backend: Backend, run: Run | str, x: Tensor, expected: Tensor) -> _Entry:
        """Ready to be timed if the very call that would be timed, graph and all, is right."""
        name = backend.name
        if isinstance(run, str):
            return _Entry(name, "unavailable", run)
        try:
            call = self.device.captured(lambda: run(x))
            error, wrong = fault(call.run(), expected, x.dtype, backend.quantized)
        except Exception as raised:
            return _Entry(name, "unavailable", _said(raised))
        return _Entry(name, "void", wrong, error) if wrong else _Entry(name, error=error, call=call)

    def peaks(self, dtypes: Sequence[str]) -> GpuPeaks:
        """Medians of a few calls. What fails here is left out; the cells say why."""
        read, gemm = None, {}
        with contextlib.suppress(RuntimeError):
            memory = torch.ones(READ_BYTES // 4, device=self.device.place)
            read = READ_BYTES / self._median_us(memory.sum) / 1e3
        for dtype, dense in itertools.product(dtypes, [each for each in self.backends if each.name == DENSE]):
            with contextlib.suppress(RuntimeError):
                square = inputs(GEMM, GEMM, DTYPES[dtype], self.device.place)
                run = self._prepared(dense, square)
                if not isinstance(run, str):
                    gemm[dtype] = 2 * GEMM**3 / self._median_us(partial(run, square)) / 1e6
        return GpuPeaks(read_gb_per_s=read, gemm_tflop_per_s=gemm)

    def _median_us(self, run: Callable[[], object]) -> float:
        run()
        return statistics.median(self.device.timed(run, PEAK_CALLS))


def _checked(name: str, check: Callable[[], str]) -> GpuCheck:
    try:
        return GpuCheck(name=name, passed=True, detail=check())
    except MismatchError as error:
        return GpuCheck(name=name, passed=False, detail=str(error))
    except Exception as error:
        return GpuCheck(name=name, passed=False, detail=_said(error))


def markdown(result: GpuResult) -> str:
    """Facts, checks that failed, then every time in a row."""
    gpu = result.machine.gpu
    passed = sum(check.passed for check in result.checks)
    lines = [f"{gpu.name if gpu else 'unknown GPU'}: {passed} of {len(result.checks)} checks passed."]
    lines += [f"- FAILED {check.name}: {check.detail}" for check in result.checks if not check.passed]
    if result.peaks:
        rates = [f"{rate:.0f} TFLOP/s {dtype}" for dtype, rate in result.peaks.gemm_tflop_per_s.items()]
        read = result.peaks.read_gb_per_s
        lines += ["", "Measured peaks: " + ", ".join([*([f"reads {read:.0f} GB/s"] if read else []), *rates]) + "."]
    lines += [
        "",
        "| weight | dtype | M | backend | median us | over cublas | error |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for cell in result.cells:
        speedups = cell.speedups
        for entry in cell.times:
            head = f"| {cell.rows}x{cell.cols} | {cell.dtype} | {cell.tokens} | {entry.backend} "
            if entry.status == "ok":
                speedup = f"{speedups[entry.backend]:.2f}x" if entry.backend in speedups else ""
                launched = "" if entry.graph else " (no graph)"
                lines.append(f"{head}| {statistics.median(entry.us):.1f}{launched} | {speedup} | {entry.error:.1e} |")
            elif entry.status == "void":
                lines.append(f"{head}| void: {entry.reason} | | |")
    missing = {
        f"- {entry.backend}, {cell.dtype}: {entry.reason}": None
        for cell in result.cells
        for entry in cell.times
        if entry.status == "unavailable"
    }
    if missing:
        lines += ["", "Not available:", *missing]
    if result.left_out:
        lines += ["", f"{result.left_out} cells were left out: {result.stopped}."]
    for warning in result.conditions.warnings if result.conditions else ():
        lines += ["", f"Warning: {warning}."]
    lines += ["", f"Before each call {result.l2_flush_mb} MB were written, so that weights come from memory."]
    return "\n".join(lines)
