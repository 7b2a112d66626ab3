"""The vLLM benchmark, over a stand-in for the command `vllm` that says what it was asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from runtime_bench import cli, vllm_serving
from swiftprune.errors import SettingsError

VLLM = """#!{python}
import http.server, json, os, sys
from pathlib import Path
work = Path({work!r})
arguments = sys.argv[1:]
with open(work / "calls", "a") as calls:
    print(json.dumps(arguments), file=calls)
packed = any(argument.endswith("-vllm-packed") for argument in arguments)
if packed and "bench" not in arguments or "latency" in arguments or "throughput" in arguments:
    print("INFO swiftprune: 21 2:4 linears run on the backend {backend}. For torch.bfloat16 on cpu")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({{"choices": [{{"logprobs": {{"tokens": ["a", "b", "c" if packed else "d"]}}}}]}})
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
scale = 1 if packed else 2
if arguments[1] == "serve":
    out = Path(value("--result-dir")) / value("--result-filename")
    result = {{"mean_ttft_ms": 10, "median_tpot_ms": 20 * scale, "p99_itl_ms": 30, "output_throughput": 50 / scale}}
else:
    out = Path(value("--output-json"))
    result = {{"avg_latency": 3 * scale, "tokens_per_second": 8 / scale}}
out.write_text(json.dumps(result))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts the stand-in, whose log names that backend, in the place of vLLM; returns the folder it works in."""

    def install(backend: str) -> Path:
        (tmp_path / "bin").mkdir()
        script = tmp_path / "bin" / "vllm"
        script.write_text(VLLM.format(python=sys.executable, work=str(tmp_path), backend=backend))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
        monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
        return tmp_path

    return install


@pytest.mark.parametrize("backend", ["avx2"])
def test_sides_alternate_and_all_is_reported(
    backend: str, stand_in: Callable[[str], Path], tiny_models: Callable[[str], Path]
) -> None:
    folder = stand_in(backend)
    out = folder / "out.json"
    model = str(tiny_models("qwen2"))
    command = ["vllm", model, "--folder", str(folder), "--pairs", "3", "--concurrency", "1,4", "--out", str(out)]
    run = CliRunner().invoke(cli.app, command)
    assert run.exit_code == 0, run.output
    bench = vllm_serving.VllmBench.model_validate_json(out.read_text())
    assert (bench.backend, bench.packed_linears, bench.same_tokens, bench.vllm) == ("avx2", 21, 2, "1.2.3")
    assert len(bench.rows) == 2 * (4 + 1 + 1)
    for row in bench.rows:
        even = row.figure in ("mean_ttft_ms", "p99_itl_ms")
        assert row.speedups == [1.0 if even else 2.0] * 3
    assert "| serve | 4 | median_tpot_ms | 40 | 20 | 2.00x | 2.00-2.00 |" in run.stdout
    assert "2 of 48 greedy tokens the same" in run.stdout

    calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    benches = [call for call in calls if call[0] == "bench"]
    sides = ["packed" if any("vllm-packed" in argument for argument in call) else "dense" for call in benches]
    assert sides == ["dense", "packed", "packed", "dense", "dense", "packed"] * 6
    assert {call[1] for call in benches} == {"serve", "latency", "throughput"}


def test_a_run_without_a_kernel_is_void(
    stand_in: Callable[[str], Path], tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stand_in("reference")
    sides = vllm_serving.find(str(tiny_models("qwen2")), folder)
    for commands in (["serve"], ["latency"]):
        with pytest.raises(RuntimeError, match="no kernel served its packed linears, so nothing is measured"):
            vllm_serving.measure(sides, folder / "logs", commands=commands, concurrency=[1], pairs=1)  # type: ignore[arg-type]


def test_vllm_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SettingsError, match="`make vllm-env` sets up"):
        vllm_serving.measure({"dense": tmp_path, "packed": tmp_path}, tmp_path)
