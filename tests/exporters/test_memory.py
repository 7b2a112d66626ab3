"""A 3B-parameter checkpoint in bounded memory, through a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_bench import synthetic
from swiftprune.checkpoints.shards import shard_entries

EXPORT = str(Path(sys.executable).parent / "swiftprune-export")

GIGABYTE = 1_000_000_000


@pytest.fixture
def big_disk(tmp_path: Path) -> Iterator[Path]:
    """Removed afterwards: pytest would keep 10 GB of the last three runs."""
    if shutil.disk_usage(tmp_path).free < 20 * GIGABYTE:
        pytest.skip("needs 20 GB of disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


# Linux counts what a process held before exec into its peak, so it must not be started from the tests' large one.
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def export_command(model: Path, out: Path, *options: str) -> list[str]:
    return [EXPORT, str(model), "--calibration", "none", "--out", str(out), *options]


def peak_memory(command: list[str]) -> int:
    """Runs it to its success; returns the peak of its resident memory in bytes."""
    run = subprocess.run([sys.executable, "-c", MEASURED, *command], stdout=subprocess.PIPE, check=True)
    return int(run.stdout)


@pytest.mark.slow
def test_3b_stays_under_3_gb_and_resumes_after_sigkill(big_disk: Path) -> None:
    model = synthetic.write("llama-3.2-3b", big_disk / "model")
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert size > 6 * GIGABYTE

    process = subprocess.Popen(export_command(model, big_disk / "out"), stdout=subprocess.DEVNULL)
    partial = big_disk / "out.partial"
    while process.poll() is None and len(list(partial.glob("*.done.json"))) < 10:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(partial.glob("*.done.json")))
    assert 10 <= done < 29
    assert not (big_disk / "out").exists()
    assert GIGABYTE // 10 < peak_memory(export_command(model, big_disk / "out", "--resume")) < 3 * GIGABYTE

    shards = {path.name: shard_entries(path) for path in (big_disk / "out").glob("*.safetensors")}
    index = json.loads((big_disk / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: shard for shard, entries in shards.items() for name in entries}
    assert sum(name.endswith(".weight_meta") for name in index) == 28 * 7
