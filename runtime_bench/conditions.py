"""Whether the machine was quiet while something was measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from pydantic import Field

from runtime_bench.stored import Stored

STEAL_LIMIT = 0.02
OTHERS_LIMIT = 0.15
FREQUENCY_LIMIT = 0.15
SPREAD_LIMIT = 0.10


class Conditions(Stored):
    """What else happened on the machine. Shares are of the time of all its cores."""

    load_before: float
    """Runnable processes, averaged over the minute before."""
    steal: float | None
    """Time that the hypervisor gave to others; None where the system does not say."""
    others: float
    """Time that processes other than the benchmark's own used."""
    frequency_mhz: tuple[float, float] | None
    """Lowest and highest seen of any core, at the beginning and the end; None where the system does not say."""
    seconds: float = 0.0
    warnings: list[str] = Field(default_factory=list)
    """Why the figures deserve less trust, in words; empty on a quiet machine."""


class Watch:
    """Filled when its `watch` ends; without warnings, which `judged` adds once the times are known."""

    result: Conditions | None = None


@contextmanager
def watch() -> Iterator[Watch]:
    """Notes load, steal time, other processes and frequencies between its beginning and its end.

    What children used is known once they have been waited for, so start and end them inside.
    """
    seen = Watch()
    load, cpu, own, clocks = os.getloadavg()[0], psutil.cpu_times(), os.times(), _frequencies()
    yield seen
    cpu_end, own_end, clocks = psutil.cpu_times(), os.times(), clocks + _frequencies()
    elapsed = own_end.elapsed - own.elapsed
    whole = max(elapsed * (os.cpu_count() or 1), 1e-9)
    mine = sum(own_end[:4]) - sum(own[:4])
    idle = _idle(cpu_end) - _idle(cpu)
    busy = sum(cpu_end) - sum(cpu) - idle
    steal = getattr(cpu_end, "steal", None)
    stolen = None if steal is None else (steal - cpu.steal) / whole
    seen.result = Conditions(
        load_before=round(load, 2),
        steal=None if stolen is None else round(max(stolen, 0.0), 4),
        others=round(max((busy - mine) / whole - (stolen or 0.0), 0.0), 4),
        frequency_mhz=(min(clocks), max(clocks)) if clocks else None,
        seconds=round(elapsed, 1),
    )


def judged(seen: Conditions, spreads: dict[str, float] | None = None) -> Conditions:
    """`seen` with its warnings. `spreads` are half interquartile ranges over medians, by the name of what was timed."""
    warnings = []
    if seen.steal is not None and seen.steal > STEAL_LIMIT:
        warnings.append(f"the hypervisor gave {seen.steal:.0%} of the processor time to others")
    if seen.others > OTHERS_LIMIT:
        warnings.append(f"other processes used {seen.others:.0%} of the processor time")
    if seen.load_before > (os.cpu_count() or 1):
        warnings.append(f"the machine was busy before: load {seen.load_before:g}")
    if seen.frequency_mhz and seen.frequency_mhz[0] < (1 - FREQUENCY_LIMIT) * seen.frequency_mhz[1]:
        warnings.append("core clocks went from {:.0f} to {:.0f} MHz".format(*seen.frequency_mhz))
    noisy = {name: spread for name, spread in (spreads or {}).items() if spread > SPREAD_LIMIT}
    if noisy:
        worst = max(noisy, key=lambda name: noisy[name])
        warnings.append(
            f"{len(noisy)} of {len(spreads or {})} times spread by more than {SPREAD_LIMIT:.0%}, "
            f"most of all {worst}: {noisy[worst]:.0%}"
        )
    return seen.model_copy(update={"warnings": warnings})


def _frequencies() -> list[float]:
    """MHz of each core now."""
    try:
        return [core.current for core in psutil.cpu_freq(percpu=True) or []]
    except (OSError, NotImplementedError):
        return []


def _idle(times: object) -> float:
    return float(getattr(times, "idle", 0.0)) + float(getattr(times, "iowait", 0.0))
