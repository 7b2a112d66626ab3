"""How fast single linear layers are: 2:4 kernels against the better of torch's and oneDNN's dense ones.

Every call takes the next of several copies of the weight, which together are larger than any cache, as the layers of a
model are. The contestants take turns within one process, on the same threads; a turn of few tokens is several
calls, as one layer of a model follows another.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from runtime_bench import onednn
from runtime_bench.conditions import judged, watch
from runtime_bench.machine import this_machine
from runtime_bench.measure import Timing, interleaved
from runtime_bench.results import Result
from runtime_bench.statistics import ratios
from runtime_bench.stored import Stored
from swiftprune.errors import SettingsError
from swiftprune.formats.spec import WeightSpec, find_quantized
from swiftprune.kernels import dispatch, native
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import pack, unpack
from swiftprune.progress import ProgressCallback, no_progress

SHAPES: dict[str, list[tuple[int, int]]] = {
    "llama-2-7b": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "llama-3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
    "llama-3.2-1b": [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)],
}
"""(outputs, inputs) of the linears of each model; query, key, value, gate and up apart."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}
"""The type that inputs and dense weights have, by what packed values are stored in."""
BYTE_BOUND = {name: WeightSpec((8, 8192), dtype, find_quantized(name)).compression for name, dtype in DTYPES.items()}
"""Dense bytes over packed bytes of a weight: the speedup when both only read it, at the same speed."""
ROTATED_BYTES = 512 << 20  # of dense weights, per contestant
TURN_BYTES = 256 << 20  # of dense weights, per turn, for up to TURN_TOKENS tokens and fewer for more
TURN_TOKENS = 2
SECONDS_PER_CELL = 2.5
ROUNDS = (5, 60)


_Weight = TypeVar("_Weight", Tensor, Linear24)


class CallTime(Stored):
    """Milliseconds of one call over `rounds` turns; `spread` is half the interquartile range over the median."""

    p20_ms: float
    median_ms: float
    spread: float
    rounds: int
    turns_ms: list[float] = Field(default_factory=list)
    """Of every turn, in order; absent from files written before they were kept."""

    @classmethod
    def of(cls, timing: Timing, calls: int) -> CallTime:
        """From the times of turns of so many calls."""
        return cls(
            p20_ms=1e3 * timing.quantile(0.2) / calls,
            median_ms=1e3 * timing.median / calls,
            spread=timing.spread,
            rounds=len(timing.seconds),
            turns_ms=[float(f"{1e3 * seconds / calls:.4g}") for seconds in timing.seconds],
        )


class Cell(Stored):
    """One shape, number of tokens and number of threads."""

    rows: int
    cols: int
    dtype: str
    tokens: int
    threads: int
    backend: str
    """The backend that ran, as the layer names it."""
    sparse: CallTime
    dense: dict[str, CallTime]
    packed_bytes: int
    read_gb_per_s: float
    """What this machine read from memory, on these threads, in turn with these calls."""

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.cols} {self.dtype}, M={self.tokens}, {self.threads} threads, {self.backend}"

    @property
    def speedups(self) -> list[float]:
        """Over the better dense contestant, turn by turn."""
        return ratios(self.dense[self.better_dense].turns_ms, self.sparse.turns_ms, lower_is_better=True)

    @property
    def better_dense(self) -> str:
        return min(self.dense, key=lambda name: self.dense[name].p20_ms)

    @property
    def speedup(self) -> float:
        """Of the 20th percentiles, over the better dense contestant."""
        return min(time.p20_ms for time in self.dense.values()) / self.sparse.p20_ms

    @property
    def median_speedup(self) -> float:
        return min(time.median_ms for time in self.dense.values()) / self.sparse.median_ms

    @property
    def packed_gb_per_s(self) -> float:
        return self.packed_bytes / self.sparse.p20_ms / 1e6

    @property
    def bandwidth_share(self) -> float:
        """Packed bytes per second over what this machine read from memory."""
        return self.packed_gb_per_s / self.read_gb_per_s

    @property
    def dense_gb_per_s(self) -> float:
        width = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return self.rows * self.cols * width / self.dense[self.better_dense].p20_ms / 1e6


class CallOverhead(Stored):
    """Microseconds of a call of an 8 x 8 layer, one token: what is not the product."""

    linear24_us: float
    operator_us: float
    """The same kernel through torch's dispatcher."""
    nn_linear_us: float


class LayersResult(Result):
    kind: Literal["layers"] = "layers"
    shares_torch_threads: bool
    rotated_mb: int
    overhead: CallOverhead
    cells: list[Cell]


def measure(
    shapes: Sequence[tuple[int, int]],
    *,
    tokens: Sequence[int] = TOKENS,
    threads: Sequence[int] = (1, 2),
    dtypes: Sequence[str] = ("bf16",),
    backend: str | None = None,
    seconds: float = SECONDS_PER_CELL,
    progress: ProgressCallback = no_progress,
) -> LayersResult:
    """Measures every combination. `seconds` is about what a cell may take.

    Raises SettingsError when `backend` cannot run here or when only `reference` can: it is not worth measuring.
    """
    chosen = {
        dtype: dispatch.linear_backend(DTYPES[dtype], backend, quantized=find_quantized(dtype)) for dtype in dtypes
    }
    if dispatch.SLOW & set(chosen.values()):
        raise SettingsError(
            f"the backend {dispatch.REFERENCE!r} multiplies dense weights and is not worth measuring; available: "
            f"{', '.join(dispatch.linear_backends(DTYPES[dtypes[0]])[:-1]) or 'none, as no native kernels were built'}"
        )
    before = torch.get_num_threads()
    cells: list[Cell] = []
    total = len(dtypes) * len(shapes) * len(tokens) * len(threads)
    memory = torch.empty(ROTATED_BYTES, dtype=torch.uint8).random_()
    try:
        with torch.inference_mode(), watch() as seen:
            for dtype, (rows, cols) in itertools.product(dtypes, shapes):
                weights = _Weights(rows, cols, dtype, chosen[dtype])
                for count, m in itertools.product(threads, tokens):
                    progress(f"{rows}x{cols} {dtype}", len(cells), total)
                    torch.set_num_threads(count)
                    cells.append(_cell(weights, dtype, m, count, memory, seconds))
                progress(f"{rows}x{cols} {dtype}", len(cells), total)
        torch.set_num_threads(1)
        overhead = call_overhead()
    finally:
        torch.set_num_threads(before)
    assert seen.result
    spreads = {f"{cell.rows}x{cell.cols} {cell.dtype} M={cell.tokens}": cell.sparse.spread for cell in cells}
    return LayersResult(
        machine=this_machine(),
        conditions=judged(seen.result, spreads),
        shares_torch_threads=native.SHARES_TORCH_THREADS,
        rotated_mb=ROTATED_BYTES >> 20,
        overhead=overhead,
        cells=cells,
    )


class _Weights:
    """Copies of one masked weight in the layout of each contestant."""

    def __init__(self, rows: int, cols: int, stored: str, backend: str) -> None:
        dtype = DTYPES[stored]
        self.shape = (rows, cols)
        self.dense = torch.randn(rows, cols).view(rows, cols // 4, 4)
        self.dense[..., torch.tensor([1, 3])] = 0
        self.dense = self.dense.view(rows, cols).mul_(cols**-0.5).to(dtype)
        copies = -(-ROTATED_BYTES // self.dense.nbytes)
        self.plain = [self.dense.clone() for _ in range(copies)]
        packed = pack(self.dense, values=find_quantized(stored))
        self.sparse = [Linear24.from_packed(packed, backend=backend, dtype=dtype) for _ in range(copies)]
        self.stored = unpack(packed).to(dtype)

    def prepacked(self, tokens: int) -> list[Tensor]:
        """In oneDNN's layout for so many tokens."""
        return [onednn.prepack(weight, tokens) for weight in self.plain]


def _cell(weights: _Weights, dtype: str, tokens: int, threads: int, memory: Tensor, seconds: float) -> Cell:
    x = torch.randn(tokens, weights.shape[1]).to(DTYPES[dtype])
    # Each contestant has weights of its own, so that none finds in the cache what another one has read.
    calls = max(1, TURN_BYTES * TURN_TOKENS // max(tokens, TURN_TOKENS) // weights.dense.nbytes)
    contestants: dict[str, Callable[[], Tensor]] = {
        "sparse": _turn(lambda layer: layer(x), weights.sparse, calls),
        "torch F.linear": _turn(lambda weight: F.linear(x, weight), weights.plain, calls),
    }
    if onednn.takes(weights.dense.dtype):
        contestants["oneDNN prepacked"] = _turn(
            lambda weight: onednn.linear(x, weight, None), weights.prepacked(tokens), calls
        )
    dense, sparse = F.linear(x, weights.dense), F.linear(x, weights.stored)
    for name, run in contestants.items():
        # Kernels for quantized values round inputs to 8 bits too.
        tolerance = 6e-2 if name == "sparse" and find_quantized(dtype) else 2e-2
        if not torch.allclose(run(), sparse if name == "sparse" else dense, rtol=tolerance, atol=tolerance):
            raise RuntimeError(f"{name} computes something else than torch's F.linear on {weights.shape} {dtype}")
    turns = {**contestants, "read": lambda: native.read_bandwidth_pass(memory)}
    once = interleaved(turns, rounds=1)
    rounds = round(seconds / sum(timing.median for timing in once.values()))
    times = interleaved(turns, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))
    read = times.pop("read")
    return Cell(
        rows=weights.shape[0],
        cols=weights.shape[1],
        dtype=dtype,
        tokens=tokens,
        threads=threads,
        backend=weights.sparse[0].backend,
        sparse=CallTime.of(times.pop("sparse"), calls),
        dense={name: CallTime.of(timing, calls) for name, timing in times.items()},
        packed_bytes=weights.sparse[0].get_buffer("tiled").nbytes,
        read_gb_per_s=memory.nbytes / read.quantile(0.2) / 1e9,
    )


def _turn(run: Callable[[_Weight], Tensor], weights: Sequence[_Weight], calls: int) -> Callable[[], Tensor]:
    copies = itertools.cycle(weights)

    def turn() -> Tensor:
        for _ in range(calls - 1):
            run(next(copies))
        return run(next(copies))

    return turn


def call_overhead(calls: int = 2000, rounds: int = 9) -> CallOverhead:
    """Medians over rounds of the mean time of a call."""
    dense = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    packed = pack(torch.tensor([[1.0, 0, 1, 0]]).repeat(8, 2).bfloat16())
    layer = Linear24.from_packed(packed)
    operator: Any = torch.ops.swiftprune.linear24
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    contestants: dict[str, Callable[[], object]] = {
        "linear24_us": lambda: layer(x),
        "operator_us": lambda: operator(x, [layer.get_buffer("tiled")], None, 8, layer.backend),
        "nn_linear_us": lambda: dense(x),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in contestants.items():
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return CallOverhead.model_validate({name: statistics.median(values) for name, values in times.items()})


def markdown(bench: LayersResult) -> str:
    """Every cell in a row, then speedups at a glance, then the cost of a call."""
    overhead = bench.overhead
    lines = [
        "| weight | dtype | M | threads | backend | dense ms | by | sparse ms | speedup | of medians | bytes allow "
        "| dense GB/s | packed GB/s | of read bandwidth |",
        "| --- | --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in bench.cells:
        best = cell.dense[cell.better_dense]
        lines.append(
            f"| {cell.rows}x{cell.cols} | {cell.dtype} | {cell.tokens} | {cell.threads} | {cell.backend} "
            f"| {best.p20_ms:.3f} | {cell.better_dense} | {cell.sparse.p20_ms:.3f} | {cell.speedup:.2f}x "
            f"| {cell.median_speedup:.2f}x | {BYTE_BOUND[cell.dtype]:.2f}x | {cell.dense_gb_per_s:.1f} "
            f"| {cell.packed_gb_per_s:.1f} | {cell.bandwidth_share:.0%} |"
        )
    lines += [
        "",
        "Times are 20th percentiles; M is the number of tokens. What exceeds the speedup that bytes allow is the dense "
        "kernel's own slack: it reads slower than memory could.",
        "",
        at_a_glance(bench),
        "",
        f"A call of an 8 x 8 layer costs {overhead.linear24_us:.1f} us (Linear24), {overhead.operator_us:.1f} us "
        f"(as an operator of torch), {overhead.nn_linear_us:.1f} us (nn.Linear).",
    ]
    return "\n".join(lines)


def short(dtype: str) -> str:
    """`bf16` for `bfloat16`. Raises SettingsError for types that no kernel has."""
    for name, known in DTYPES.items():
        if dtype in (name, str(known).removeprefix("torch.")):
            return name
    raise SettingsError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")


def at_a_glance(bench: LayersResult) -> str:
    """A table for each dtype and number of threads: weights down, tokens across, and how well one token is read."""
    tables = []
    groups = itertools.groupby(bench.cells, key=lambda cell: (cell.dtype, cell.rows, cell.cols, cell.threads))
    cells = {key: list(group) for key, group in groups}
    for dtype, threads in dict.fromkeys((dtype, threads) for dtype, _, _, threads in cells):
        lines: list[str] = []
        for row in (row for key, row in cells.items() if (key[0], key[3]) == (dtype, threads)):
            if not lines:
                head = [f"{dtype}, {threads} thread{'s' * (threads > 1)}", *(f"M={cell.tokens}" for cell in row)]
                lines += [
                    f"| {' | '.join(head)} | bandwidth, {head[1]} |",
                    f"| --- |{' ---: |' * (len(row) + 1)}",
                ]
            speedups = " | ".join(f"{cell.speedup:.2f}x" for cell in row)
            lines.append(f"| {row[0].rows}x{row[0].cols} | {speedups} | {row[0].bandwidth_share:.0%} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
