"""How fast vLLM serves a packed checkpoint, beside the same pruned weights stored dense.

vLLM's own benchmark commands do the measuring: `vllm bench serve` against two servers that are up side by side, and
`vllm bench latency` and `throughput`, which load the model for every run. Runs of the two sides alternate, and the side
that goes first changes with every pair.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from exporters import Target, export
from runtime_bench import decode, demo_data, known_models
from runtime_bench.machine import Machine, this_machine
from swiftprune.errors import SettingsError
from swiftprune.pruning.pipeline import PruneSettings
from swiftprune.pruning.progress import Progress, silent
from swiftprune.sparse24 import dispatch

Command = Literal["serve", "latency", "throughput"]
COMMANDS: tuple[Command, ...] = ("serve", "latency", "throughput")
SIDES = ("dense", "packed")
_TARGETS: dict[str, Target] = {"dense": "dense", "packed": "packed"}
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # vLLM would leave a core to itself
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
START_SECONDS = 600
_BACKEND_LINE = re.compile(r"swiftprune: (\d+) 2:4 linears run on the backend (\w+)")


class Row(BaseModel):
    """One figure over all pairs of runs, in the order of measuring."""

    command: Command
    concurrency: int
    """Requests at a time; the batch size of `latency`."""
    figure: str
    lower_is_better: bool
    dense: list[float]
    packed: list[float]

    @property
    def speedups(self) -> list[float]:
        """How much better the packed side was, for each pair."""
        ratios = [dense / packed for dense, packed in zip(self.dense, self.packed, strict=True)]
        return ratios if self.lower_is_better else [1 / ratio for ratio in ratios]

    @property
    def speedup(self) -> float:
        return statistics.median(self.speedups)


class VllmBench(BaseModel):
    machine: Machine
    model: str
    dtype: str
    vllm: str
    environment: dict[str, str]
    input_len: int
    output_len: int
    pairs: int
    backend: str
    """What served the packed linears, from vLLM's own log."""
    packed_linears: int
    same_tokens: int | None
    """Greedy tokens of one completion that agree before the first that does not; None without `serve`."""
    rows: list[Row]


_FIGURES: dict[Command, dict[str, bool]] = {
    "serve": {"mean_ttft_ms": True, "median_tpot_ms": True, "p99_itl_ms": True, "output_throughput": False},
    "latency": {"avg_latency": True},
    "throughput": {"tokens_per_second": False},
}
"""What is taken from the JSON of each command, and whether lower is better."""


def find(model: str, folder: Path, progress: Progress = silent) -> dict[str, Path]:
    """Folders of the dense and the packed side, made under `folder` when they are not there yet.

    `model` is the folder of a checkpoint that is not pruned, or one of `known_models.NAMES`.
    """
    source = Path(model) if Path(model).is_dir() else known_models.fetch(model, folder, progress)
    if not list(source.glob("tokenizer*")):  # vLLM's benchmarks need one; any will do
        for path in demo_data.fetch(folder, progress).model.glob("tokenizer*"):
            shutil.copy(path, source)
    sides = {side: folder / f"{source.name}-vllm-{side}" for side in SIDES}
    for side, out in sides.items():
        if not out.exists():
            export(source, out, PruneSettings(calibration="none"), target=_TARGETS[side], progress=progress)
    return sides


def measure(
    folders: Mapping[str, Path], work: Path, *, commands: Sequence[Command] = COMMANDS,
    concurrency: Sequence[int] = (1, 8), input_len: int = 64, output_len: int = 48, pairs: int = 5,
    dtype: str = "bfloat16", progress: Progress = silent,
) -> VllmBench:  # fmt: skip
    """Runs `commands` on both sides (see `find`), `pairs` times each. Logs and raw results of vLLM go into `work`.

    Raises SettingsError without vLLM, and RuntimeError when a run fails or when the packed linears of a run were not
    served by a kernel: it is void then, never a number.
    """
    vllm = Path(sys.executable).parent / "vllm"
    if not vllm.exists():
        raise SettingsError(f"{vllm}: vLLM is not installed here; `make vllm-env` sets up .venv-vllm with it")
    work.mkdir(parents=True, exist_ok=True)
    sides = [_Side(name, folders[name], vllm, work, dtype, input_len, output_len) for name in SIDES]
    rows: list[Row] = []
    same: int | None = None
    for command in commands:
        with contextlib.ExitStack() as stack:
            if command == "serve":
                for side in sides:
                    stack.enter_context(side.server())
                same = decode.agreement(*(side.completion() for side in sides))
            for users in concurrency:
                rows += _alternate(command, users, sides, pairs, progress)
    packed = sides[SIDES.index("packed")]
    backend, linears = packed.served_by
    return VllmBench(
        machine=this_machine(), model=packed.folder.name.removesuffix("-vllm-packed"), dtype=dtype,
        vllm=importlib.metadata.version("vllm"), environment=ENVIRONMENT, input_len=input_len, output_len=output_len,
        pairs=pairs, backend=backend, packed_linears=linears, same_tokens=same, rows=rows,
    )  # fmt: skip


def _alternate(command: Command, users: int, sides: Sequence[_Side], pairs: int, progress: Progress) -> list[Row]:
    results: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for pair in range(pairs):
        progress(f"{command}, {users} at a time", pair, pairs)
        for side in sides if pair % 2 == 0 else reversed(sides):
            results[side.name].append(side.run(command, users))
    progress(f"{command}, {users} at a time", pairs, pairs)
    return [
        Row(
            command=command, concurrency=users, figure=figure, lower_is_better=lower_is_better,
            **{name: [result[figure] for result in runs] for name, runs in results.items()},
        )
        for figure, lower_is_better in _FIGURES[command].items()
    ]  # fmt: skip


class _Side:
    """One checkpoint in vLLM."""

    def __init__(
        self, name: str, folder: Path, vllm: Path, work: Path, dtype: str, input_len: int, output_len: int
    ) -> None:
        self.name = name
        self.folder = folder
        self.served_by = ("", 0)
        """Backend and number of packed linears, from the log of the last run."""
        self._vllm = vllm
        self._work = work
        self._model = ["--dtype", dtype, "--max-model-len", str(2 * (input_len + output_len))]
        self._lengths = (input_len, output_len)
        self._url = ""

    @contextlib.contextmanager
    def server(self) -> Iterator[None]:
        """`vllm serve`, up and answering."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        log = self._work / f"{self.name}-server.log"
        command = [str(self._vllm), "serve", str(self.folder), "--host", "127.0.0.1", "--port", str(port), *self._model]
        with open(log, "w") as out, subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
        ) as process:  # fmt: skip
            try:
                self._wait(process, log)
                self._check_backend(log)
                yield
            finally:
                process.send_signal(signal.SIGINT)

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {process.returncode}; see {log}")
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError),
                urllib.request.urlopen(f"{self._url}/health"),
            ):
                return
            time.sleep(1)
        raise RuntimeError(f"vllm serve did not answer within {START_SECONDS} s; see {log}")

    def completion(self) -> list[str]:
        """Greedy tokens after a fixed prompt."""
        request = {
            "model": str(self.folder), "prompt": list(range(100, 100 + self._lengths[0])), "temperature": 0,
            "max_tokens": self._lengths[1], "ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        call = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call) as answer:
            tokens: list[str] = json.load(answer)["choices"][0]["logprobs"]["tokens"]
        return tokens

    def run(self, command: Command, users: int) -> dict[str, float]:
        """One run of vLLM's benchmark `command` with so many requests at a time."""
        result, log = self._work / f"{self.name}-{command}.json", self._work / f"{self.name}-{command}.log"
        result.unlink(missing_ok=True)
        input_len, output_len = map(str, self._lengths)
        arguments: list[str]
        if command == "serve":
            arguments = [
                "--base-url", self._url, "--dataset-name", "random", "--random-input-len", input_len,
                "--random-output-len", output_len, "--num-prompts", str(4 * users), "--max-concurrency", str(users),
                "--ignore-eos", "--temperature", "0", "--num-warmups", str(users),
                "--percentile-metrics", "ttft,tpot,itl",
                "--save-result", "--result-dir", str(self._work), "--result-filename", result.name,
            ]  # fmt: skip
        elif command == "latency":
            arguments = [
                *self._model, "--input-len", input_len, "--output-len", output_len, "--batch-size", str(users),
                "--num-iters-warmup", "1", "--num-iters", "3", "--output-json", str(result),
            ]  # fmt: skip
        else:
            arguments = [
                *self._model, "--dataset-name", "random", "--input-len", input_len, "--output-len", output_len,
                "--num-prompts", str(4 * users), "--max-num-seqs", str(users), "--output-json", str(result),
            ]  # fmt: skip
        with open(log, "w") as out:
            done = subprocess.run(
                [self._vllm, "bench", command, "--model", self.folder, *arguments],
                stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT, check=False,
            )  # fmt: skip
        if done.returncode or not result.exists():
            raise RuntimeError(f"vllm bench {command} ended with {done.returncode} on {self.folder}; see {log}")
        if command != "serve":
            self._check_backend(log)
        figures: dict[str, float] = json.loads(result.read_text())
        return {figure: float(figures[figure]) for figure in _FIGURES[command]}

    def _check_backend(self, log: Path) -> None:
        if self.name != "packed":
            return
        found = _BACKEND_LINE.search(log.read_text())
        if not found or found[2] == dispatch.REFERENCE:
            raise RuntimeError(f"{self.folder}: no kernel served its packed linears, so nothing is measured; see {log}")
        self.served_by = (found[2], int(found[1]))


def markdown(bench: VllmBench) -> str:
    same = "" if bench.same_tokens is None else f", {bench.same_tokens} of {bench.output_len} greedy tokens the same"
    lines = [
        f"{bench.model}, {bench.dtype}, vLLM {bench.vllm}, {bench.packed_linears} linears on {bench.backend}, "
        f"{bench.input_len} tokens in and {bench.output_len} out, {bench.pairs} alternating pairs{same}",
        "",
        "| vllm bench | at a time | figure | dense | packed | speedup | of single pairs |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for row in bench.rows:
        low, high = min(row.speedups), max(row.speedups)
        lines.append(
            f"| {row.command} | {row.concurrency} | {row.figure} | {statistics.median(row.dense):.4g} "
            f"| {statistics.median(row.packed):.4g} | {row.speedup:.2f}x | {low:.2f}-{high:.2f} |"
        )
    return "\n".join(lines)
