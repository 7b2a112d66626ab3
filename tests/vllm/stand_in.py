"""Backends of GPUs that only tests know: the reference, on the CPU, under names that nobody else can ask for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftprune.formats.spec import Packed24
from swiftprune.kernels import gpu, packing


class StandIn(gpu.GpuBackend):
    """Takes every weight, and remembers how many tokens there were in each call."""

    def __init__(self, name: str) -> None:
        super().__init__(name, ("values", "metadata"))
        self.tokens: list[int] = []

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        self.tokens.append(x.numel() // x.shape[-1])
        return F.linear(x, packing.unpack(Packed24(buffers["values"], buffers["metadata"])), bias)

    def unsupported_reason(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        return None


FEW, MANY = StandIn("test-only-few"), StandIn("test-only-many")
MOST_OF_FEW = 4
PLAN = f"{FEW.name}<={MOST_OF_FEW},{MANY.name}"
OTHER_WAY = f"{MANY.name}<={MOST_OF_FEW},{FEW.name}"


def install() -> None:
    """The entry point by which vLLM loads plugins, in every process that it starts."""
    gpu.BACKENDS.update({backend.name: backend for backend in (FEW, MANY)})
