"""A third of the architectures that transformers knows, from export to logits; `make arch-sweep` takes all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import arch_sweep

CAME_THROUGH = arch_sweep.came_through(Path(__file__).parents[2] / "docs" / "models.md")


@pytest.mark.parametrize("name", CAME_THROUGH[::3])
def test_architecture(name: str, text_file: Path, tmp_path: Path) -> None:
    outcome = arch_sweep.try_out(name, text_file, tmp_path)
    assert outcome.state == "packed", outcome
