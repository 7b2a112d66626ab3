"""What `--out` may be: nothing is replaced that no export wrote, and no two exports write to one place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporters import export
from exporters.workspace import Workspace
from swiftprune.config import PruneSettings
from swiftprune.errors import OutputError

NO_DATA = PruneSettings(calibration="none")
HOLD = """
import sys
from pathlib import Path
from exporters.workspace import Workspace

with Workspace(Path(sys.argv[1]), Path(sys.argv[2]), resume=False, overwrite=True):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def project(tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder `work` beside the home `home/me`; it holds a model, notes, and what an export wrote."""
    work = tmp_path / "work"
    shutil.copytree(tiny_models("llama-gqa-tied"), work / "models" / "llama")
    (work / "models" / "notes.txt").write_text("mine")
    (tmp_path / "home" / "me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(work)
    return work


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("models", "is or contains the model"),
        ("models/llama", "is the model itself"),
        ("models/../models/llama/", "is the model itself"),
        ("link", "is the model itself"),
        (".", "is or contains the model"),
        ("..", "is or contains"),
        ("../home", "is or contains a home folder"),
        ("../home/me", "is or contains a home folder"),
        ("/", "is the root of a file system"),
        ("/proc", "is the root of a file system"),
    ],
)
def test_places_that_are_never_written(project: Path, out: str, why: str, overwrite: bool) -> None:
    (project / "link").symlink_to(project / "models" / "llama")
    before = tree(project.parent)
    with pytest.raises(OutputError, match=why):
        export(project / "models" / "llama", out, NO_DATA, overwrite=overwrite)
    assert tree(project.parent) == before


def test_the_working_folder_is_never_written(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "empty").mkdir()
    monkeypatch.chdir(project / "empty")
    with pytest.raises(OutputError, match="is or contains the working folder"):
        export(project / "models" / "llama", ".", NO_DATA, overwrite=True)


@pytest.mark.parametrize("at", ["out", "out.partial", "out.replaced"])
@pytest.mark.parametrize("what", ["folder", "file", "look-alike"])
def test_overwrite_replaces_only_what_an_export_wrote(project: Path, at: str, what: str) -> None:
    place = project / at
    if what == "file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "precious.txt").write_text("mine")
        if what == "look-alike":
            (place / "swiftprune.json").write_text("[]")
    before = tree(project)
    with pytest.raises(OutputError, match="give another --out"):
        export(project / "models" / "llama", "out", NO_DATA, overwrite=True)
    assert tree(project) == before


def test_overwrite_keeps_what_was_put_beside_an_export(project: Path) -> None:
    model = project / "models" / "llama"
    export(model, "out", NO_DATA)
    export(model, "out", NO_DATA, overwrite=True, target="dense")
    assert "quantization_config" not in json.loads(Path("out/config.json").read_text())
    Path("out/results").mkdir()
    Path("out/results/run.tmp").write_text("mine")
    before = tree(project)
    with pytest.raises(OutputError, match=r"holds results/run\.tmp, which no export wrote"):
        export(model, "out", NO_DATA, overwrite=True)
    assert tree(project) == before


def test_an_empty_folder_may_be_written(project: Path) -> None:
    Path("out").mkdir()
    export(project / "models" / "llama", "out", NO_DATA)
    assert Path("out/config.json").exists()
    assert sorted(path.name for path in project.iterdir()) == ["models", "out"]


def test_what_comes_to_the_place_meanwhile_is_kept(project: Path) -> None:
    def progress(stage: str, done: float, total: float) -> None:
        if stage == "prune":
            Path("out").mkdir(exist_ok=True)
            Path("out/precious.txt").write_text("mine")

    with pytest.raises(OutputError, match="exists"):
        export(project / "models" / "llama", "out", NO_DATA, progress=progress)
    assert Path("out/precious.txt").read_text() == "mine"
    shutil.rmtree("out")
    export(project / "models" / "llama", "out", NO_DATA, resume=True)
    assert Path("out/config.json").exists()


def test_a_place_that_another_process_writes_is_left_to_it(project: Path) -> None:
    model = project / "models" / "llama"
    said: list[str] = []
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, "out", str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for overwrite, resume in ((False, False), (True, False), (False, True)):
        with pytest.raises(OutputError, match=f"another export is writing it .process {other.pid} on .*, since 20"):
            export(model, "out", NO_DATA, overwrite=overwrite, resume=resume)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    export(model, "out", NO_DATA, notify=said.append)
    assert any(f"taking over from an export that was stopped (process {other.pid} on" in text for text in said)
    assert sorted(path.name for path in project.iterdir()) == ["models", "out"]


def test_a_lock_of_another_machine_is_not_taken_over(project: Path) -> None:
    lock = project / "out.lock"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0}))
    with pytest.raises(OutputError, match=r"process 1 on elsewhere.*delete .*out\.lock"):
        export(project / "models" / "llama", "out", NO_DATA, overwrite=True)
    assert lock.exists()
    lock.write_text('{"pid": 1')  # torn
    export(project / "models" / "llama", "out", NO_DATA)


def test_the_lock_names_its_process_and_goes(project: Path) -> None:
    lock = project / "out.lock"
    with Workspace(Path("out"), project / "models" / "llama", resume=False, overwrite=False):
        owner = json.loads(lock.read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        assert owner["started"] > 1.7e9
    assert not lock.exists()


@pytest.mark.parametrize("mask", ["", "nope.npz"], ids=["done", "failed"])
def test_a_lock_file_of_another_tool_is_left_alone(project: Path, mask: str) -> None:
    lock = project / "out.lock"
    for content in ("[[package]]\n", '{"pid": 7, "name": "another tool"}', '{"pid":7}', '{"pid": 7, "host": "a"}'):
        lock.write_text(content)
        with pytest.raises(OutputError, match=r"out\.lock: is in the way, and no lock of an export"):
            export(project / "models" / "llama", project / "out", PruneSettings(calibration="none", mask=mask))
        assert lock.read_text() == content


def test_names_that_cannot_be_are_refused_before_any_work(project: Path) -> None:
    (project / "loop").symlink_to("loop")
    for out, why in (("x" * 250, "File name too long"), ("x" * 300, "File name too long"), ("loop", "Too many levels")):
        with pytest.raises(OutputError, match=rf"cannot be written: {why}.*; give another --out"):
            export(project / "models" / "llama", project / out, NO_DATA)


def test_a_finished_export_beside_is_not_taken_for_a_leftover(project: Path) -> None:
    none = PruneSettings(calibration="none")
    export(project / "models" / "llama", project / "out.replaced", none)
    with pytest.raises(OutputError, match=r"out\.replaced: is in the way"):
        export(project / "models" / "llama", project / "out", none, overwrite=True)
    assert (project / "out.replaced" / "config.json").exists()


@pytest.mark.parametrize("name", ["training.safetensors", "notes.done.json"])
def test_a_file_that_looks_like_a_mark_is_not_deleted(project: Path, name: str) -> None:
    none = PruneSettings(calibration="none")
    export(project / "models" / "llama", project / "out", none)
    (project / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match=f"holds {name}, which no export wrote"):
        export(project / "models" / "llama", project / "out", none, overwrite=True)
    assert (project / "out" / name).read_text() == "mine"
