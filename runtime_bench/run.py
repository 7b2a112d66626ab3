"""A sparse checkpoint beside a dense one, end to end, in one engine: `swiftprune-bench run`.

Both sides stay loaded, each in processes of its own. In every round each case runs on both, one right after the other;
the order of cases and of sides is drawn afresh, so that a slow spell of the machine hits both alike. Rounds are shared
out among `starts`, each of which loads both sides anew. Answers are checked before anything is timed.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from transformers import AutoConfig

from exporters import export
from exporters.onnx.decoder import build_decoder
from runtime_bench import check, conditions, demo_data, gpu, known_models, onednn, roofline
from runtime_bench.engines import (
    ONNX_ENGINES,
    UNITS,
    VLLM_WORKLOADS,
    Engine,
    EngineSession,
    Job,
    Options,
    Round,
    Workload,
    contender,
)
from runtime_bench.engines.vllm_engine import ENVIRONMENT
from runtime_bench.machine import PACKAGES, this_machine
from runtime_bench.results import SIDES, Case, Check, Metric, RunResult, SideFacts
from runtime_bench.statistics import spread
from swiftprune.config import PruneSettings
from swiftprune.errors import SettingsError
from swiftprune.kernels import dispatch
from swiftprune.progress import ProgressCallback, no_progress

_T = TypeVar("_T")
CHECK_TOKENS = 16
CHECK_PROMPTS = 2
DTYPES = tuple(check.TOLERANCE)


@dataclass(frozen=True)
class RunSettings:
    """What to measure. Every combination of `concurrency`, `prompt_tokens` and `new_tokens` is a case."""

    engine: Engine = "transformers"
    workload: Workload = "batch"
    concurrency: Sequence[int] = (1,)
    prompt_tokens: Sequence[int] = (64,)
    new_tokens: Sequence[int] = (32,)
    rounds: int = 10
    starts: int = 2
    threads: int = field(default_factory=torch.get_num_threads)
    dtype: str = "bfloat16"
    dense_linears: Literal["torch", "onednn"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What transformers runs on; `auto` is a GPU where there is one."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.engine == "vllm") != (self.workload in VLLM_WORKLOADS):
            known = ", ".join(VLLM_WORKLOADS) if self.engine == "vllm" else "batch"
            raise SettingsError(f"--engine {self.engine} has no workload {self.workload!r}; it has: {known}")
        if self.dtype not in DTYPES:
            raise SettingsError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.engine in ONNX_ENGINES and self.dtype != "float32":
            raise SettingsError("ONNX Runtime computes in float32 on CPUs; the type of packed values is the file's own")
        if self.device == "cuda":
            gpu.require()
        if self.device != "auto" and self.engine != "transformers":
            raise SettingsError(f"--device is for --engine transformers; {self.engine} chooses by itself")
        if self.dense_linears == "onednn" and self.on_gpu:
            raise SettingsError("--dense-linears onednn is for CPUs; add --device cpu")
        if self.dense_linears == "onednn" and self.engine != "transformers":
            raise SettingsError("--dense-linears onednn is for --engine transformers; other engines have their own")
        if self.dense_linears == "onednn" and not onednn.takes(getattr(torch, self.dtype)):
            raise SettingsError(
                f"--dense-linears onednn: oneDNN cannot lay out {self.dtype} weights on this CPU; "
                "take --dtype float32, or --dense-linears torch"
            )
        if min(self.new_tokens) < 2:
            raise SettingsError("--new-tokens must be 2 or more: the time between tokens is what is measured")
        if not 1 <= self.starts <= self.rounds:
            raise SettingsError(f"--starts must be between 1 and --rounds ({self.rounds}), not {self.starts}")

    @property
    def on_gpu(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self.engine not in ONNX_ENGINES and self.device != "cpu" and torch.cuda.is_available()

    @property
    def jobs(self) -> list[Job]:
        return [
            Job(self.workload, *lengths)
            for lengths in itertools.product(self.concurrency, self.prompt_tokens, self.new_tokens)
        ]

    @property
    def options(self) -> Options:
        longest = max(self.prompt_tokens) + max(self.new_tokens)
        device = "cuda" if self.on_gpu else "cpu"
        return Options(self.dtype, self.threads, self.dense_linears, max(longest, CHECK_TOKENS * 2), device)


@dataclass(frozen=True)
class Found:
    """What there is to measure of one model."""

    sides: dict[str, Path]
    reference: Path
    """The sparse weights as transformers loads them."""
    name: str


def find(
    model: str,
    folder: Path,
    engine: Engine = "transformers",
    dtype: str = "bfloat16",
    progress: ProgressCallback = no_progress,
) -> Found:
    """Both sides of one of `known_models.NAMES`, made under `folder` on first use. Raises SettingsError for others.

    The demo model is pruned by SparseGPT on the demo text. The others have random weights, so they are pruned without
    calibration: speed does not depend on which weights are kept. For ONNX Runtime both are exported, and `dtype` is
    that of the packed values: it computes in float32.
    """
    source = known_models.fetch(model, folder, progress)
    pruning = PruneSettings(method="swiftprune-data-free", calibration="none")
    if model == known_models.DEMO_MODEL:
        pruning = PruneSettings(method="sparsegpt", calibration=str(demo_data.fetch(folder, progress).calibration))
    name = f"{source.name}-2of4-{pruning.method}"
    if engine not in ONNX_ENGINES:
        if not (out := folder / name).exists():
            export(source, out, pruning, progress=progress)
        return Found({"dense": source, "sparse": out}, out, model)
    sides = {"dense": folder / f"{source.name}-onnx", "sparse": folder / f"{name}-onnx-{dtype}"}
    if not sides["dense"].exists():
        _export_dense(source, sides["dense"], progress)
    if not (pruned := folder / f"{name}-dense").exists():
        export(source, pruned, pruning, target="dense", progress=progress)
    if not sides["sparse"].exists():
        # Where two of four are zero already, magnitude keeps the other two: these very weights, in another type.
        keep = PruneSettings.model_validate({"method": "magnitude", "calibration": "none", "dtype": dtype})
        export(pruned, sides["sparse"], keep, target="onnx", progress=progress)
    return Found(sides, pruned, f"{model}-{dtype}-values")


def _export_dense(source: Path, out: Path, progress: ProgressCallback) -> None:
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    build_decoder(source, partial, progress=progress)
    shutil.copy(source / "config.json", partial)
    partial.rename(out)


def measure(
    sides: dict[str, Path],
    settings: RunSettings,
    *,
    name: str = "",
    work: Path | None = None,
    reference: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> RunResult:
    """Measures the checkpoints `sides["dense"]` and `sides["sparse"]`.

    `reference` holds the sparse side's weights in a form that transformers loads; default: the sparse side itself.
    Logs of engines go into `work`. Ctrl-C after at least one round ends the run with the rounds there are.

    Raises SettingsError when an engine is not installed, CheckpointError for a damaged checkpoint and RuntimeError when
    an engine fails.
    """
    for side in SIDES:
        if not (sides[side] / "config.json").exists():
            raise SettingsError(f"{sides[side]}: no config.json: not a checkpoint's folder")
    with tempfile.TemporaryDirectory() as temporary, conditions.watch() as seen:
        run = _Run(sides, settings, work or Path(temporary), reference or sides["sparse"], progress)
        run.measure()
    assert seen.result
    cases = run.cases()
    seen.result = conditions.judged(
        seen.result,
        {
            f"{side} {metric.name} ({case.label})": spread(values)
            for case in cases
            if (metric := case.decoding)
            for side, values in (("dense", metric.dense), ("sparse", metric.sparse))
        },
    )
    seen.result.warnings += run.notes
    device = gpu.facts() if settings.on_gpu else None
    return RunResult(
        machine=this_machine((*PACKAGES, settings.engine), device).model_copy(update={"threads": settings.threads}),
        environment={name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
        if settings.engine == "vllm"
        else {},
        conditions=seen.result,
        engine=settings.engine,
        engine_version=run.engine_version,
        model=name or sides["dense"].resolve().name,
        dtype=settings.dtype,
        threads=settings.threads,
        rounds=run.rounds,
        starts=settings.starts,
        dense_linears=settings.dense_linears if settings.engine == "transformers" else "engine",
        dense=run.facts("dense"),
        sparse=run.facts("sparse"),
        check=run.check,
        peaks=run.peaks,
        load=run.load(),
        cases=cases,
    )


class _Run:
    """Collects what one call of `measure` sees."""

    def __init__(
        self, sides: dict[str, Path], settings: RunSettings, work: Path, reference: Path, progress: ProgressCallback
    ) -> None:
        self.engine_version = ""
        self.check: Check | None = None
        self.peaks: roofline.Peaks | None = None
        self.rounds = 0
        self.notes: list[str] = []
        self._sides, self._settings, self._work, self._reference = sides, settings, work, reference
        self._progress = progress
        self._random = random.Random(settings.seed)
        dtype: torch.dtype = getattr(torch, settings.dtype)
        config = AutoConfig.from_pretrained(sides["sparse"]).get_text_config()
        self._vocabulary = int(config.vocab_size)
        # Other engines turn the values into the type that they compute in.
        packed_dtype: torch.dtype = config.dtype if settings.engine in ONNX_ENGINES else dtype
        self._matrices: dict[str, roofline.Matrices] = {
            side: roofline.Matrices.of(sides[side], dtype, packed_dtype) for side in SIDES
        }
        self._linears: dict[str, dict[str, int]] = {}
        self._loads: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ("load", "peak_memory")}
        self._done: dict[Job, dict[str, list[Round]]] = {job: {side: [] for side in SIDES} for job in settings.jobs}

    def measure(self) -> None:
        settings = self._settings
        share = -(-settings.rounds // settings.starts)
        try:
            for start in range(settings.starts):
                self._note_peaks()
                self._start(min(share, settings.rounds - start * share))
            self._note_peaks()
        except KeyboardInterrupt:
            if not self.rounds:
                raise
            self.notes.append(f"stopped after {self.rounds} of {settings.rounds} rounds")
            for sides in self._done.values():
                for side in SIDES:
                    del sides[side][self.rounds :]

    def _start(self, rounds: int) -> None:
        """Loads both sides, runs so many rounds, and lets go of them."""
        with ExitStack() as stack:
            contenders: dict[str, EngineSession] = {}
            for side in self._shuffled(SIDES):
                self._progress(f"load the {side} side", 0, 1)
                contenders[side] = stack.enter_context(
                    contender(self._settings.engine, self._sides[side], self._settings.options, self._work, side)
                )
                self._note_loaded(side, contenders[side])
                self._progress(f"load the {side} side", 1, 1)
            if self.check is None:
                self._check(contenders["sparse"])
            if self._void() is None:
                self._warm_up(contenders)
                for _ in range(rounds):
                    self._round(contenders)
            for side in SIDES:
                if peak := contenders[side].peak_memory_bytes():
                    self._loads["peak_memory"][side].append(peak / 1e6)

    def _round(self, contenders: dict[str, EngineSession]) -> None:
        jobs = self._shuffled(self._settings.jobs)
        for index, job in enumerate(jobs):
            prompts = self._prompts(job)
            for side in self._shuffled(SIDES):
                self._done[job][side].append(contenders[side].run(job, prompts))
            self._progress("rounds", self.rounds + (index + 1) / len(jobs), self._settings.rounds)
        self.rounds += 1

    def _warm_up(self, contenders: dict[str, EngineSession]) -> None:
        if self._settings.engine == "vllm":  # its commands warm up by themselves
            return
        for job, side in itertools.product(self._settings.jobs, SIDES):
            contenders[side].run(Job(job.workload, job.concurrency, job.prompt_tokens, 3), self._prompts(job))

    def _check(self, sparse: EngineSession) -> None:
        self._progress("check the answers", 0, 1)
        length = min(self._settings.prompt_tokens)
        prompts = self._prompts(Job("batch", CHECK_PROMPTS, length, CHECK_TOKENS))
        answers = sparse.tokens(prompts, CHECK_TOKENS)
        self.check = check.against_reference(self._reference, prompts, answers, self._settings.dtype)
        self._progress("check the answers", 1, 1)

    def _prompts(self, job: Job) -> list[list[int]]:
        return [
            [self._random.randrange(self._vocabulary) for _ in range(job.prompt_tokens)] for _ in range(job.concurrency)
        ]

    def _shuffled(self, items: Sequence[_T]) -> list[_T]:
        return self._random.sample(items, len(items))

    def _note_loaded(self, side: str, loaded: EngineSession) -> None:
        facts = loaded.loaded
        self.engine_version = facts.engine_version
        self._loads["load"][side].append(facts.load_seconds)
        if self._linears.setdefault(side, facts.linears) != facts.linears:
            raise RuntimeError(f"the {side} side ran on {self._linears[side]} and then on {facts.linears}")

    def _note_peaks(self) -> None:
        if self._settings.on_gpu:  # which these peaks are not of
            return
        seen = roofline.measure(getattr(torch, self._settings.dtype), self._settings.threads)
        self.peaks = seen if self.peaks is None else roofline.best(self.peaks, seen)

    def _void(self) -> str | None:
        """Why no time of this run may be used."""
        backends = {name for name in self._linears["sparse"] if name != dispatch.DENSE}
        if not backends:
            return "no packed linear ran in the sparse side"
        if slow := dispatch.SLOW & backends:
            return f"the backend {min(slow)!r} ran, which unpacks and multiplies densely: no kernel fits here"
        if self.check is not None and not self.check.passed:
            return (
                f"wrong answers: a token was {self.check.largest_gap:.3g} less likely than the reference's, "
                f"more than {self.check.tolerance:g}"
            )
        return None

    def facts(self, side: str) -> SideFacts:
        folder = self._sides[side]
        return SideFacts(
            name=folder.resolve().name,
            disk_bytes=disk_bytes(folder),
            linears=self._linears[side],
            matrix_bytes=self._matrices[side].nbytes,
        )

    def load(self) -> list[Metric]:
        disk: dict[str, list[float]] = {side: [disk_bytes(self._sides[side]) / 1e6] for side in SIDES}
        return [
            _metric(name, values["dense"], values["sparse"])
            for name, values in (*self._loads.items(), ("disk", disk))
            if values["dense"] and values["sparse"]
        ]

    def cases(self) -> list[Case]:
        return [self._case(job, rounds) for job, rounds in self._done.items()]

    def _case(self, job: Job, rounds: dict[str, list[Round]]) -> Case:
        case = Case(
            workload=job.workload,
            concurrency=job.concurrency,
            prompt_tokens=job.prompt_tokens,
            new_tokens=job.new_tokens,
            void=self._void(),
        )
        if case.void:
            return case
        for name in rounds["dense"][0].figures:
            metric = _metric(name, *([done.figures[name] for done in rounds[side]] for side in SIDES))
            metric.bound = self._bound(name, job)
            case.metrics.append(metric)
        case.itl_ms = {side: [gap for done in rounds[side] for gap in done.itl_ms] for side in SIDES}
        return case

    def _bound(self, name: str, job: Job) -> dict[str, float]:
        """By `roofline`, of the metrics that it can say something of."""
        if self.peaks is None or job.workload == "serve":  # requests of a server overlap: no closed form
            return {}
        bounds: dict[str, float] = {}
        for side in SIDES:
            prompt = self.peaks.seconds(self._matrices[side], job.concurrency * job.prompt_tokens, job.concurrency)
            step = self.peaks.seconds(self._matrices[side], job.concurrency, job.concurrency)
            whole = prompt + step * (job.new_tokens - 1)
            known = {
                "ttft": 1e3 * prompt,
                "tpot": 1e3 * step,
                "latency": whole,
                "tokens_per_s": job.concurrency * job.new_tokens / whole,
            }
            if name in known and job.workload != "throughput":
                bounds[side] = known[name]
        return bounds


def _metric(name: str, dense: list[float], sparse: list[float]) -> Metric:
    unit, lower_is_better = UNITS[name]
    return Metric(name=name, unit=unit, lower_is_better=lower_is_better, dense=dense, sparse=sparse)


def disk_bytes(folder: Path) -> int:
    """Of the files that hold weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".onnx", ".data"))
