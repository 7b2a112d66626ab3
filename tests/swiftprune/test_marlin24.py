"""The marlin-24 layout, against a writer that places one number at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats import marlin24

# Steps of the digits of row n and stored value s, from the fastest index in memory to the slowest, with their sizes.
VALUE_DIGITS = {
    4: [("s", 8, 2), ("n", 4, 2), ("s", 1, 2), ("n", 1, 4), ("s", 2, 4), ("n", 8, 2), ("n", 16, 4)],
    8: [("s", 8, 2), ("s", 1, 2), ("n", 4, 2), ("n", 1, 4), ("s", 2, 4), ("n", 8, 2), ("n", 16, 4)],
}


def place(n: int, s: int, rows: int, bits: int) -> int:
    """Where value `s` of row `n` lies, counted in values."""
    index, step = 0, 1
    for letter, unit, size in VALUE_DIGITS[bits]:
        index += step * ((n if letter == "n" else s) // unit % size)
        step *= size
    return index + n // 64 * 1024 + s // 16 * 16 * rows


def write(values: Tensor, nibbles: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors for `values` (N, K/2), `nibbles` (N, K/4) and `scales` (N, S)."""
    rows, half = values.shape
    words = [0] * (rows * half * bits // 32)
    meta = [0] * (rows * half // 8)
    for n in range(rows):
        for s in range(half):
            at = place(n, s, rows, bits)
            words[at * bits // 32] |= int(values[n, s]) + (1 << bits - 1) << at * bits % 32
        for group in range(half // 2):
            w = group // 4
            bit = [n // 4 % 2, w % 2, n % 2, n // 8 % 2, n // 16 % 2, n // 32 % 2, n // 2 % 2]
            at = sum(value << place for place, value in enumerate(bit)) + n // 64 * 128 + w // 2 * 2 * rows
            meta[at] |= int(nibbles[n, group]) << group % 4 * 4
    order = list(range(rows))
    if scales.shape[1] > 1 and half > 128:
        order = [n // 8 * 8 + n % 2 * 4 + n % 8 // 2 for n in range(rows)]
    return (
        torch.tensor(words, dtype=torch.int64).to(torch.int32).view(half // 16, -1),
        torch.tensor(meta, dtype=torch.int64).to(torch.int16).view(half // 16, -1),
        scales.T[:, order].contiguous(),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols", "groups"), [(64, 32, 1), (128, 96, 1), (64, 256, 2), (64, 384, 3)])
def test_every_number_comes_from_its_place(rows: int, cols: int, groups: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(rows + cols + bits)
    limit = 1 << bits - 1
    values = torch.randint(-limit, limit, (rows, cols // 2), generator=generator)
    nibbles = torch.randint(0, 16, (rows, cols // 4), generator=generator)
    scales = torch.randn(rows, groups, generator=generator).to(torch.float16)
    stored = write(values, nibbles, scales, bits)
    assert marlin24.layout(*(tuple(tensor.shape) for tensor in stored)) == (rows, cols, bits)
    found = marlin24.from_marlin24(*stored, bits)
    assert torch.equal(found[0], values.to(torch.int8))
    assert torch.equal(found[1], (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8))
    assert torch.equal(found[2], scales)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 128), (2, 128), (2, 64)),  # K = 64 has no two groups of 128
        ((2, 64), (2, 64), (1, 32)),  # N = 32
        ((2, 192), (2, 128), (1, 64)),  # 6 bits
        ((2, 128), (3, 128), (1, 64)),
        ((2, 128), (2, 128), (1, 128)),
        ((2, 128), (2, 129), (1, 64)),
        ((2, 128), (256,), (1, 64)),
        ((0, 128), (0, 128), (1, 64)),
        ((2, 0), (2, 0), (1, 0)),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    values, metadata, scales = shapes
    assert marlin24.layout((2, 128), (2, 128), (1, 64)) == (64, 64, 4)
    with pytest.raises(FormatError, match="do not belong together; of a weight"):
        marlin24.layout(values, metadata, scales)
