"""The machine a result was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import Field

from exporters.console import installed_versions
from runtime_bench.stored import Stored
from swiftprune.kernels.native import supported_isas

PACKAGES = ("swiftprune", "torch", "transformers", "safetensors")
_ISA_FLAGS = re.compile(r"avx\w*|amx\w*|fma|f16c|asimd\w*|sve\w*|bf16|i8mm")


class Gpu(Stored):
    """A GPU as its driver describes it. Clocks are read, never set."""

    name: str
    compute_capability: str
    memory_gb: float
    driver: str | None = None
    cuda: str | None = None
    cusparselt: str | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None


class Machine(Stored):
    """Facts that belong to every result."""

    cpu: str
    cores: int
    affinity: list[int] = Field(default_factory=list)
    """The cores that this process may run on."""
    governor: str | None = None
    """Of the clocks; None where the system has no say in them, as in most virtual machines."""
    virtual: bool | None = None
    """Whether a hypervisor runs this machine."""
    cpu_features: list[str] = Field(default_factory=list)
    """Vector and matrix extensions that the CPU announces."""
    gpu: Gpu | None = None
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

    @property
    def key(self) -> str:
        """What must be alike for times to be comparable."""
        gpu = f", {self.gpu.name}" if self.gpu else ""
        return f"{self.cpu}, {len(self.affinity) or self.cores} of {self.cores} cores{gpu}"


def this_machine(packages: Sequence[str] = PACKAGES, gpu: Gpu | None = None) -> Machine:
    """The facts of this machine, with the versions of those of `packages` that are installed."""
    cpu = _cpuinfo()
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return Machine(
        cpu=_cpu_name(cpu),
        cores=os.cpu_count() or 1,
        affinity=sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        governor=governor.read_text().strip() if governor.exists() else None,
        virtual="hypervisor" in flags if flags else None,
        cpu_features=[flag for flag in flags if _ISA_FLAGS.fullmatch(flag)],
        gpu=gpu,
        threads=torch.get_num_threads(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        isas=supported_isas(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=installed_versions(packages),
        revision=_revision(),
        date=datetime.now(UTC).date().isoformat(),
    )


def _cpuinfo() -> dict[str, str]:
    """Of the first core."""
    facts: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def _cpu_name(facts: dict[str, str]) -> str:
    """Name, family and model: virtual machines often hide the first."""
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "model" in facts else name


def _revision() -> str:
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return "unknown: git is not installed"
    return run.stdout.strip() or "not a git checkout"
