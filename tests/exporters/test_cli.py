"""The command as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXPORT = str(Path(sys.executable).parent / "swiftprune-export")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [EXPORT, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_help_teaches() -> None:
    run = command("--help")
    assert run.returncode == 0
    for word in ("--calibration", "--target", "sparsegpt", "Examples", "swiftprune-export ./my-model", "Exit codes"):
        assert word in run.stdout


def test_an_export_ends_with_tables(tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(text_file.read_text() * 2)
    run = command(
        tiny_models("llama-gqa-tied"), "--format", "2:4", "--out", tmp_path / "out", "--method", "wanda",
        "--calibration", text_file, "--samples", 4, "--seqlen", 32, "--evaluate", held_out,
    )  # fmt: skip
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
    assert report["settings"]["method"] == "swiftprune"
    assert len(report["layers"]) == 21
    assert report["bytes_after"] < report["bytes_before"]
    assert {"calibrate", "mask", "write"} <= report["seconds"].keys()
    manifest = json.loads((tmp_path / "out" / "swiftprune.json").read_text())
    assert manifest["layers"] == report["layers"]
    assert set(manifest["source"]["sha256"]) == {"model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "wnada"], 2, "unknown method 'wnada'"),
        (["--format", "2/4"], 2, "--format"),
        (["--format", "4:8"], 2, "use --target dense"),
        (["--format", "4:8", "--target", "torch"], 2, "use --target dense"),
        (["--method", "wanda", "--calibration", "none"], 2, "needs calibration data"),
        (["--target", "onnxx"], 2, "--target"),
        (["--ignore", "("], 2, "not a regular expression"),
        (["--evaluate", "missing.txt"], 4, "missing.txt: no such file"),
        (["--evaluate", "{short}"], 4, "fewer than one window of 2048"),
        (["--calibration", "{empty}"], 4, "is empty"),
    ],
)
def test_mistakes_are_answered(
    arguments: list[str], code: int, message: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    short = tmp_path / "short.txt"
    short.write_text("Too short to evaluate on.")
    arguments = [argument.format(empty=empty, short=short) for argument in arguments]
    if "--calibration" not in arguments and "--method" not in arguments:
        arguments += ["--calibration", "none"]
    run = command(tiny_models("llama-gqa-tied"), "--out", tmp_path / "out", *arguments)
    assert run.returncode == code, run.stderr
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_model(tmp_path: Path) -> None:
    run = command(tmp_path / "nothing")
    assert run.returncode == 3
    assert "no such folder" in run.stderr
