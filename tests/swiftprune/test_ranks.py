"""Several processes, which share sequences and linears out, prune to what one does, but for the order of sums."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from exporters import export
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.errors import SettingsError
from swiftprune.formats.spec import Packed24
from swiftprune.kernels.packing import unpack
from swiftprune.ranks import Ranks
from swiftprune.stages import distill
from swiftprune.stages.context import Run
from tests import models

RANKS = 3
EXPERTS = Qwen3MoeConfig(
    **models.SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 2} | models.QWEN_EXPERTS,
    moe_intermediate_size=32,
    head_dim=16,
)
# By name: the model, settings beside the text, and how many of all weights may be kept in one and not in the other.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "pairs": ("llama-gqa-tied", {"method": "swiftprune-pairs", "one_pass": True, "permute": True}, 1e-3),
    "sparsegpt": ("gpt-neox", {"method": "sparsegpt"}, 0.05),
    "admm": ("llama-gqa-tied", {"method": "admm", "values": "int8"}, 0.02),
    "experts": ("experts", {"method": "wanda", "one_pass": True}, 1e-3),
    "distill": (
        "llama-mha-untied",
        {"method": "wanda", "one_pass": True, "refine": ["distill"], "steps": 6, "seqlen": 40, "dtype": "float32"},
        1e-3,
    ),
    "none": ("gpt-neox", {"calibration": "none"}, 0.0),
}


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return subprocess.run([*start, *command], capture_output=True, text=True, timeout=300)


def test_training_steps_are_those_of_one_process(exported: Callable[[str], tuple[Path, Path]]) -> None:
    """On three times the windows a batch, of which each process takes a third."""
    one, shared = (Checkpoint(folder) for folder in exported("distill"))
    moved = 0.0
    for name in one.tensors:
        before, after = (checkpoint.read([name])[name].float() for checkpoint in (one, shared))
        if "norm" in name:
            moved = max(moved, float((before - 1).abs().max()))
            assert (before - after).abs().max() < 2e-4
    assert moved > 1e-3


def kept(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    found = {}
    for name in checkpoint.tensors:
        if f"{name}_meta" in checkpoint.tensors:
            names = [name + suffix for suffix in ("", "_meta", "_scale") if name + suffix in checkpoint.tensors]
            tensors = checkpoint.read(names)
            found[name] = unpack(Packed24(*(tensors[each] for each in names))) != 0
    return found


@pytest.fixture(scope="module")
def long_text(text_file: Path) -> Path:
    path = text_file.parent / "long.txt"
    path.write_text(text_file.read_text() * 12)
    return path


@pytest.fixture(scope="module")
def exported(
    tiny_models: Callable[[str], Path], long_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """What one process and what several make of each case."""
    root, monkeypatch = tmp_path_factory.mktemp("ranks"), pytest.MonkeyPatch()
    models.write_model(root / "experts", EXPERTS)
    jobs = []
    for name, (model, settings, _) in CASES.items():
        source = root / model if model == "experts" else tiny_models(model)
        whole = {"calibration": str(long_text), "samples": 7, "seqlen": 32, "compute": "float32"} | settings
        with monkeypatch.context() as patch:
            patch.setattr(distill, "BATCH_TOKENS", RANKS * distill.BATCH_TOKENS)
            export(source, root / f"{name}-one", PruneSettings.model_validate(whole))
        jobs.append((str(source), str(root / f"{name}-shared"), whole))
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun("-m", "tests.rank_worker", str(root / "jobs.json"))
    assert done.returncode == 0, done.stderr
    return lambda name: (root / f"{name}-one", root / f"{name}-shared")


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_one_process(name: str, exported: Callable[[str], tuple[Path, Path]]) -> None:
    one, shared = exported(name)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in shared.iterdir())
    before, after = kept(one), kept(shared)
    assert before.keys() == after.keys()
    assert len(before) > 8
    differing = sum(int((before[key] != after[key]).sum()) for key in before)
    assert differing <= CASES[name][2] * sum(mask.numel() for mask in before.values())
    checks = [json.loads((folder / "swiftprune.json").read_text()).get("check") for folder in (one, shared)]
    if name != "none":
        assert checks[0]["pruned"] == pytest.approx(checks[1]["pruned"], rel=0.05)


def test_what_is_not_shared_out_is_refused(tiny_models: Callable[[str], Path], text_file: Path) -> None:
    checkpoint, ranks = Checkpoint(tiny_models("gpt-neox")), Ranks(0, 2)
    for settings, message in (
        ({"refine": ("blocks",)}, "--refine blocks runs in one process, and torchrun started 2"),
        ({"max_perplexity_ratio": 1.5}, "--sparsity auto runs in one process"),
        ({"samples": 1}, "--samples 1: each of 2 processes needs a calibration sequence"),
    ):
        given = PruneSettings.model_validate({"calibration": str(text_file), "seqlen": 32} | settings)
        with pytest.raises(SettingsError, match=message):
            Run(checkpoint, given, ranks=ranks)


def test_a_mistake_ends_all_with_one_message(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    command = str(Path(sys.executable).parent / "swiftprune-export")
    options = ["--out", str(tmp_path / "out"), "--calibration", str(tmp_path / "missing.txt")]
    done = subprocess.run(
        [command, "--devices", "2", str(tiny_models("gpt-neox")), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "missing.txt" in done.stderr
    assert not (tmp_path / "out").exists()
