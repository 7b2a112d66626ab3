"""The packed format against its own specification, a worked example and torch's converter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from swiftprune.errors import FormatError
from swiftprune.formats.spec import Packed24, WeightSpec, metadata_width, validate
from swiftprune.kernels.packing import keep_mask, pack, prune_and_pack, unpack
from swiftprune.kernels.score_factors import ScoreFactors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@st.composite
def sparse_weights(draw: st.DrawFn) -> Tensor:
    """(N, K) weights with at most two non-zeros of every four, in any dtype, zeros of both signs among them."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 21))
    number = st.floats(-60000, 60000, width=16).filter(lambda value: value != 0)
    rows_of_groups = [
        [
            draw(
                st.permutations(
                    [draw(st.one_of(st.just(0.0), number)), draw(st.one_of(st.just(-0.0), number)), 0.0, -0.0]
                )
            )
            for _ in range(groups)
        ]
        for _ in range(rows)
    ]
    return torch.tensor(rows_of_groups).view(rows, 4 * groups).to(dtype)


@given(sparse_weights())
def test_round_trip_is_exact(weight: Tensor) -> None:
    packed = pack(weight)
    validate(packed)
    assert packed.shape == tuple(weight.shape)
    assert packed.values.shape == (weight.shape[0], weight.shape[1] // 2)
    assert packed.metadata.shape == (weight.shape[0], metadata_width(weight.shape[1]))
    assert packed.spec == WeightSpec((weight.shape[0], weight.shape[1]), weight.dtype)
    assert packed.spec.nbytes == packed.values.nbytes + packed.metadata.nbytes
    assert packed.spec.compression == weight.nbytes / packed.spec.nbytes
    assert torch.equal(keep_mask(packed) | (weight != 0), keep_mask(packed))
    assert keep_mask(packed).view(-1, 4).sum(1).eq(2).all()
    restored = unpack(packed)
    assert restored.dtype == weight.dtype
    assert torch.equal(restored, weight)
    assert not torch.signbit(restored[restored == 0]).any()  # -0.0 became +0.0
    again = pack(restored)
    assert torch.equal(again.values, packed.values)
    assert torch.equal(again.metadata, packed.metadata)


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_example_of_the_specification(dtype: torch.dtype) -> None:
    packed = pack(torch.tensor([[0, 0.5, 0, -1.0, 2.0, 0, 0, 0]], dtype=dtype))
    assert packed.values.tolist() == [[0.5, -1.0, 2.0, 0.0]]
    assert packed.metadata.tolist() == [[0x8D]]


@pytest.mark.parametrize(
    ("group", "nibble"),
    [
        ([1, 1, 0, 0], 0x4),
        ([1, 0, 1, 0], 0x8),
        ([1, 0, 0, 1], 0xC),
        ([0, 1, 1, 0], 0x9),
        ([0, 1, 0, 1], 0xD),
        ([0, 0, 1, 1], 0xE),
        ([0, 0, 0, 0], 0xE),
        ([1, 0, 0, 0], 0x8),
        ([0, 1, 0, 0], 0x9),
        ([0, 0, 1, 0], 0xE),
        ([0, 0, 0, 1], 0xE),
    ],
)
def test_every_group_has_one_encoding(group: list[float], nibble: int) -> None:
    weight = torch.tensor([group], dtype=torch.float32)
    packed = pack(weight)
    assert packed.metadata.tolist() == [[nibble]]  # K = 4: the high half is unused and 0
    assert unpack(packed).tolist() == [group]


@given(st.integers(0, 2**32 - 1))
def test_metadata_is_what_torch_computes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (32, 64), generator=generator).half()
    packed = prune_and_pack(weight, ScoreFactors.of_magnitude(64))
    values, _ = sparse_semi_structured_from_dense_cutlass(unpack(packed))  # type: ignore[no-untyped-call]
    assert torch.equal(packed.values, values)


@pytest.mark.parametrize("count", [3, 4])
def test_packing_never_drops_a_weight(count: int) -> None:
    weight = torch.zeros(3, 12)
    weight[1, 4 : 4 + count] = 1.0
    with pytest.raises(FormatError, match=rf"some\.layer.*row 1, group 1 .*has {count} non-zeros"):
        pack(weight, "some.layer")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(5, 76, dtype=dtype)
    weight[3, 70] = bad
    with pytest.raises(FormatError, match=r"w: row 3, group 17 \(inputs 68\.\.71\)"):
        pack(weight, "w")
    with pytest.raises(FormatError, match="row 3, group 17"):
        prune_and_pack(weight, ScoreFactors.of_magnitude(76), "w")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(2, 6), "in_features = 6 is not a multiple of 4"),
        (torch.zeros(0, 8), "empty"),
        (torch.zeros(8, 0), "empty"),
        (torch.zeros(8), "1 dimensions"),
        (torch.zeros(2, 4, 4), "3 dimensions"),
        (torch.zeros(2, 8, dtype=torch.int8), "int8"),
        (torch.zeros(2, 8, dtype=torch.float64), "float64"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(weight: Tensor, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        pack(weight)


def _good() -> Packed24:
    return prune_and_pack(torch.randn(4, 24, generator=torch.Generator().manual_seed(1)), ScoreFactors.of_magnitude(24))


@pytest.mark.parametrize("nibble", sorted(set(range(16)) - {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}))
@pytest.mark.parametrize("half", [0, 1])
def test_invalid_nibbles_are_refused(nibble: int, half: int) -> None:
    packed = _good()
    byte = int(packed.metadata[2, 1])
    packed.metadata[2, 1] = byte & 0x0F | nibble << 4 if half else byte & 0xF0 | nibble
    message = rf"row 2, group {2 + half} is {nibble:#x}"
    with pytest.raises(FormatError, match=message):
        validate(packed)
    with pytest.raises(FormatError, match=message):
        unpack(packed)


def test_hostile_pairs_are_refused() -> None:
    good = _good()
    odd = pack(torch.zeros(2, 12))
    odd.metadata[1, 1] |= 0xE0
    infinite = _good()
    infinite.values[3, 5] = float("inf")
    cases = {
        "metadata must be": Packed24(good.values, good.metadata[:, :2]),
        "metadata must be .* torch.uint8": Packed24(good.values, good.metadata.to(torch.int16)),
        "metadata must be .*4, 3": Packed24(good.values, good.metadata[:3]),
        "values must be": Packed24(good.values.double(), good.metadata),
        "values must be .*4, 11": Packed24(good.values[:, :11], good.metadata),
        "unused high half .* row 1": odd,
        r"value \(3, 5\) is inf": infinite,
    }
    for message, packed in cases.items():
        with pytest.raises(FormatError, match=message):
            validate(packed)


def test_slices_along_both_dimensions_are_packed_weights() -> None:
    weight = unpack(prune_and_pack(torch.randn(6, 48), ScoreFactors.of_magnitude(48)))
    packed = pack(weight)
    rows = Packed24(packed.values[2:5], packed.metadata[2:5])
    columns = Packed24(packed.values[:, 8:20].contiguous(), packed.metadata[:, 2:5].contiguous())
    assert torch.equal(unpack(rows), weight[2:5])
    assert torch.equal(unpack(columns), weight[:, 16:40])
