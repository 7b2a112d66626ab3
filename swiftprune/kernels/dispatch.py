"""Which implementation of select, pack and unpack, and which linear backend, runs on this machine."""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.kernels.score_factors import EwmaGains, ScoreFactors

if TYPE_CHECKING:
    from swiftprune.formats.spec import Quantized
    from swiftprune.kernels.base import LinearKernel
    from swiftprune.kernels.plan import Plan

logger = logging.getLogger(__name__)

REFERENCE = "reference"
QUANTIZED_REFERENCE = f"{REFERENCE}-quantized"
SLOW = frozenset((REFERENCE, QUANTIZED_REFERENCE))  # which unpack the weight for every call
DENSE = "dense"  # what a checkpoint holds dense
BACKEND_VARIABLE = "SWIFTPRUNE_BACKEND"
_GOOD_SHAPE = (256, 256)  # which every backend takes


class Kernels(Protocol):
    """What `kernels/reference.py` and `kernels/native.py` both offer; their results are equal bit for bit."""

    def prune_pack(self, weight: Tensor, factors: ScoreFactors, name: str) -> tuple[Tensor, Tensor]: ...

    def pack(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]: ...

    def unpack(self, values: Tensor, metadata: Tensor, name: str) -> Tensor: ...

    def ewma_zscore(self, score: Tensor, mean: Tensor, deviation: Tensor, gains: EwmaGains) -> Tensor: ...

    def kth_value(self, values: Tensor, rank: int) -> float: ...

    def prune_columns(self, weight: Tensor, factor: Tensor, keep: Tensor | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """SparseGPT in the columns of `weight` (N, B) fp32, B <= 128: what becomes of them, and errors, both (N, B).

        What stays is a bool mask (N, B), or (n, m): of every m weights, as they are when they are reached, the n with
        the highest squares over those of the diagonal of `factor` (B, B); of equal ones the first. What goes, over
        `factor`'s diagonal, is its column's error, made up for by the columns behind it.
        """

    def int4_scales(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """(N, S) bfloat16 of `weight` (N, K) fp32 and the `importance` (K,) of its inputs: see `quantize.scales_of`."""

    def round_columns(
        self, weight: Tensor, keep_mask: Tensor, factor: Tensor, scales: Tensor, quantized: Quantized
    ) -> tuple[Tensor, Tensor]:
        """GPTQ within the columns of `weight` (N, B) fp32, B <= 128, under `scales` (N, 1): what is stored, and errors.

        Each column is rounded in order, pruned weights to zero, and what is lacking, over `factor` (B, B)'s diagonal,
        is its error, made up for by the columns behind it. Both results are (N, B).
        """

    def descend_columns(
        self, stored: Tensor, gradient: Tensor, keep_mask: Tensor, gram: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Coordinate descent on 4-bit values that stand for `stored` (N, B) fp32, B <= 128: new codes and weights.

        Each column is set to the level that is best beside all others as they are. `gradient` (N, B) is what remains of
        the weights that are wanted, times the Gram matrix, of which `gram` (B, B) is the part of these columns.
        """


def kernels(device: torch.device | str = "cpu") -> Kernels:
    """What works on tensors of `device`: native kernels on a CPU, where they were built, else the torch reference."""
    from swiftprune.kernels import reference

    return _cpu_kernels() if torch.device(device).type == "cpu" else reference.ReferenceKernels()


@functools.cache
def _cpu_kernels() -> Kernels:
    """The native kernels with the best instruction set of this CPU, or the torch reference, said once, without them."""
    from swiftprune.kernels import native, reference

    if isas := native.supported_isas():
        return native.NativeKernels(isas[0])
    logger.warning(
        "swiftprune was installed without its native kernels (no C++ compiler at install time?); "
        "the torch reference is used instead: same results, several times slower"
    )
    return reference.ReferenceKernels()


def linear_kernel(name: str) -> LinearKernel:
    """The kernel that `linear_backend` has named: one for CPUs, or a plan for GPUs."""
    from swiftprune.kernels.cpu import KERNELS
    from swiftprune.kernels.plan import Plan

    return KERNELS.get(name) or Plan.parse(name)


def linear_backends(
    dtype: torch.dtype, device: torch.device | str = "cpu", quantized: Quantized | None = None
) -> list[str]:
    """Backends of `Linear24` that run weights of `dtype` on `device`, at least of some shapes; the last is `reference`.

    `quantized` is how values are stored, if they are not of that type. On a CPU the fastest is first.
    """
    from swiftprune.kernels import gpu, native

    device = torch.device(device)
    if quantized:
        fast = [f"{isa}-{quantized}" for isa in native.QUANT_ISAS] if device.type == "cpu" else []
        return [*fast, QUANTIZED_REFERENCE]
    if device.type == "cuda":
        reasons = gpu.unsupported_reasons(dtype, _GOOD_SHAPE, torch.cuda.get_device_capability(device))
        return [*(name for name, reason in reasons.items() if reason is None), REFERENCE]
    return [*(native.linear_isas(dtype) if device.type == "cpu" else ()), REFERENCE]


def linear_backend(
    dtype: torch.dtype,
    requested: str | None = None,
    device: torch.device | str = "cpu",
    shape: tuple[int, int] = _GOOD_SHAPE,
    quantized: Quantized | None = None,
) -> str:
    """The backend asked for, else the one that SWIFTPRUNE_BACKEND names, else the fastest for a weight of `shape`.

    On a GPU it may be a plan, as `triton<=64,unpack` (see `plan`). Triton interprets its kernels on a CPU when
    TRITON_INTERPRET=1 is set and they are asked for. Raises SettingsError when the backend is unknown or cannot run
    here: another one never takes its place in silence.
    """
    kernels()  # says so when there are no native ones
    device = torch.device(device)
    asked = requested or os.environ.get(BACKEND_VARIABLE)
    by = f" (asked for by {BACKEND_VARIABLE})" if asked and requested is None else ""
    if quantized:
        return _quantized_backend(dtype, device, quantized, asked, by)
    if device.type == "cuda":
        facts = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        return gpu_backend(dtype, shape, *facts, asked, by)
    known = _cpu_backends()
    if asked not in (None, *known) and os.environ.get("TRITON_INTERPRET") == "1":
        return gpu_backend(dtype, shape, "Triton's interpreter", (8, 0), asked, by)
    available = linear_backends(dtype, device)
    if asked is None:
        return available[0]
    if asked not in known:
        _parsed(asked, by)
    if asked not in available:
        raise SettingsError(
            f"backend {asked!r} cannot run {dtype} on this machine's {device}{by}; available: {', '.join(available)}"
        )
    return asked


def _cpu_backends() -> tuple[str, ...]:
    """Of every CPU that there are kernels for, of values in the type of the inputs."""
    from swiftprune.kernels import native

    return (*native.LINEAR_ISAS, REFERENCE)


def _quantized_backend(
    dtype: torch.dtype, device: torch.device, quantized: Quantized, asked: str | None, by: str
) -> str:
    """Of a weight with quantized values. What is asked for may leave out the ending, `-int8` say."""
    available = linear_backends(dtype, device, quantized)
    if asked is None:
        return available[0]
    named = QUANTIZED_REFERENCE if asked == REFERENCE else asked if "-" in asked else f"{asked}-{quantized}"
    if named not in available:
        raise SettingsError(
            f"backend {asked!r} cannot run {quantized} values on this machine's {device}{by}; "
            f"available: {', '.join(available)}"
        )
    return named


@functools.cache
def gpu_backend(
    dtype: torch.dtype,
    shape: tuple[int, int],
    name: str,
    capability: tuple[int, int],
    asked: str | None = None,
    by: str = "",
) -> str:
    """The backend or plan for a weight of `shape` (N, K) on a GPU of this name: what is asked for, or what is best.

    It is logged once. Raises SettingsError when what is asked for is unknown or cannot run; `by` tells who asked.
    """
    from swiftprune.kernels import gpu, plan

    reasons = gpu.unsupported_reasons(dtype, shape, capability)
    where = f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} on {name}"
    if asked is None:
        if chosen := plan.plan(
            name, capability, dtype, shape, [able for able, reason in reasons.items() if not reason]
        ):
            logger.info("swiftprune: %s: %s (%s)", where, *chosen)
            return str(chosen[0])
        why = "; ".join(sorted({reason for reason in reasons.values() if reason}))
        logger.warning("swiftprune: %s: no GPU backend takes it, so it is unpacked for every call: %s", where, why)
        return REFERENCE
    if asked != REFERENCE:
        for backend in _parsed(asked, by).backends:
            if reason := reasons[backend]:
                raise SettingsError(f"backend {backend!r} cannot run {where}{by}: {reason}")
    logger.info("swiftprune: %s: %s (asked for)", where, asked)
    return asked


def _parsed(text: str, by: str) -> Plan:
    """Raises SettingsError, with all that is known, when it is neither a backend of GPUs nor a plan of some."""
    from swiftprune.kernels import gpu, native
    from swiftprune.kernels.plan import Plan

    try:
        return Plan.parse(text)
    except SettingsError as error:
        if {",", "<"} & set(text):
            raise SettingsError(f"{error}{by}") from error
        known = ", ".join((*_cpu_backends(), *gpu.BACKENDS))
        without = "" if native.LINEAR_ISAS else " (this installation has no native kernels)"
        raise SettingsError(f"unknown backend {text!r}{by}; known: {known}{without}") from error
