"""The machine a result was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel

from swiftprune.sparse24.kernels.native import supported_isas


class Machine(BaseModel):
    """Facts that belong to every result."""

    cpu: str
    cores: int
    threads: int
    """Threads that torch and the native kernels use."""
    memory_gb: float
    isas: list[str]
    """Native kernels that this CPU runs, fastest first; empty when they were not built."""
    system: str
    python: str
    packages: dict[str, str]
    revision: str
    date: str


def this_machine() -> Machine:
    packages = ("swiftprune", "torch", "transformers", "safetensors")
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        isas=supported_isas(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in packages},
        revision=_revision(),
        date=datetime.now(UTC).date().isoformat(),
    )


def _cpu_name() -> str:
    """Name, family and model: virtual machines often hide the first."""
    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "model" in facts else name


def _revision() -> str:
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "not a git checkout"
