"""Killed, interrupted and refused exports: nothing half-written loads, and resuming gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exporters import export
from exporters.workspace import Workspace
from swiftprune.config import PruneSettings
from swiftprune.errors import OutputError
from swiftprune.progress import ProgressCallback
from swiftprune.stages import distill, refine_blocks
from tests import models

EXPORT = str(Path(sys.executable).parent / "swiftprune-export")
KILL_AT = """
import os, signal, sys
from exporters import export
from swiftprune import PruneSettings

model, out, settings, target, share = sys.argv[1:]

def progress(stage, done, total):
    if stage == "prune" and done / total > float(share):
        os.kill(os.getpid(), signal.SIGKILL)

export(model, out, PruneSettings.model_validate_json(settings), target=target, resume=True, progress=progress)
"""


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("method", "target"), [("swiftprune", "packed"), ("admm", "torch"), ("swiftprune-data-free", "dense")]
)
def test_killed_twice_and_resumed_gives_the_same_bytes(
    method: str, target: Any, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny_models("llama-mha-untied")
    settings = PruneSettings(method=method, calibration=str(text_file), samples=4, seqlen=32, compute="float32")
    export(model, tmp_path / "whole", settings, target=target)
    for share in ("0.3", "0.7"):
        command = [
            sys.executable,
            "-c",
            KILL_AT,
            str(model),
            str(tmp_path / "out"),
            settings.model_dump_json(),
            target,
            share,
        ]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial").exists()
    export(model, tmp_path / "out", settings, target=target, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def stop_at(what: str, share: float) -> ProgressCallback:
    def progress(stage: str, done: float, total: float) -> None:
        if stage == what and done / total > share:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json", "text.txt"])
def test_resuming_on_other_input_is_refused(changed: str, tiny_copy: Path, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    settings = PruneSettings(method="wanda", calibration=str(text), samples=4, seqlen=32)
    with pytest.raises(KeyboardInterrupt):
        export(tiny_copy, tmp_path / "out", settings, progress=stop_at("prune", 0.5))
    path = text if changed == "text.txt" else tiny_copy / changed
    was = path.read_text()
    path.write_text(was.replace("the", "teh") if path == text else was.replace("{", "{ ", 1))
    with pytest.raises(OutputError, match=f"{changed} has changed since the export was started"):
        export(tiny_copy, tmp_path / "out", settings, resume=True)
    path.write_text(was)
    export(tiny_copy, tmp_path / "out", settings, resume=True)


def test_refined_stopped_everywhere_and_resumed_gives_the_same_bytes(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while pruning, while training, and while the trained blocks are written over the pruned ones."""
    monkeypatch.setattr(refine_blocks, "STEPS", 6)
    monkeypatch.setattr(distill, "_SAVE_SECONDS", 0.0)
    model, out = tiny_models("qwen2"), tmp_path / "out"
    settings = PruneSettings(
        method="wanda",
        refine=("weights", "blocks", "distill"),
        steps=12,
        calibration=str(text_file),
        samples=4,
        seqlen=32,
    )
    whole = export(model, tmp_path / "whole", settings)
    assert whole.distillation[-1].step == 12
    for stage, share in (("prune", 0.5), ("distill", 0.6)):
        with pytest.raises(KeyboardInterrupt):
            export(model, out, settings, resume=True, progress=stop_at(stage, share))
    write = Workspace.write_shard

    def stop_at_second(self: Workspace, shard: str, *arguments: Any) -> None:
        if shard.startswith("model-00002"):
            raise KeyboardInterrupt
        write(self, shard, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_shard", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            export(model, out, settings, resume=True)
    assert not out.exists()
    export(model, out, settings, resume=True)
    assert digest(out) == digest(tmp_path / "whole")


def test_self_sampled_text_is_kept_over_a_resume(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    model, settings = tiny_models("llama-gqa-tied"), PruneSettings(samples=4, seqlen=16)
    export(model, tmp_path / "whole", settings)

    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "out", settings, progress=stop_at("prune", 0.5))
    stages: set[str] = set()
    export(model, tmp_path / "out", settings, resume=True, progress=lambda stage, *_: stages.add(stage))
    assert "sample calibration text" not in stages
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_partial_export_is_only_resumed_under_the_same_settings(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model, settings = tiny_models("llama-gqa-tied"), PruneSettings(calibration=str(text_file), samples=4, seqlen=16)

    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "out", settings, progress=stop_at("prune", 0.5))
    with pytest.raises(OutputError, match="interrupted here; continue it with --resume"):
        export(model, tmp_path / "out", settings)
    with pytest.raises(OutputError, match=r'was started with settings = .*"seed": 0.*now it is .*"seed": 1'):
        export(model, tmp_path / "out", settings.model_copy(update={"seed": 1}), resume=True)
    with pytest.raises(OutputError, match='started with target = "packed"'):
        export(model, tmp_path / "out", settings, target="dense", resume=True)
    changed = Path(shutil.copytree(model, tmp_path / "changed"))
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    with pytest.raises(OutputError, match="started with source"):
        export(changed, tmp_path / "out", settings, resume=True)
    export(model, tmp_path / "out", settings.model_copy(update={"seed": 1}), overwrite=True)
    assert json.loads((tmp_path / "out" / "swiftprune.json").read_text())["settings"]["seed"] == 1


@pytest.mark.parametrize("left", [[], ["export-state.json.tmp"]])
@pytest.mark.parametrize("resume", [False, True])
def test_killed_before_any_work_it_begins_as_if_nothing_was(
    left: list[str], resume: bool, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).write_text('{"sett')
    export(tiny_models("llama-gqa-tied"), tmp_path / "out", PruneSettings(calibration="none"), resume=resume)
    assert not (tmp_path / "out.partial").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_an_existing_output_is_left_alone(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny_models("llama-gqa-tied"), tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists; give another --out, or --overwrite"):
        export(model, out, PruneSettings(calibration="none"))
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_the_model_itself_is_never_overwritten(tiny_copy: Path) -> None:
    before = digest(tiny_copy)
    with pytest.raises(OutputError, match="is the model itself"):
        export(tiny_copy, tiny_copy / ".." / tiny_copy.name, PruneSettings(calibration="none"), overwrite=True)
    assert digest(tiny_copy) == before


def test_ctrl_c_stops_with_130_and_resumes(text_file: Path, tmp_path: Path) -> None:
    config = models.SUPPORTED["llama-gqa-tied"].__class__(
        **models.SUPPORTED["llama-gqa-tied"].to_dict() | {"num_hidden_layers": 24, "layer_types": None}
    )
    model = models.write_model(tmp_path / "model", config)
    out = tmp_path / "out"
    command = [
        EXPORT,
        str(model),
        "--out",
        str(out),
        "--calibration",
        str(text_file),
        "--samples",
        "48",
        "--seqlen",
        "128",
    ]
    run = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which jobs in the background do not have
    )
    while run.poll() is None and not list((tmp_path / "out.partial").glob("*.done.json")):
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130, stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "config.json").exists()


LOST = """
import os, signal, sys, time
import exporters.checkpoint, exporters.cli

def export(*_, **__):
    try:
        os.kill(os.getpid(), number)
        time.sleep(10)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object type")  # what torch made of one

exporters.checkpoint.export = export
signal.signal(signal.SIGINT, signal.default_int_handler)
number = int(sys.argv[1])
sys.argv[1:] = ["model", "--out", "out"]
exporters.cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_that_became_another_exception_is_still_one(number: int, tmp_path: Path) -> None:
    """And SIGTERM, as service managers send it, which ends a Python program without a word."""
    run = subprocess.run(
        [sys.executable, "-c", LOST, str(int(number))], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 130, run.stderr
    assert "--resume" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode
    ):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = models.SUPPORTED["llama-gqa-tied"].__class__(
        **models.SUPPORTED["llama-gqa-tied"].to_dict() | {"intermediate_size": 2048}
    )
    return models.write_model(tmp_path_factory.mktemp("wide") / "model", config)


def test_a_disk_that_is_too_small_is_refused_at_the_start(wide_model: Path, small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 0\.00\d+ GB, the disk has 0\.00\d+ GB free"):
        export(wide_model, small_disk / "out", PruneSettings(calibration="none"))


def test_a_disk_that_fills_up_keeps_what_is_done(
    wide_model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspace, "check_space", lambda self, needed: None)
    with pytest.raises(OutputError, match="the disk is full; finished blocks are kept, continue with --resume"):
        export(wide_model, small_disk / "out", PruneSettings(calibration="none"))
    assert not (small_disk / "out").exists()
    kept = [path.name.removesuffix(".done.json") for path in (small_disk / "out.partial").glob("*.done.json")]
    assert kept
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    written = {name: (small_disk / "out.partial" / name).stat().st_mtime_ns for name in kept}
    export(wide_model, small_disk / "out", PruneSettings(calibration="none"), resume=True)
    assert {name: (small_disk / "out" / name).stat().st_mtime_ns for name in kept} == written  # not done again
    export(wide_model, small_disk / "again", PruneSettings(calibration="none"))
    assert digest(small_disk / "out") == digest(small_disk / "again")


def test_a_disk_that_fills_up_while_training_is_said(
    wide_model: Path, small_disk: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training continues from is ten times the output, and counts from the start."""
    settings = PruneSettings(
        method="wanda", calibration=str(text_file), samples=4, seqlen=32, refine=("distill",), steps=2
    )
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=r"needs 0\.0\d+ GB, the disk has 0\.00\d+ GB free"):
        export(wide_model, small_disk / "out", settings)
    monkeypatch.setattr(Workspace, "check_space", lambda self, needed: None)
    with pytest.raises(OutputError, match="the disk is full; finished blocks are kept, continue with --resume"):
        export(wide_model, small_disk / "out", settings, overwrite=True)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    export(wide_model, small_disk / "out", settings, resume=True)


@pytest.mark.parametrize("how", ["mark is no list", "mark of another version", "cut shard", "no shard"])
def test_a_finished_block_that_was_damaged_is_done_again(
    how: str, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model, settings = tiny_models("llama-gqa-tied"), PruneSettings(calibration=str(text_file), samples=4, seqlen=16)
    export(model, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "out", settings, progress=stop_at("prune", 0.9))
    mark = next((tmp_path / "out.partial").glob("model-00001-*.done.json"))
    shard = mark.with_name(mark.name.removesuffix(".done.json"))
    if how == "no shard":
        shard.unlink()
    elif how == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        mark.write_text("{}" if how == "mark is no list" else '[{"name": "x"}]')
    export(model, tmp_path / "out", settings, resume=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "name", ["calibration-tokens.safetensors", "permutations.safetensors", "training.safetensors", "export-state.json"]
)
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", bytes(200)])
def test_damaged_files_of_an_unfinished_export_are_named(
    name: str,
    content: bytes,
    tiny_models: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distill, "_SAVE_SECONDS", 0.0)
    settings = PruneSettings(
        method="wanda", calibration=str(text_file), samples=4, seqlen=16, permute=True, refine=("distill",), steps=3
    )
    with pytest.raises(KeyboardInterrupt):
        export(tiny_models("llama-gqa-tied"), tmp_path / "out", settings, progress=stop_at("distill", 0.6))
    (tmp_path / "out.partial" / name).write_bytes(content)
    message = "was started with" if (name, content) == ("export-state.json", b"{}") else rf"{name}.*start anew"
    with pytest.raises(OutputError, match=message):
        export(tiny_models("llama-gqa-tied"), tmp_path / "out", settings, resume=True)


def test_files_can_be_read_by_others(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """safetensors creates files only their owner can read, but the server often runs as another user."""
    export(tiny_models("llama-gqa-tied"), tmp_path / "out", PruneSettings(calibration="none"))
    current = os.umask(0)
    os.umask(current)
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~current, path.name
