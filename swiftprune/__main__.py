"""Runs a Python tool that imports nothing of its user's, so that it loads packed checkpoints:

python -m swiftprune lm_eval --model hf --model_args pretrained=./my-model-2of4 --tasks arc_easy
"""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

_USAGE = "usage: python -m swiftprune COMMAND [ARGUMENTS], a Python tool, lm_eval say, that is to load packed models"


def run(command: str, arguments: list[str]) -> None:
    """Runs a Python tool, by the name that a shell finds it by, in this process, where the format is registered."""
    path = shutil.which(command)
    if path is None and not Path(command).is_file():
        sys.exit(f"{command}: no such command; give the name of a tool that is written in Python, or of a script")
    sys.argv = [command, *arguments]
    runpy.run_path(path or command, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(_USAGE)
    run(sys.argv[1], sys.argv[2:])
