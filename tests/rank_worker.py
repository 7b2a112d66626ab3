"""What each process does that test_ranks.py starts by torchrun: the exports of a JSON file, one after the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from exporters import export
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.ranks import joined
from swiftprune.stages.run import follow


def main() -> None:
    torch.set_num_threads(1)
    with joined() as ranks:
        for source, out, settings in json.loads(Path(sys.argv[1]).read_text()):
            if ranks.is_first:
                export(source, out, PruneSettings.model_validate(settings), ranks=ranks)
            else:
                follow(Checkpoint.open(source), ranks)


if __name__ == "__main__":
    main()
