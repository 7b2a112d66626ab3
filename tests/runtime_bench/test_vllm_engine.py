"""The vLLM engine, over a stand-in for the command `vllm` that says what it was asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime_bench import check, run
from runtime_bench.engines import Job, Options
from runtime_bench.engines.vllm_engine import Server
from runtime_bench.results import Check, RunResult
from runtime_bench.run import RunSettings
from swiftprune.errors import SettingsError

VLLM = """#!{python}
import http.server, json, os, sys
from pathlib import Path
work = Path({work!r})
arguments = sys.argv[1:]
with open(work / "calls", "a") as calls:
    print(json.dumps(arguments), file=calls)
sparse = any(argument.endswith("sparse") for argument in arguments)
if sparse and arguments[:2] != ["bench", "serve"]:
    backend = "{backend}" if arguments[0] == "serve" else "{later_backend}"
    print("INFO swiftprune: 21 2:4 linears run on the backend " + backend + ". For torch.bfloat16 on cpu")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choices = [
            {{"index": i, "logprobs": {{"tokens": [f"token_id:{{p[0] + n}}" for n in range(asked["max_tokens"])]}}}}
            for i, p in enumerate(asked["prompt"])
        ]
        self.answer({{"choices": choices[::-1]}})
    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

def value(option):
    return arguments[arguments.index(option) + 1]

if arguments[0] == "serve":
    sys.stdout.flush()
    try:
        http.server.HTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
scale = 1 if sparse else 2
if arguments[1] == "serve":
    out = Path(value("--result-dir")) / value("--result-filename")
    result = {{
        "mean_ttft_ms": 10, "median_tpot_ms": 20 * scale, "output_throughput": 50 / scale, "failed": {failed},
        "itls": [[0.010 * scale, 0.020 * scale], [0.030 * scale]],
    }}
else:
    out = Path(value("--output-json"))
    result = {{"avg_latency": 3 * scale, "elapsed_time": 8 * scale}}
out.write_text(json.dumps(result))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts the stand-in, whose log names that backend, in the place of vLLM; returns the folder it works in."""

    def install(backend: str = "avx2", later_backend: str = "", failed: int = 0) -> Path:
        (tmp_path / "bin").mkdir()
        script = tmp_path / "bin" / "vllm"
        script.write_text(
            VLLM.format(
                python=sys.executable,
                work=str(tmp_path),
                backend=backend,
                later_backend=later_backend or backend,
                failed=failed,
            )
        )
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
        monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
        monkeypatch.setattr(
            check, "against_reference", lambda *_: Check(tokens=32, equal=32, largest_gap=0, tolerance=0.25)
        )
        return tmp_path

    return install


def _measure(folder: Path, tiny_models: Callable[[str], Path], workload: str) -> RunResult:
    sides = {}
    for side in ("dense", "sparse"):
        sides[side] = folder / side
        sides[side].symlink_to(tiny_models("qwen2"))
    settings = RunSettings(engine="vllm", workload=workload, concurrency=[1, 4], rounds=4, starts=1)  # type: ignore[arg-type]
    return run.measure(sides, settings, work=folder / "logs")


def _calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_serve(stand_in: Callable[..., Path], tiny_models: Callable[[str], Path]) -> None:
    folder = stand_in()
    found = _measure(folder, tiny_models, "serve")
    assert found.engine_version == "1.2.3"
    assert found.sparse.linears == {"avx2": 21}
    assert not found.dense.linears
    for case in found.cases:
        values = {metric.name: (metric.dense, metric.sparse) for metric in case.metrics}
        assert values["ttft"] == ([10.0] * 4, [10.0] * 4)
        assert values["tpot"] == ([40.0] * 4, [20.0] * 4)
        assert values["tokens_per_s"] == ([25.0] * 4, [50.0] * 4)
        assert values["itl_p50"][1] == pytest.approx([20] * 4)
        assert values["itl_p95"][1] == pytest.approx([29] * 4)
        assert case.itl_ms["sparse"] == [10, 20, 30] * 4
        assert not any(metric.bound for metric in case.metrics)
    calls = _calls(folder)
    assert [call[0] for call in calls] == ["serve"] * 2 + ["bench"] * 2 * 2 * 4
    bench = calls[-1]
    users = int(bench[bench.index("--max-concurrency") + 1])
    assert bench[bench.index("--num-prompts") + 1] == str(4 * users)
    assert [bench[bench.index(f"--random-{what}-len") + 1] for what in ("input", "output")] == ["64", "32"]


@pytest.mark.parametrize(
    ("workload", "metric", "dense", "sparse"),
    [("latency", "latency", 6, 3), ("throughput", "tokens_per_s", None, None)],
)
def test_offline_commands(
    workload: str,
    metric: str,
    dense: float | None,
    sparse: float | None,
    stand_in: Callable[..., Path],
    tiny_models: Callable[[str], Path],
) -> None:
    folder = stand_in()
    found = _measure(folder, tiny_models, workload)
    for case in found.cases:
        (only,) = case.metrics
        assert only.name == metric
        assert only.speedups == [2] * 4
        assert only.dense == [dense or 4 * case.concurrency * 32 / 16] * 4
        assert only.sparse == [sparse or 4 * case.concurrency * 32 / 8] * 4
    assert {call[1] for call in _calls(folder) if call[0] == "bench"} == {workload}


def test_a_server_answers_in_the_order_of_the_prompts(
    stand_in: Callable[..., Path], tiny_models: Callable[[str], Path]
) -> None:
    folder = stand_in()
    with Server(tiny_models("qwen2"), Options("bfloat16", 1), folder, "x") as server:
        assert server.tokens([[7, 8], [70, 80]], 3) == [[7, 8, 9], [70, 71, 72]]
        assert server.peak_memory_bytes() > 1_000_000


def test_a_run_without_a_kernel_is_void(stand_in: Callable[..., Path], tiny_models: Callable[[str], Path]) -> None:
    folder = stand_in("reference")
    found = _measure(folder, tiny_models, "serve")
    assert all(case.void and not case.metrics for case in found.cases)
    assert not [call for call in _calls(folder) if call[0] == "bench"]


def test_another_backend_in_a_later_run_stops_it(
    stand_in: Callable[..., Path], tiny_models: Callable[[str], Path]
) -> None:
    folder = stand_in("avx2", "reference")
    with pytest.raises(RuntimeError, match=r"vllm bench latency ran \{'reference': 21\}, the server \{'avx2': 21\}"):
        _measure(folder, tiny_models, "latency")


def test_failed_requests_stop_it(stand_in: Callable[..., Path], tiny_models: Callable[[str], Path]) -> None:
    folder = stand_in(failed=3)
    with pytest.raises(RuntimeError, match="3 requests failed"):
        _measure(folder, tiny_models, "serve")


def test_vllm_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SettingsError, match="`make vllm-env` sets up"):
        Server(tmp_path, Options("bfloat16", 1), tmp_path, "x")


def test_jobs_are_every_combination() -> None:
    settings = RunSettings(concurrency=[1, 8], prompt_tokens=[16, 64], new_tokens=[4])
    assert settings.jobs == [Job("batch", a, p, 4) for a in (1, 8) for p in (16, 64)]
    assert settings.options.longest == 68
