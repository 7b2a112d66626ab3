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
# Inside swiftprune, what the modules of each folder may import beside those of FOR_ALL.
MAY_IMPORT_INSIDE = {
    "formats": {"formats"},
    "kernels": {"formats", "kernels"},
    "methods": {"formats", "kernels", "methods"},
    "checkpoints": {"checkpoints"},
    "models": {"formats", "checkpoints", "models"},
    "calibration": {"formats", "methods", "checkpoints", "models", "calibration"},
    "stages": {"formats", "kernels", "methods", "checkpoints", "models", "calibration", "stages", "config", "results"},
    "serve": {"formats", "kernels", "checkpoints", "models", "serve"},
}
FOR_ALL = {"errors", "progress", "compute", "ranks"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_at_the_top(path: Path) -> set[str]:
    """Names of modules, and of what may be one, that `path` imports when it is imported itself."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_downwards_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            top = name.partition(".")[0]
            assert top not in MAY_IMPORT or top in MAY_IMPORT[package], f"{path} imports {name}"


def test_the_map_is_complete() -> None:
    assert {path.parent.name for path in (ROOT / "swiftprune").glob("*/__init__.py")} == set(MAY_IMPORT_INSIDE)


@pytest.mark.parametrize("folder", MAY_IMPORT_INSIDE)
def test_folders_import_downwards_only(folder: str) -> None:
    for path in (ROOT / "swiftprune" / folder).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "swiftprune" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT_INSIDE[folder] | FOR_ALL, f"{path} imports {name}"


def test_no_module_imports_itself_through_others() -> None:
    """Imports at the top of modules, those for type checkers aside, have no circle."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
    }
    found = {name: {other for other in imported_at_the_top(path) if other in files} for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, on_the_way: tuple[str, ...]) -> None:
        assert name not in on_the_way, " -> ".join((*on_the_way, name))
        if name not in done:
            for other in found[name]:
                visit(other, (*on_the_way, name))
            done.add(name)

    for name in files:
        visit(name, ())


def test_importing_swiftprune_loads_nothing_heavy() -> None:
    code = (
        "import sys, swiftprune, swiftprune.formats.spec, swiftprune.kernels.linear\n"
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
