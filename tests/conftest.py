"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from transformers.utils import logging

from tests import models

logging.disable_progress_bar()
# No deadline for an example: a busy machine is no failure.
hypothesis.settings.register_profile("swiftprune", deadline=None)
hypothesis.settings.load_profile("swiftprune")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(models.TEXT)
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of that name on first use; tests must not write to it."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            models.write_model(folder, (models.SUPPORTED | models.REFUSED)[name])
        return folder

    return get


@pytest.fixture
def tiny_copy(tiny_models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_models("llama-gqa-tied"), tmp_path / "model"))
