"""Which implementation of select, pack and unpack, and which linear backend, runs on this machine."""

from __future__ import annotations

import functools
import logging
import os
from typing import Protocol

import torch
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.sparse24.score_factors import EwmaGains, ScoreFactors

logger = logging.getLogger(__name__)

REFERENCE = "reference"
DENSE = "dense"  # what a checkpoint holds dense
BACKENDS = ("avx512_bf16", "avx512", "avx2", "neon", "generic", REFERENCE)
BACKEND_VARIABLE = "SWIFTPRUNE_BACKEND"


class Kernels(Protocol):
    """What `kernels/reference.py` and `kernels/native.py` both offer; their results are equal bit for bit."""

    def prune_pack(self, weight: Tensor, factors: ScoreFactors, name: str) -> tuple[Tensor, Tensor]: ...

    def pack(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]: ...

    def unpack(self, values: Tensor, metadata: Tensor, name: str) -> Tensor: ...

    def surprise(self, score: Tensor, mean: Tensor, deviation: Tensor, gains: EwmaGains) -> Tensor: ...

    def ranked_value(self, values: Tensor, rank: int) -> float: ...


@functools.cache
def kernels() -> Kernels:
    """The native kernels with the best instruction set of this CPU, or the torch reference, said once, without them."""
    from swiftprune.sparse24.kernels import native, reference

    if isas := native.supported_isas():
        return native.NativeKernels(isas[0])
    logger.warning(
        "swiftprune was installed without its native kernels (no C++ compiler at install time?); "
        "the torch reference is used instead: same results, several times slower"
    )
    return reference.ReferenceKernels()


def linear_backends(dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """Backends of `Linear24` that run weights of `dtype` on `device`, fastest first; the last is `reference`."""
    from swiftprune.sparse24.kernels import native

    return [*(native.linear_isas(dtype) if device == "cpu" else ()), REFERENCE]


def linear_backend(dtype: torch.dtype, requested: str | None = None, device: str = "cpu") -> str:
    """The backend asked for, else the one that SWIFTPRUNE_BACKEND names, else the fastest.

    Raises SettingsError when it is unknown or cannot run here: another one never takes its place in silence.
    """
    kernels()  # says so when there are no native ones
    available = linear_backends(dtype, device)
    asked = requested or os.environ.get(BACKEND_VARIABLE)
    if asked is None:
        return available[0]
    if asked not in BACKENDS:
        raise SettingsError(f"unknown backend {asked!r}; known: {', '.join(BACKENDS)}")
    if asked not in available:
        raise SettingsError(
            f"backend {asked!r} cannot run {dtype} on this machine's {device}; available: {', '.join(available)}"
            + (f" (asked for by {BACKEND_VARIABLE})" if requested is None else "")
        )
    return asked
