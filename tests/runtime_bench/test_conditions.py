"""Noise: what the machine did meanwhile, and when it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple

import psutil
import pytest

from runtime_bench import conditions
from runtime_bench.conditions import Conditions, judged

QUIET = Conditions(load_before=0.1, steal=0.0, others=0.02, frequency_mhz=(2950, 3000))


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"steal": 0.05}, "the hypervisor gave 5% of the processor time to others"),
        ({"others": 0.5}, "other processes used 50% of the processor time"),
        ({"load_before": 30.0}, "the machine was busy before: load 30"),
        ({"frequency_mhz": (1200.0, 3000.0)}, "core clocks went from 1200 to 3000 MHz"),
    ],
)
def test_noise_is_said(change: dict[str, object], warning: str) -> None:
    assert judged(QUIET).warnings == []
    assert judged(QUIET.model_copy(update=change)).warnings == [warning]


def test_what_the_system_does_not_say_is_no_warning() -> None:
    assert judged(QUIET.model_copy(update={"steal": None, "frequency_mhz": None})).warnings == []


def test_spread_names_the_worst() -> None:
    (warning,) = judged(QUIET, {"a": 0.05, "b": 0.2, "c": 0.3}).warnings
    assert warning == "2 of 3 times spread by more than 10%, most of all c: 30%"


def test_shares_are_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on four cores: 8 s of our own and our children's, 12 s of others, 4 s stolen."""
    counters = namedtuple("counters", ["user", "system", "idle", "iowait", "steal"])
    cpu = iter([counters(100, 10, 500, 5, 1), counters(118, 12, 516, 5, 5)])
    own = iter([os.times_result((1, 1, 1, 1, 1000)), os.times_result((4, 2, 4, 2, 1010))])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(cpu))
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    monkeypatch.setattr(psutil, "cpu_freq", lambda percpu: [])
    with conditions.watch() as seen:
        pass
    assert seen.result
    assert (seen.result.seconds, seen.result.load_before, seen.result.frequency_mhz) == (10, 0.5, None)
    assert seen.result.steal == pytest.approx(4 / 40)
    assert seen.result.others == pytest.approx(12 / 40)


def test_this_machine_says_something() -> None:
    with conditions.watch() as seen:
        subprocess.run([sys.executable, "-c", "sum(range(1_000_000))"], check=True)
    assert seen.result
    assert seen.result.seconds >= 0
    assert 0 <= seen.result.others <= 1
