"""The command as a user types it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import swiftprune
from exporters import cli
from exporters.console import ProgressBars

Typed = Callable[..., subprocess.CompletedProcess[str]]
EXPORT = str(Path(sys.executable).parent / "swiftprune-export")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [EXPORT, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """As `command` in this process, which need not start for seconds first."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [EXPORT, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(line, int(exit.value.code or 0), said.out, said.err)

    return run


def test_help_teaches() -> None:
    run = command("--help")
    assert run.returncode == 0
    for word in ("--calibration", "--target", "sparsegpt", "Examples", "swiftprune-export ./my-model", "Exit codes"):
        assert word in run.stdout


def test_version_names_what_a_bug_report_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [EXPORT, "--version"])
    cli.main()
    assert capsys.readouterr().out.startswith(f"swiftprune {swiftprune.__version__}, Python 3.")


def test_an_export_ends_with_tables(
    typed: Typed, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text_file.read_text() * 2)
    run = typed(
        tiny_models("llama-gqa-tied"),
        "--format",
        "2:4",
        "--out",
        tmp_path / "out",
        "--method",
        "wanda",
        "--calibration",
        text_file,
        "--samples",
        4,
        "--seqlen",
        32,
        "--evaluate",
        held_out,
    )
    assert run.returncode == 0, run.stderr
    for words in (
        "down_proj",
        "64x160",
        "50.0%",
        "kept energy",
        "1.78x smaller",
        "perplexity",
        "left dense",
        "lm_head",
    ):
        assert words in run.stdout


def test_json_is_all_there_is_on_stdout(tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    run = command(
        tiny_models("qwen3"),
        "--out",
        tmp_path / "out",
        "--calibration",
        text_file,
        "--samples",
        2,
        "--seqlen",
        32,
        "--json",
    )
    report = json.loads(run.stdout)
    assert report["settings"]["method"] == "admm"
    assert len(report["layers"]) == 21
    assert report["bytes_after"] < report["bytes_before"]
    assert {"calibrate", "mask", "write"} <= report["seconds"].keys()
    manifest = json.loads((tmp_path / "out" / "swiftprune.json").read_text())
    assert manifest["layers"] == report["layers"]
    assert set(manifest["source"]["sha256"]) == {"model.safetensors"}


def test_the_dial_sets_stages_and_says_what_they_cost(
    typed: Typed, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    run = typed(
        tiny_models("llama-gqa-tied"),
        "--quality",
        "best",
        "--steps",
        3,
        "--compute",
        "float32",
        "--samples",
        4,
        "--calibration",
        text_file,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stderr.split())
    assert re.search(r"One block took \d+\.\d s; pruning all will have taken about \d+\.\d minutes, and 3 steps", said)
    assert re.search(r"perplexity on held-back calibration text \d+\.\d+ -> \d+\.\d+ in \d+\.\d minutes, 3 steps", said)
    report = json.loads(run.stdout)
    settings = report["settings"]
    assert (settings["method"], settings["permute"], settings["refine"]) == ("admm", True, ["distill"])
    assert (settings["minutes"], settings["steps"], settings["samples"]) == (None, 3, 4)
    assert [point["step"] for point in report["distillation"]] == [0, 3]
    assert {"permute", "calibrate", "mask", "distill"} <= report["seconds"].keys()


def test_fast_is_one_pass_without_training(
    typed: Typed, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    run = typed(
        tiny_models("gpt-neox"), "--quality", "fast", "--calibration", text_file, "--out", tmp_path / "out", "--json"
    )
    settings = json.loads(run.stdout)["settings"]
    assert (settings["method"], settings["one_pass"], settings["refine"]) == ("swiftprune-pairs", True, [])
    assert settings["compute"] in ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "wnada"], 2, "unknown method 'wnada'"),
        (["--format", "2/4"], 2, "--format"),
        (["--format", "4:8"], 2, "use --target dense"),
        (["--format", "4:8", "--target", "torch"], 2, "use --target dense"),
        (["--method", "wanda", "--calibration", "none"], 2, "needs calibration data"),
        (["--target", "onnxx"], 2, "--target"),
        (["--quality", "perfect"], 2, "--quality"),
        (["--refine", "wieghts"], 2, "refine: Input should be 'weights', 'blocks' or 'distill', not 'wieghts'"),
        (["--refine", "distill", "--minutes", "-1"], 2, "minutes: Input should be greater than 0, not -1.0"),
        (["--refine", "distill", "--calibration", "{short}"], 2, "give either --minutes or --steps"),
        (["--quality", "balanced", "--calibration", "none"], 2, "--refine distill needs calibration data"),
        (["--ignore", "("], 2, "not a regular expression"),
        (["--evaluate", "missing.txt"], 4, "missing.txt: no such file"),
        (["--evaluate", "{short}"], 4, "fewer than one window of 256"),
        (["--calibration", "{empty}"], 4, "is empty"),
    ],
)
def test_mistakes_are_answered(
    arguments: list[str], code: int, message: str, typed: Typed, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    short = tmp_path / "short.txt"
    short.write_text("Too short to evaluate on.")
    arguments = [argument.format(empty=empty, short=short) for argument in arguments]
    if "--calibration" not in arguments and "--method" not in arguments:
        arguments += ["--calibration", "none"]
    run = typed(tiny_models("llama-gqa-tied"), "--out", tmp_path / "out", *arguments)
    assert run.returncode == code, run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_model(tmp_path: Path) -> None:
    run = command(tmp_path / "nothing")
    assert run.returncode == 3
    assert "no such folder" in run.stderr


def test_threads_wait_as_the_machine_allows_and_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch is loaded, since its threads read it once."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    code = """
import os, sys
import psutil
from exporters import start
psutil.cpu_percent = lambda seconds: float(sys.argv[1])
start.choose_waiting()
print("torch" in sys.modules, os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""
    for busy, given, said in (
        ("3", {}, "False None 20000"),
        ("60", {}, "False passive None"),
        ("60", {"OMP_WAIT_POLICY": "active"}, "False active None"),
        ("3", {"GOMP_SPINCOUNT": "7"}, "False None 7"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code, busy], env=os.environ | given, capture_output=True, text=True, check=False
        )
        assert run.stdout.strip() == said, run.stderr


def test_a_log_says_how_far_long_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no terminal shows bars: a line every few seconds, and none of stages that are soon done."""
    now = iter([0.0, 1.0, 20.0, 21.0, 40.0])  # as it is made, then for each call
    monkeypatch.setattr("exporters.console.time.monotonic", lambda: next(now))
    log = io.StringIO()
    with ProgressBars(Console(file=log)) as progress:
        for block in (0, 3, 4, 10):
            progress("prune", block, 10)
    assert log.getvalue().splitlines() == ["prune: 3 of 10 after 19 s, about 44 s left", "prune: 10 of 10 after 39 s"]
