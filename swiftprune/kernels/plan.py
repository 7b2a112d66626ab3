"""Which GPU backend multiplies how many tokens: from a measured table, else from a model of bytes and operations.

The model. A call takes `LAUNCH_SECONDS` a kernel plus the longer of two times: bytes over what the device reads, and
operations over what its tensor cores do. For a weight of N x K in 16 bits (2 N K bytes dense, 9/8 N K packed) and M
tokens (2 M (N + K) bytes of inputs and outputs, 2 M N K operations):

    triton   9/8 N K bytes;               operations at TRITON_SHARE of the dense peak
    unpack   a kernel that reads 9/8 N K and writes 2 N K bytes, then one that reads 2 N K; operations at DENSE_SHARE
    cutlass  9/8 N K bytes;               operations at CUTLASS_SHARE, counted for M in multiples of CUTLASS_TILE

The shares are assumptions, reasoned from figures published for dense and 2:4 products (docs/gpu.md), and no result of
this project. cuSPARSELt is not planned for by the model: it wants a second copy of the weight beside that for few
tokens. A table that was measured may name it.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.formats.spec import Packed24, WeightSpec
from swiftprune.kernels import gpu
from swiftprune.kernels.base import LinearKernel
from swiftprune.kernels.gpu import BACKENDS, CUTLASS, TRITON, UNPACK

TABLE_VARIABLE = "SWIFTPRUNE_GPU_TABLE"
TABLE_VERSION = 1

LAUNCH_SECONDS = 3e-6
READ_SHARE = 0.85  # of the memory's rate
TRITON_SHARE, DENSE_SHARE, CUTLASS_SHARE = 0.4, 0.7, 0.95  # of the dense peak
CUTLASS_TILE = 128
_MODELLED_TOKENS = tuple(2**power for power in range(14))
_NEAR = 2.0  # a measured shape stands for others up to so many times as long, in N and in K


@dataclass(frozen=True)
class GpuModel:
    """A GPU as its data sheet has it. `tera_ops` are 16-bit tensor core operations, dense, in 10^12 a second."""

    name: str
    gb_per_s: float
    tera_ops: float


DATA_SHEETS = (
    GpuModel("A100-SXM4-80GB", 2039, 312),
    GpuModel("A100", 1555, 312),
    GpuModel("A10", 600, 125),
    GpuModel("RTX 3090", 936, 71),
    GpuModel("RTX 4090", 1008, 165),
    GpuModel("L40S", 864, 362),
    GpuModel("L4", 300, 121),
    GpuModel("H200", 4800, 989),
    GpuModel("H100 PCIe", 2039, 756),
    GpuModel("H100", 3350, 989),
    GpuModel("B200", 8000, 2250),
)
"""Looked for in this order in the name that CUDA gives."""
_UNKNOWN = {8: GpuModel("unknown", 1000, 150), 9: GpuModel("unknown", 3350, 989)}


def gpu_model(name: str, capability: tuple[int, int]) -> GpuModel:
    """The data sheet of a device by its name, or one that stands for its generation."""
    words = name.replace("-", " ").split()
    for sheet in DATA_SHEETS:
        if set(sheet.name.replace("-", " ").split()) <= set(words):
            return sheet
    return _UNKNOWN.get(capability[0], DATA_SHEETS[-1])


@dataclass(frozen=True)
class Plan(LinearKernel):
    """Backends of GPUs by tokens: the first whose limit is not below them; the last has none."""

    choices: tuple[tuple[int | None, str], ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self)

    @property
    def buffer_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of its backends together: what has one name is shared."""
        return tuple(sorted({name for backend in self.backends for name in BACKENDS[backend].buffer_names}))

    def prepare(self, packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
        buffers: dict[str, Tensor] = {}
        for backend in sorted(self.backends):
            if not set(BACKENDS[backend].buffer_names) <= set(buffers):
                buffers = BACKENDS[backend].prepare(packed, name) | buffers
        return {name: buffers[name] for name in self.buffer_names}

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """Chooses by the number of tokens, which under a compiler is known here only."""
        if not x.numel():
            return x.new_empty((*x.shape[:-1], out_features))
        backend = BACKENDS[self.backend(x.numel() // x.shape[-1])]
        # Triton launches on the current device, whatever that of its tensors is.
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return backend.apply(x, buffers, bias, out_features)

    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        return gpu.restore(buffers, spec)

    def unpack(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        return gpu.unpack(buffers, spec)

    def backend(self, tokens: int) -> str:
        return next(name for limit, name in self.choices if limit is None or tokens <= limit)

    @property
    def backends(self) -> frozenset[str]:
        return frozenset(name for _, name in self.choices)

    def __str__(self) -> str:
        """As `parse` reads it: `triton` or `triton<=64,unpack`."""
        return ",".join(name if limit is None else f"{name}<={limit}" for limit, name in self.choices)

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> Plan:
        """Raises SettingsError when it names no backend of GPUs, or limits that do not rise to none."""
        choices = []
        for part in text.split(","):
            name, _, limit = part.partition("<=")
            if name not in BACKENDS or (limit and not limit.isdigit()):
                raise SettingsError(f"{text!r} is no plan: {part!r} is not one of {', '.join(BACKENDS)}, or <= tokens")
            choices.append((int(limit) if limit else None, name))
        limits = [math.inf if limit is None else limit for limit, _ in choices]
        if limits != sorted(set(limits)) or limits[-1] != math.inf:
            raise SettingsError(f"{text!r} is no plan: limits must rise, and the last backend has none")
        return cls(tuple(choices))

    @classmethod
    def of_best(cls, tokens: Sequence[int], best: Sequence[str]) -> Plan:
        """From the best at rising numbers of tokens; between two that differ the geometric mean divides."""
        choices: list[tuple[int | None, str]] = []
        for here, after, name, following in zip(tokens, tokens[1:], best, best[1:], strict=False):
            if name != following:
                choices.append((math.isqrt(here * after), name))
        return cls((*choices, (None, best[-1])))


def modelled_seconds(backend: str, model: GpuModel, rows: int, cols: int, tokens: int) -> float:
    """How long a product takes by the model above."""
    weights = rows * cols
    packed, dense, through = WeightSpec((rows, cols), torch.bfloat16).nbytes, 2 * weights, 2 * tokens * (rows + cols)
    rate, peak = READ_SHARE * 1e9 * model.gb_per_s, 1e12 * model.tera_ops
    operations = 2 * tokens * weights
    if backend == TRITON:
        return LAUNCH_SECONDS + max((packed + through) / rate, operations / (TRITON_SHARE * peak))
    if backend == UNPACK:
        product = max((dense + through) / rate, operations / (DENSE_SHARE * peak))
        return 2 * LAUNCH_SECONDS + (packed + dense) / rate + product
    if backend == CUTLASS:
        filled = operations / tokens * -(-tokens // CUTLASS_TILE) * CUTLASS_TILE
        return LAUNCH_SECONDS + max((packed + through) / rate, filled / (CUTLASS_SHARE * peak))
    raise ValueError(f"{backend} is not modelled")


def plan(
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    shape: tuple[int, int],
    able: Collection[str],
) -> tuple[Plan, str] | None:
    """The plan for a weight (N, K) on a device among the backends that are `able`, and where it comes from.

    None when no backend is able. Raises SettingsError when the table that SWIFTPRUNE_GPU_TABLE names cannot be read.
    """
    if measured := _measured(name, dtype, shape):
        cell, source = measured
        best = [backend if backend in able else None for backend in cell["best"]]
        if None not in best:
            return Plan.of_best(cell["tokens"], [b for b in best if b]), source
    modelled = [backend for backend in (TRITON, CUTLASS, UNPACK) if backend in able]
    if not modelled:
        return None
    model = gpu_model(name, capability)
    best_modelled = [
        min(modelled, key=lambda backend: modelled_seconds(backend, model, *shape, tokens))
        for tokens in _MODELLED_TOKENS
    ]
    return Plan.of_best(_MODELLED_TOKENS, best_modelled), f"by the model of bytes and operations for {model.name}"


def _measured(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> tuple[dict[str, Any], str] | None:
    """The cell of the table nearest to `shape`, and what to call it."""
    path = os.environ.get(TABLE_VARIABLE)
    if not path:
        return None
    near: list[tuple[float, dict[str, Any]]] = []
    for cell in _table(path).get(name, ()):
        away = [abs(math.log(have / want)) for have, want in zip((cell["rows"], cell["cols"]), shape, strict=True)]
        if cell["dtype"] == str(dtype).removeprefix("torch.") and max(away) <= math.log(_NEAR):
            near.append((sum(away), cell))
    if not near:
        return None
    cell = min(near, key=lambda pair: pair[0])[1]
    return cell, f"measured in {path} for {cell['rows']}x{cell['cols']}"


@functools.cache
def _table(path: str) -> dict[str, list[dict[str, Any]]]:
    """Cells by device name of a table, as `swiftprune-bench gpu-table` writes it."""
    try:
        table = json.loads(Path(path).read_text())
        if table["version"] != TABLE_VERSION:
            raise SettingsError(f"{path}: is a table of version {table['version']}, not {TABLE_VERSION}: measure again")
        devices = {device: list(cells) for device, cells in table["devices"].items()}
        for cell in (cell for cells in devices.values() for cell in cells):
            unknown = set(cell["best"]) - set(BACKENDS)
            sizes = [*cell["tokens"], cell["rows"], cell["cols"]]
            if (
                unknown
                or len(cell["best"]) != len(cell["tokens"])
                or not cell["best"]
                or min(sizes) < 1
                or not cell["dtype"]
            ):
                raise ValueError(f"a cell is wrong: {cell}")
            if cell["tokens"] != sorted(set(cell["tokens"])):
                raise ValueError(f"tokens must rise: {cell}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path} ({TABLE_VARIABLE}): not a table of GPU backends: {error!r}") from error
    return devices
