"""Pruning on another device than the CPU, and what is asked for and is not there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from swiftprune import compute
from swiftprune.compute import Compute, find_device
from swiftprune.config import PruneSettings
from swiftprune.errors import SettingsError


def test_every_stage_keeps_to_its_device() -> None:
    """On tensors that refuse to be mixed with the CPU's, and to the CPU's results: see tests/claimed_device.py."""
    run = subprocess.run([sys.executable, "-m", "tests.claimed_device"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert len(found) == 11
    assert not {case: said for case, said in found.items() if said != "same"}


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "cuda:-2", "", "meta", "cpu:1"])
def test_devices_that_are_none(name: str) -> None:
    with pytest.raises(SettingsError, match=f"--device '{name}': give auto, cpu, cuda or cuda:N"):
        find_device(name)


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == Compute().device
    with pytest.raises(SettingsError, match=r"--device cuda: torch .* finds no NVIDIA GPU"):
        PruneSettings(device="cuda").resolved()
    with pytest.raises(SettingsError, match="--device cuda:1"):
        PruneSettings(device="cuda:1", calibration="none").resolved()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(find_device(name)) for name in ("auto", "cuda", "cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(SettingsError, match=r"--device cuda:2: torch finds 2 GPUs, counted from cuda:0"):
        find_device("cuda:2")


def test_the_faster_type_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((8, 0), "bfloat16"), ((12, 0), "bfloat16"), ((7, 5), "float32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert compute.faster_type(torch.device("cuda")) == expected
