"""Which implementation of select, pack and unpack runs on this machine."""

from __future__ import annotations

import functools
import logging
from typing import Protocol

from torch import Tensor

from swiftprune.sparse24.score_factors import EwmaGains, ScoreFactors

logger = logging.getLogger(__name__)


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
