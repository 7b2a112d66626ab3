"""How long stages take, and how far they are."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from swiftprune.progress import ProgressCallback


@dataclass
class StageClock:
    """Seconds spent in each stage, over all blocks."""

    wait: Callable[[], None] = lambda: None
    """Until a device has done what it was given."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            self.wait()
        finally:
            self.seconds[stage] += time.perf_counter() - start


class Tick:
    """Counts forwards of one block into the progress of the whole run."""

    def __init__(self, progress: ProgressCallback, start: int, total: int, stage: str = "prune") -> None:
        self._progress, self._done, self._total, self._stage = progress, start, total, stage

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._stage, self._done, self._total)

    def to_end(self, blocks: int, steps: int) -> None:
        self._progress(self._stage, blocks * steps, self._total)
