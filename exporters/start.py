"""Where `swiftprune-export` starts: how threads wait is chosen before torch, which reads it once, is loaded.

Threads that have done their share of a product spin until the others have. Beside another busy process they take from
it, and from each other, the processors that it and they need: a training step of SmolLM2-135M on two cores went from
1.6 to 8.8 seconds. Spinning for less costs nothing on a quiet machine, and on a busy one none at all is best
(docs/lab-notes.md has the figures).
"""

from __future__ import annotations

import functools
import os
import sys
from typing import NoReturn

import psutil

_SPINS = "20000"
# Of all processors, what others may use of a machine that counts as quiet.
_QUIET_PERCENT = 20.0
_LOOK_SECONDS = 0.2


@functools.cache
def others_percent() -> float | None:
    """Of all processors, what others used as the program started; None on a machine that counts as quiet."""
    used = psutil.cpu_percent(_LOOK_SECONDS)
    return used if used > _QUIET_PERCENT else None


def choose_waiting() -> None:
    """Sets how OpenMP's threads wait, by how busy the machine is now, unless the caller's environment says it."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        return
    if others_percent():
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def is_one_of_several() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start_several(count: int) -> NoReturn:
    """Starts the same command in `count` processes, in the place of this one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    os.execv(sys.executable, [*torchrun, "--no-python", *sys.argv])


def main() -> None:
    choose_waiting()
    from exporters import cli  # brings torch

    cli.main()
