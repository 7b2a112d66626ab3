"""A model in a process of its own, so that its memory, its threads and its failures are its own too."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils.logging import disable_progress_bar

from runtime_bench.engines import Job, Loaded, Options, Round, Scores, figures
from runtime_bench.engines.memory import peak_bytes
from swiftprune.errors import SwiftpruneError

_PATIENCE_SECONDS = 20


class Model(Protocol):
    """What `load(folder, options)` of an engine's module returns. Those that `rivals` takes also have `score`."""

    engine_version: str
    linears: dict[str, int]

    def generate(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[], None]) -> list[list[int]]:
        """Greedy answers, all sequences in step. Calls `arrived` when each next token of all of them is there."""


class Worker(AbstractContextManager["Worker"]):
    """See `engines.EngineSession`. The process ends with the `with` statement. `engine` names a module of `engines`."""

    loaded: Loaded

    def __init__(self, engine: str, folder: Path, options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._name = f"{folder} in {engine}"
        self._process = context.Process(target=_work, args=(theirs, engine, folder, options), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        self.loaded = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(_PATIENCE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        answers: list[list[int]] = self._ask("tokens", prompts, new_tokens)
        return answers

    def run(self, job: Job, prompts: list[list[int]]) -> Round:
        arrivals: list[float] = self._ask("arrivals", prompts, job.new_tokens)
        return figures(arrivals, job.concurrency)

    def score(self, tokens: list[int]) -> Scores:
        """Of `tokens`, read at once."""
        found: Scores = self._ask("score", tokens)
        return found

    def peak_memory_bytes(self) -> int:
        peak: int = self._ask("peak_memory_bytes")
        return peak

    def _ask(self, question: str, *arguments: Any) -> Any:
        with contextlib.suppress(ConnectionError):  # reading the answer says what became of the process
            self._connection.send((question, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            memory = "; was there enough memory?" if code == -signal.SIGKILL else ""
            raise RuntimeError(f"{self._name}: its process {how}{memory}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(connection: Connection, engine: str, folder: Path, options: Options) -> None:
    """In the new process: loads, then answers until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    disable_progress_bar()  # the parent shows where it is
    torch.set_num_threads(options.threads)
    module = importlib.import_module(f"runtime_bench.engines.{engine}_engine")
    try:
        start = time.perf_counter()
        model: Model = module.load(folder, options)
        seconds = time.perf_counter() - start
        connection.send(Loaded(model.engine_version, seconds, model.linears))
        while True:
            question, arguments = connection.recv()
            connection.send(_ANSWERS[question](model, *arguments))
    except EOFError:
        pass
    except SwiftpruneError as error:
        connection.send(error)
    except Exception as error:
        connection.send(RuntimeError(f"{folder} in {engine}: {error}\n{traceback.format_exc()}"))


def _tokens(model: Model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    return model.generate(prompts, new_tokens, lambda: None)


def _arrivals(model: Model, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Seconds from the call to each token."""
    arrivals: list[float] = []
    start = time.perf_counter()
    model.generate(prompts, new_tokens, lambda: arrivals.append(time.perf_counter() - start))
    if len(arrivals) != new_tokens:
        raise RuntimeError(f"{len(arrivals)} tokens came instead of {new_tokens}")
    return arrivals


def _score(model: Any, tokens: list[int]) -> Scores:
    found: Scores = model.score(tokens)
    return found


def _peak_memory_bytes(model: Model) -> int:
    return peak_bytes()


_ANSWERS: dict[str, Callable[..., Any]] = {
    "tokens": _tokens,
    "arrivals": _arrivals,
    "score": _score,
    "peak_memory_bytes": _peak_memory_bytes,
}
