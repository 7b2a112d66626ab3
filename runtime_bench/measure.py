"""Side-by-side timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from pydantic import BaseModel

from runtime_bench.statistics import quantile, spread


class Timing(BaseModel):
    """Seconds of every run of one contestant, in order."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """The seconds that `share` of the runs stayed below, interpolated."""
        return quantile(self.seconds, share)

    @property
    def spread(self) -> float:
        """Half of the interquartile range over the median."""
        return spread(self.seconds)


def interleaved(contestants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Times all contestants in turn, `rounds` times, so that a slow spell of the machine hits each alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_index in range(-warmup, rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_index >= 0:
                seconds[name].append(elapsed)
    return {name: Timing(seconds=values) for name, values in seconds.items()}
