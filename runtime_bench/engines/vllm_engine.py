"""vLLM, driven by its own commands: `vllm serve` with `vllm bench serve`, or `vllm bench latency` and `throughput`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from runtime_bench.engines import Job, Loaded, Options, Round
from runtime_bench.engines.memory import peak_bytes
from runtime_bench.statistics import quantile
from swiftprune.errors import SettingsError

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # vLLM would leave a core to itself
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What vLLM is started with; what the caller's environment says goes before it."""
REQUESTS_FOR_EACH = 4
"""Requests of `serve` and `throughput` for each that is open at once."""
START_SECONDS = 900
STOP_SECONDS = 60
_BACKEND_LINE = re.compile(r"swiftprune: (\d+) 2:4 linears run on the backend (\w+)")


def installed() -> Path:
    """The command `vllm` beside this interpreter. Raises SettingsError without it."""
    command = Path(sys.executable).parent / "vllm"
    if not command.exists():
        raise SettingsError(
            f"{command}: vLLM is not installed beside swiftprune; `make vllm-env` sets up .venv-vllm with it, "
            "whose swiftprune-bench then measures it"
        )
    return command


class Server(AbstractContextManager["Server"]):
    """See `engines.EngineSession`. The server runs until a workload comes that loads the model for itself."""

    loaded: Loaded

    def __init__(self, folder: Path, options: Options, work: Path, name: str) -> None:
        self._vllm = installed()
        self._folder = folder
        self._work = work
        self._name = name
        self._model = [
            "--dtype",
            options.dtype,
            "--max-model-len",
            str(2 * options.longest),
            "--generation-config",
            "vllm",  # not the model's own, whose penalties would change the answers
        ]
        self._url = ""
        self._serving = contextlib.ExitStack()
        self._peak = 0
        work.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Server:
        start = time.monotonic()
        log = self._work / f"{self._name}-server.log"
        self._serving.enter_context(self._server(log))
        seconds = time.monotonic() - start
        self.loaded = Loaded(importlib.metadata.version("vllm"), seconds, _linears(log))
        return self

    def __exit__(self, *error: object) -> None:
        self._serving.close()

    @contextlib.contextmanager
    def _server(self, log: Path) -> Iterator[None]:
        """`vllm serve`, up and answering."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        command = [
            str(self._vllm),
            "serve",
            str(self._folder),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *self._model,
        ]
        with (
            open(log, "w") as out,
            subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT | os.environ, start_new_session=True
            ) as process,
        ):
            try:
                self._wait(process, log)
                yield
                self._peak = _tree_peak_bytes(process.pid)
            finally:
                process.terminate()  # not SIGINT, which jobs in the background ignore
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {process.returncode} on {self._folder}; see {log}")
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError),
                urllib.request.urlopen(f"{self._url}/health"),
            ):
                return
            time.sleep(0.5)
        raise RuntimeError(f"vllm serve did not answer within {START_SECONDS} s; see {log}")

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        request = {
            "model": str(self._folder),
            "prompt": prompts,
            "temperature": 0,
            "max_tokens": new_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
        }
        call = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call) as answer:
            choices = sorted(json.load(answer)["choices"], key=lambda choice: choice["index"])
        return [[int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]] for choice in choices]

    def run(self, job: Job, prompts: list[list[int]]) -> Round:
        """vLLM's commands make random prompts of their own."""
        shape = ["--random-input-len", str(job.prompt_tokens), "--random-output-len", str(job.new_tokens)]
        requests = ["--dataset-name", "random", *shape, "--num-prompts", str(REQUESTS_FOR_EACH * job.concurrency)]
        if job.workload == "serve":
            result = self._bench(
                "serve",
                [
                    "--base-url",
                    self._url,
                    *requests,
                    "--max-concurrency",
                    str(job.concurrency),
                    "--ignore-eos",
                    "--temperature",
                    "0",
                    "--num-warmups",
                    str(job.concurrency),
                    "--percentile-metrics",
                    "ttft,tpot,itl",
                    "--save-result",
                    "--save-detailed",
                    "--result-dir",
                    str(self._work),
                ],
                "--result-filename",
            )
            if result["failed"]:
                raise RuntimeError(f"{result['failed']} requests failed on {self._folder}; see its log in {self._work}")
            return _served(result)
        self._serving.close()
        if job.workload == "latency":
            result = self._bench(
                "latency",
                [
                    *self._model,
                    "--input-len",
                    str(job.prompt_tokens),
                    "--output-len",
                    str(job.new_tokens),
                    "--batch-size",
                    str(job.concurrency),
                    "--num-iters-warmup",
                    "1",
                    "--num-iters",
                    "3",
                ],
                "--output-json",
            )
            return Round({"latency": float(result["avg_latency"])})
        result = self._bench(
            "throughput", [*self._model, *requests, "--max-num-seqs", str(job.concurrency)], "--output-json"
        )
        return Round(
            {"tokens_per_s": REQUESTS_FOR_EACH * job.concurrency * job.new_tokens / float(result["elapsed_time"])}
        )

    def _bench(self, command: str, arguments: list[str], out: str) -> Any:
        """The JSON that `vllm bench` leaves at the option `out`."""
        result, log = (self._work / f"{self._name}-{command}.{end}" for end in ("json", "log"))
        result.unlink(missing_ok=True)
        where = result.name if out == "--result-filename" else str(result)
        with open(log, "w") as file:
            done = subprocess.run(
                [str(self._vllm), "bench", command, "--model", str(self._folder), *arguments, out, where],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | os.environ,
                check=False,
            )
        if done.returncode or not result.exists():
            raise RuntimeError(f"vllm bench {command} ended with {done.returncode} on {self._folder}; see {log}")
        if command != "serve" and _linears(log) != self.loaded.linears:
            raise RuntimeError(f"vllm bench {command} ran {_linears(log)}, the server {self.loaded.linears}; see {log}")
        return json.loads(result.read_text())

    def peak_memory_bytes(self) -> int:
        self._serving.close()
        return self._peak


def _served(result: Any) -> Round:
    """Figures from the detailed result of `vllm bench serve`: lists over requests, in seconds."""
    itl = [1e3 * gap for gaps in result["itls"] for gap in gaps]
    return Round(
        {
            "ttft": float(result["mean_ttft_ms"]),
            "tpot": float(result["median_tpot_ms"]),
            **{f"itl_p{percent}": quantile(itl, percent / 100) for percent in (50, 95, 99)},
            "tokens_per_s": float(result["output_throughput"]),
        },
        [round(gap, 3) for gap in itl],
    )


def _linears(log: Path) -> dict[str, int]:
    """What the plugin's own line in vLLM's log says."""
    found = _BACKEND_LINE.search(log.read_text())
    return {found[2]: int(found[1])} if found else {}


def _tree_peak_bytes(pid: int) -> int:
    """Sum of the peaks of a process and its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(peak_bytes(each) for each in (pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))))
    return 0
