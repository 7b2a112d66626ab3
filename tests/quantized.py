"""Random packed weights with 8- and 4-bit values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftprune.formats.spec import Packed24, Quantized

NIBBLES = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8)


def random_packed(rows: int, groups: int, quantized: Quantized, seed: int = 0) -> Packed24:
    """Any bits that the format allows."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    nibbles = F.pad(NIBBLES[numbers(0, 6, rows, groups)], (0, groups % 2))
    metadata = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    if quantized == "int8":
        values, scales = numbers(-127, 128, rows, 2 * groups).to(torch.int8), numbers(-300, 300, rows, 1)
    else:
        values = numbers(0, 256, rows, groups).to(torch.uint8)
        scales = numbers(-300, 300, rows, math.ceil(groups / 32))
    return Packed24(values, metadata, (scales / 4096).bfloat16())
