"""The models that benchmarks can make for themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

from runtime_bench import demo_data, synthetic
from swiftprune.errors import SettingsError
from swiftprune.progress import ProgressCallback, no_progress

DEMO_MODEL = "smollm2-135m"
NAMES = (DEMO_MODEL, *synthetic.SHAPES)


def fetch(name: str, folder: Path, progress: ProgressCallback = no_progress) -> Path:
    """The dense checkpoint of one of `NAMES`, made under `folder` on first use. Raises SettingsError for others."""
    if name == DEMO_MODEL:
        return demo_data.fetch(folder, progress).model
    if name not in synthetic.SHAPES:
        raise SettingsError(f"{name!r} is neither a folder nor one of: {', '.join(NAMES)}")
    made = folder / name
    if not made.exists():
        synthetic.write(name, made)
    if not list(made.glob("tokenizer*")):  # engines ask for one; any will do
        for path in demo_data.fetch(folder, progress).model.glob("tokenizer*"):
            shutil.copy(path, made)
    return made
