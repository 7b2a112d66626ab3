"""The engines that `run` measures. Each gives a `EngineSession`: one checkpoint, loaded, ready to be timed."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from runtime_bench.statistics import quantile

Engine = Literal["transformers", "onnxruntime", "genai", "vllm"]
ONNX_ENGINES: tuple[Engine, ...] = ("onnxruntime", "genai")
"""ONNX Runtime by itself, and onnxruntime-genai, which keeps the cache where it is."""
Workload = Literal["batch", "serve", "latency", "throughput"]
VLLM_WORKLOADS: tuple[Workload, ...] = ("serve", "latency", "throughput")


@dataclass(frozen=True)
class Options:
    """How a checkpoint is loaded, alike on both sides."""

    dtype: str
    """`bfloat16`, `float16` or `float32`."""
    threads: int
    dense_linears: Literal["torch", "onednn"] = "torch"
    """What runs the linears that are dense, in transformers."""
    longest: int = 512
    """Tokens of the longest sequence, prompt and answer, that will come."""
    device: str = "cpu"
    """What transformers runs on, `cpu` or `cuda`; other engines choose by themselves."""


@dataclass(frozen=True)
class Job:
    """One workload: `concurrency` sequences, each a prompt of so many tokens and an answer of so many."""

    workload: Workload
    concurrency: int
    prompt_tokens: int
    new_tokens: int


@dataclass
class Loaded:
    """What an engine says of a model that it has just loaded."""

    engine_version: str
    load_seconds: float
    linears: dict[str, int]
    """Number of linears by the backend that runs them; `dense` are those that the checkpoint holds dense."""


@dataclass
class Round:
    """One run of a job."""

    figures: dict[str, float]
    """By the names of `results.Metric`, in the units of `UNITS`."""
    itl_ms: list[float] = field(default_factory=list)


@dataclass
class Scores:
    """Of a sequence that a model has read, for every token but the first."""

    loss: list[float]
    """Negative log-likelihood, nats."""
    gap: list[float]
    """How much less likely than the likeliest, in log probability."""


def scores(logits: Tensor, tokens: list[int]) -> Scores:
    """From the `logits` (T - 1, V) or (T, V) at each of T `tokens`."""
    each = torch.log_softmax(logits[: len(tokens) - 1].float(), dim=-1)
    chosen = each.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    return Scores((-chosen).tolist(), (each.max(dim=-1).values - chosen).tolist())


class EngineSession(Protocol):
    """A checkpoint in an engine."""

    loaded: Loaded

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy answers to `prompts`, all of one length."""

    def run(self, job: Job, prompts: list[list[int]]) -> Round:
        """Times one run of `job`. An engine that makes prompts of its own leaves `prompts` alone."""

    def peak_memory_bytes(self) -> int:
        """The most that its processes have held in memory."""


UNITS: dict[str, tuple[str, bool]] = {
    "ttft": ("ms", True),
    "tpot": ("ms", True),
    "itl_p50": ("ms", True),
    "itl_p95": ("ms", True),
    "itl_p99": ("ms", True),
    "tokens_per_s": ("tok/s", False),
    "latency": ("s", True),
    "load": ("s", True),
    "peak_memory": ("MB", True),
    "disk": ("MB", True),
}
"""Unit of each metric, and whether lower is better."""


def figures(arrivals: list[float], concurrency: int) -> Round:
    """Of sequences decoded in step: `arrivals` are the seconds from the request to each token of theirs."""
    gaps = [1e3 * (later - earlier) for earlier, later in itertools.pairwise(arrivals)]
    return Round(
        {
            "ttft": 1e3 * arrivals[0],
            "tpot": 1e3 * (arrivals[-1] - arrivals[0]) / len(gaps),
            **{f"itl_p{percent}": quantile(gaps, percent / 100) for percent in (50, 95, 99)},
            "tokens_per_s": concurrency * len(arrivals) / arrivals[-1],
        },
        [round(gap, 3) for gap in gaps],
    )


def contender(
    engine: Engine, folder: Path, options: Options, work: Path, name: str
) -> AbstractContextManager[EngineSession]:
    """Loads the checkpoint in `folder`. Logs go into `work`, under `name`.

    Raises SettingsError when the engine is not installed.
    """
    if engine == "vllm":
        from runtime_bench.engines.vllm_engine import Server

        return Server(folder, options, work, name)
    from runtime_bench.engines.worker import Worker

    return Worker(engine, folder, options)
