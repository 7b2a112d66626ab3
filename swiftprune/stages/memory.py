"""How much memory this process can still take, by the machine, a container's limit and the process's own."""

from __future__ import annotations

from pathlib import Path

import psutil

from swiftprune.compute import Compute

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(compute: Compute) -> int:
    """Of a GPU its free memory. Else the least of what the machine has free, its control group leaves, and the process
    may still map."""
    if not compute.on_cpu:
        return compute.free_bytes()
    return min([int(psutil.virtual_memory().available), *_left_of_group(), *_left_of_process()])


def _left_of_group() -> list[int]:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return []
    return [] if limit == "max" else [max(0, int(limit) - int(used))]


def _left_of_process() -> list[int]:
    try:
        import resource
    except ImportError:  # not on Windows
        return []
    found = psutil.Process().memory_info()
    used = {resource.RLIMIT_AS: found.vms, resource.RLIMIT_DATA: getattr(found, "data", found.rss)}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    return [max(0, limit - used[kind]) for kind, limit in limits.items() if limit != resource.RLIM_INFINITY]
