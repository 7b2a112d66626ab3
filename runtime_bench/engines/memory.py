"""The most memory that a process has held."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

_RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024


def peak_bytes(pid: int | None = None) -> int:
    """Of resident memory, of this process or another one (Linux only); 0 when it is gone."""
    status = Path(f"/proc/{pid or os.getpid()}/status")
    try:
        # Not ru_maxrss, which a new process inherits from the one that started it.
        return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        return 0 if pid else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RUSAGE_UNIT
