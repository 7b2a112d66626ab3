"""Results on disk: what measurements write. `result_files.py` reads those of any kind.

Every file is one JSON object with `schema_version` and `kind`. Fields that this version does not know are kept when a
file is loaded and saved again. The JSON schema is `runtime_bench/schema/result.json`.

Words: a *side* is the dense or the sparse model; a *case* is one workload (so many sequences at once, of such lengths);
a *round* runs every case once on both sides, one right after the other, so round i of a metric's `dense` and `sparse`
are a pair. `speedup` is always how many times better the sparse side is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from runtime_bench.conditions import Conditions
from runtime_bench.machine import Machine
from runtime_bench.roofline import Peaks
from runtime_bench.statistics import CONFIDENCE, Interval, ratio_interval, ratios
from runtime_bench.stored import Stored
from swiftprune.errors import OutputError, ResultError

SCHEMA_VERSION = 1
R = TypeVar("R")
SIDES: tuple[Literal["dense"], Literal["sparse"]] = ("dense", "sparse")


class Metric(Stored):
    """One figure of a case, for every round of each side."""

    name: str
    """`ttft`, `tpot`, `itl_p50`, `itl_p95`, `itl_p99`, `tokens_per_s`, `latency`; `load`, `peak_memory`, `disk`."""
    unit: str
    lower_is_better: bool
    dense: list[float]
    sparse: list[float]
    bound: dict[str, float] = Field(default_factory=dict)
    """Of each side: the best this could be by the bandwidth and peak measured in this run, in the same unit."""

    @model_validator(mode="after")
    def _is_of_pairs(self) -> Self:
        if not self.dense or len(self.dense) != len(self.sparse):
            raise ValueError(f"{self.name}: {len(self.dense)} dense and {len(self.sparse)} sparse values are no pairs")
        if not all(0 < value < math.inf for value in (*self.dense, *self.sparse)):
            raise ValueError(f"{self.name}: values must be positive and finite")
        return self

    @property
    def speedups(self) -> list[float]:
        """Of each round."""
        return ratios(self.dense, self.sparse, lower_is_better=self.lower_is_better)

    def speedup(self, confidence: float = CONFIDENCE) -> Interval:
        """Median over rounds, with its bootstrap interval."""
        return ratio_interval(self.speedups, confidence)


class Case(Stored):
    """One workload. A void case has no metrics: a number that cannot be trusted is not written down."""

    workload: Literal["batch", "serve", "latency", "throughput"]
    """`batch`: sequences decoded together in this process; the others are vLLM's bench commands."""
    concurrency: int
    """Sequences: the batch size, or how many requests the clients keep open."""
    prompt_tokens: int
    new_tokens: int
    void: str | None = None
    """Why nothing here may be used; None when all is well."""
    metrics: list[Metric] = Field(default_factory=list)
    itl_ms: dict[str, list[float]] = Field(default_factory=dict)
    """Inter-token latencies of all rounds of each side, for the picture of their distribution; batch and serve only."""

    @model_validator(mode="after")
    def _void_has_no_figures(self) -> Self:
        if self.void is not None and (self.metrics or self.itl_ms):
            raise ValueError("a void case has no figures")
        return self

    @property
    def label(self) -> str:
        return f"{self.workload}, {self.concurrency} at once, {self.prompt_tokens} in, {self.new_tokens} out"

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    @property
    def decoding(self) -> Metric | None:
        """What tells most of decoding: time per token, or what a workload has instead. None when void."""
        return self.metric("tpot") or self.metric("latency") or self.metric("tokens_per_s")


class Check(Stored):
    """Greedy tokens of the sparse side against its own weights unpacked, computed densely in fp32 by transformers.

    Token i is right when the reference, given the same tokens before it, ranks it first, or within `tolerance` of the
    first (rounding may swap two that close).
    """

    tokens: int
    equal: int
    """How many the reference ranks first."""
    largest_gap: float
    """The most that a token's log probability was below the first's."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.tokens > 0 and self.largest_gap <= self.tolerance


class SideFacts(Stored):
    """One of the two checkpoints as it ran."""

    name: str
    disk_bytes: int
    linears: dict[str, int]
    """Linears of the decoder blocks by the backend that ran them, as the run itself reported."""
    matrix_bytes: int
    """Of the weights that a decode step reads: linears and the head, as stored."""


class Quality(Stored):
    """One figure of quality, for both sides."""

    name: str
    """`perplexity`, or an lm-evaluation-harness task and metric."""
    source: str
    """Of the text or task."""
    lower_is_better: bool
    dense: float
    sparse: float
    tokens: int | None = None


class Result(Stored):
    """What all files have in common."""

    schema_version: int = SCHEMA_VERSION
    machine: Machine
    conditions: Conditions | None = None
    command: str = ""
    """What to type to measure it again."""


class RunResult(Result):
    """`swiftprune-bench run`: a sparse model beside a dense one, end to end, in one engine."""

    kind: Literal["run"] = "run"
    engine: str
    """`transformers`, `onnxruntime`, `genai` or `vllm`."""
    engine_version: str
    model: str
    dtype: str
    threads: int
    rounds: int
    starts: int
    """Times that both sides were loaded anew; rounds are shared out among them."""
    dense_linears: str
    """What ran the linears that are dense: `torch`, `onednn` (prepacked weights), or the engine's own way."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables that the engine was started with."""
    dense: SideFacts
    sparse: SideFacts
    check: Check | None
    peaks: Peaks | None
    load: list[Metric]
    """`load`, `peak_memory` and `disk`, of whole models."""
    cases: list[Case]
    quality: list[Quality] = Field(default_factory=list)


def read(path: Path, kind: TypeAdapter[R]) -> R:
    """The result in `path`. Raises ResultError, naming the file and what is wrong, when it is none of that `kind`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path}: not JSON: {error}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise ResultError(f"{path}: no schema_version: not a result of swiftprune-bench, or older than 0.1")
    if version > SCHEMA_VERSION:
        raise ResultError(
            f"{path}: schema version {version}, but this swiftprune reads up to {SCHEMA_VERSION}; upgrade swiftprune"
        )
    try:
        return kind.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResultError(f"{path}: {where}: {first['msg']} ({error.error_count()} faults in all)") from None


def save(result: BaseModel, path: Path) -> None:
    write_text(path, result.model_dump_json(indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Aside first and then renamed, so that a file is whole or absent. Raises OutputError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
