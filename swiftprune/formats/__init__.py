"""How checkpoints store packed weights: a format is a file here, and an entry of FORMATS."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from swiftprune.formats.bitmask import BitmaskFormat
from swiftprune.formats.cutlass import Cutlass24
from swiftprune.formats.packed24 import PackedFormat
from swiftprune.formats.spec import Packed24, Quantized


class CheckpointFormat(Protocol):
    """How a checkpoint stores a packed weight, and what its config.json says of that."""

    def unsupported_reason(self, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Why a weight of this shape (N, K) and dtype cannot be stored so, or None when it can."""
        ...

    def names(self, weight: str) -> list[str]:
        """The tensors that stand for the weight of that name."""
        ...

    def encode(self, weight: str, packed: Packed24) -> dict[str, Tensor]:
        """Those tensors, by name."""
        ...

    def decode(self, weight: str, tensors: dict[str, Tensor]) -> Packed24 | None:
        """The weight that `encode` made `tensors` of; None when they do not hold it packed."""
        ...

    def quantization_config(self, dense: list[str], quantized: Quantized | None = None) -> dict[str, Any]:
        """What config.json declares; `dense` names the linears that are not packed."""
        ...


FORMATS: dict[str, CheckpointFormat] = {
    "packed": PackedFormat(),
    "torch": Cutlass24(),
    "sparse24-bitmask": BitmaskFormat(),
}
"""By the name that --target knows it under."""
