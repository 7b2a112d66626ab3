"""Imports go one way, and importing swiftprune stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "swiftprune": {"swiftprune"},
    "exporters": {"swiftprune", "exporters"},
    "runtime_bench": {"swiftprune", "exporters", "runtime_bench"},
}
STAGES_BELOW = {"sparse24": {"sparse24"}, "pruning": {"sparse24", "pruning"}, "serve": {"sparse24", "pruning", "serve"}}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_downwards_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            top = name.partition(".")[0]
            assert top not in MAY_IMPORT or top in MAY_IMPORT[package], f"{path} imports {name}"


@pytest.mark.parametrize("stage", STAGES_BELOW)
def test_stages_import_downwards_only(stage: str) -> None:
    for path in (ROOT / "swiftprune" / stage).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "swiftprune" and len(parts) > 1 and parts[1] in STAGES_BELOW:
                assert parts[1] in STAGES_BELOW[stage], f"{path} imports {name}"


def test_importing_swiftprune_loads_nothing_heavy() -> None:
    code = (
        "import sys, swiftprune, swiftprune.sparse24.format, swiftprune.sparse24.linear\n"
        "swiftprune.pack\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sorted({'transformers', 'vllm', 'onnxruntime', 'onnx', 'triton', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_every_public_name_is_there() -> None:
    import swiftprune

    for name in swiftprune.__all__:
        assert getattr(swiftprune, name) is not None
    assert callable(swiftprune.prune)
    with pytest.raises(AttributeError, match="nothing"):
        _ = swiftprune.nothing
