"""The sparse-24-bitmask format, against numpy's bits and a hand-worked row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats import bitmask
from swiftprune.formats.spec import Packed24
from swiftprune.kernels import packing
from swiftprune.kernels.packing import pack, unpack


def random_24(rows: int, cols: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any number of non-zeros up to two in each group."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, cols // 4, 4, generator=generator)
    kept = torch.rand(groups.shape, generator=generator).argsort(-1)[..., :2]
    mask = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, kept, True)
    return torch.where(mask & (torch.rand(groups.shape, generator=generator) < 0.8), groups, 0).flatten(1).to(dtype)


def dense_of(values: Tensor, mask: Tensor) -> Tensor:
    """By numpy: bit i of byte b is column 8 b + i."""
    bits = torch.from_numpy(np.unpackbits(mask.numpy(), axis=1, bitorder="little").astype(bool))
    weight = torch.zeros(bits.shape, dtype=values.dtype)
    weight[bits] = values.flatten()
    return weight


def test_a_row_by_hand() -> None:
    #                   columns 0  1    2  3     4    5  6  7
    packed = pack(torch.tensor([[0, 0.5, 0, -1.0, 2.0, 0, 0, 0]]))
    stored = bitmask.to_bitmask(packed)
    assert stored["compressed"].tolist() == [[0.5, -1.0, 2.0, 0.0]]
    assert stored["bitmask"].tolist() == [[0b0101_1010]]  # columns 1, 3, 4 and the filled-in 6
    assert stored["shape"].tolist() == [[1], [8]]
    assert bitmask.names("a.b.weight") == {
        "compressed": "a.b.compressed",
        "bitmask": "a.b.bitmask",
        "shape": "a.b.shape",
    }


@given(
    rows=st.integers(1, 9),
    bytes_=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_there_and_back(rows: int, bytes_: int, seed: int, dtype: torch.dtype) -> None:
    weight = random_24(rows, 8 * bytes_, dtype, seed)
    packed = pack(weight)
    stored = bitmask.to_bitmask(packed)
    assert torch.equal(dense_of(stored["compressed"], stored["bitmask"]), weight)
    again = bitmask.from_bitmask(stored["compressed"], stored["bitmask"])
    assert torch.equal(again.values, packed.values)
    assert torch.equal(again.metadata, packed.metadata)


@given(seed=st.integers(0, 2**32 - 1))
def test_any_two_bits_of_a_group_are_read(seed: int) -> None:
    """Stored zeros and -0.0 may stand where another writer put them."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(5, 6, 4, generator=generator).argsort(-1)[..., :2]
    bits = torch.zeros(5, 6, 4, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)
    mask = torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
    values = torch.randint(-1, 2, (5, 12), generator=generator).float() * torch.tensor([1.0, -0.0] * 6)
    stored = bitmask.from_bitmask(values, mask)
    read = unpack(packing.canonical(stored))
    assert torch.equal(unpack(stored), read)
    assert torch.equal(read, dense_of(values, mask))
    assert not torch.signbit(read[read == 0]).any()


@pytest.mark.parametrize("byte", [0b0000_0011, 0b0111_0011, 0b1111_0011, 0b0011_0001, 0])
def test_other_numbers_of_bits_are_refused(byte: int) -> None:
    stored = bitmask.to_bitmask(pack(random_24(3, 24, torch.float32, 0)))
    stored["bitmask"][1, 2] = byte
    with pytest.raises(
        FormatError, match=r"layer\.0: the bitmask of row 1, columns 16 to 23 is 0b[01]{8}, which has not"
    ):
        bitmask.from_bitmask(stored["compressed"], stored["bitmask"], "layer.0")


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    stored = bitmask.to_bitmask(pack(random_24(3, 24, torch.float32, 0)))
    for mask in (stored["bitmask"][:2], stored["bitmask"].int(), stored["bitmask"].flatten()):
        with pytest.raises(FormatError, match="do not belong together"):
            bitmask.from_bitmask(stored["compressed"], mask)
    with pytest.raises(FormatError, match="12 is not a multiple of 8"):
        bitmask.to_bitmask(Packed24(torch.zeros(1, 6), torch.tensor([[0xEE, 0x0E]], dtype=torch.uint8)))
