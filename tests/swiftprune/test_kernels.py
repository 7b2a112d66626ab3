"""Native kernels against the torch reference: equal bit for bit, on every instruction set this CPU has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats.spec import Quantized
from swiftprune.kernels.native import NativeKernels, supported_isas
from swiftprune.kernels.reference import ReferenceKernels
from swiftprune.kernels.score_factors import EwmaGains, ScoreFactors

REFERENCE = ReferenceKernels()
ISAS = supported_isas()


def test_native_kernels_were_built() -> None:
    assert "generic" in ISAS


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, ScoreFactors]:
    """A weight with many ties, zeros of both signs, subnormals and large values, and factors of any of the forms."""
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    rows, cols = draw(st.integers(1, 9)), 4 * draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["ties", "normal", "wide"]))
    if kind == "ties":
        weight = torch.randint(-3, 4, (rows, cols), generator=generator) * torch.tensor(-0.25)
    else:
        weight = torch.randn(rows, cols, generator=generator)
        if kind == "wide":
            weight = weight * 10.0 ** torch.randint(-9, 4, (rows, cols), generator=generator)
    column = torch.rand(cols, generator=generator)
    form = draw(st.sampled_from(["column", "cross", "curvature", "dead"]))
    factors = {
        "column": ScoreFactors(column),
        "cross": ScoreFactors(
            column, row=torch.rand(rows, generator=generator), cross=torch.rand(cols, generator=generator)
        ),
        "curvature": ScoreFactors(column, curvature=torch.rand(rows, generator=generator) / 10),
        "dead": ScoreFactors(column.round()),  # some channels count for nothing: many equal scores of zero
    }[form]
    return weight.to(dtype), factors


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=150)
@given(problem=problems(), threads=st.integers(1, 5))
def test_select_pack_unpack_equal_the_reference(isa: str, problem: tuple[Tensor, ScoreFactors], threads: int) -> None:
    weight, factors = problem
    kernels = NativeKernels(isa, threads)
    expected = REFERENCE.prune_pack(weight, factors, "w")
    for got, want in zip(kernels.prune_pack(weight, factors, "w"), expected, strict=True):
        assert torch.equal(got, want)
    dense = REFERENCE.unpack(*expected, "w")
    assert torch.equal(kernels.unpack(*expected, "w"), dense)
    for got, want in zip(kernels.pack(dense, "w"), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_all_bit_patterns_of_a_tie_keep_the_lower_positions(isa: str, dtype: torch.dtype) -> None:
    """Q4_1 weights tie exactly: of equal |w|, the lower positions stay, whatever the signs."""
    signs = torch.tensor([[1 - 2 * (i >> bit & 1) for bit in range(4)] for i in range(16)], dtype=dtype)
    values, metadata = NativeKernels(isa).prune_pack(signs, ScoreFactors.of_magnitude(4), "w")
    assert torch.equal(values, signs[:, :2])
    assert metadata.tolist() == [[0b0100]] * 16


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_zero_never_takes_the_place_of_another_weight(isa: str, dtype: torch.dtype) -> None:
    """Scores of 0 tie with those of zeros: of dead channels, of a row's only weight, of squares that underflow."""
    weight = torch.zeros(9, 64, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for row in weight.view(9, 16, 4).unbind():
        for group in row:
            group[torch.randperm(4, generator=generator)[:2]] = torch.rand(2, generator=generator).to(dtype) + 0.5
    alone = torch.zeros(1, 64, dtype=dtype)
    alone[0, 39] = 0.5
    tiny = torch.tensor([[0, -0.0, 0, torch.finfo(dtype).smallest_normal] * 16], dtype=dtype)
    for sparse, factors in (
        (weight, ScoreFactors(torch.zeros(64))),
        (alone, ScoreFactors(torch.ones(64), curvature=torch.tensor([4.0]))),
        (tiny, ScoreFactors(torch.ones(64), curvature=torch.tensor([1.0]))),
    ):
        kernels = NativeKernels(isa)
        assert torch.equal(kernels.unpack(*kernels.prune_pack(sparse, factors, "w"), "w"), sparse)


@pytest.mark.parametrize("isa", ISAS)
def test_the_first_fault_is_reported_whatever_the_thread_count(isa: str) -> None:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[60, 3] = float("nan")
    weight[17, 40:43] = 1
    weight[17, 60] = float("inf")
    for threads in (1, 2, 3, 64, 100):
        with pytest.raises(FormatError, match=r"row 17, group 10 .* has 3 non-zeros"):
            NativeKernels(isa, threads).pack(weight, "w")
        with pytest.raises(FormatError, match=r"row 17, group 15 .*inf"):
            NativeKernels(isa, threads).prune_pack(weight, ScoreFactors.of_magnitude(64), "w")


@pytest.mark.parametrize("isa", ISAS)
def test_strided_weights_are_read_right(isa: str) -> None:
    weight = torch.randn(48, 33).bfloat16().T[:, ::2]  # (33, 24), neither dimension contiguous
    factors = ScoreFactors(torch.rand(48)[::2])
    assert not weight.is_contiguous()
    for got, want in zip(
        NativeKernels(isa).prune_pack(weight, factors, "w"), REFERENCE.prune_pack(weight, factors, "w"), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@given(rows=st.integers(1, 40), cols=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_surprise_equals_the_reference(isa: str, rows: int, cols: int, seed: int) -> None:
    score = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) ** 3
    mean, gains = score.mean(1), EwmaGains(1 / 8, 1 / 4, 1e-4)
    got = NativeKernels(isa, threads=3).ewma_zscore(score, mean, mean / 2, gains)
    assert torch.equal(got, REFERENCE.ewma_zscore(score, mean, mean / 2, gains))


@pytest.mark.parametrize("isa", ISAS[:1])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300), st.data())
def test_ranked_value_is_the_order_statistic(isa: str, numbers: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(numbers) - 1))
    got = NativeKernels(isa, threads=data.draw(st.integers(1, 4))).kth_value(torch.tensor(numbers), rank)
    assert got == sorted(numbers)[rank]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    pattern=st.sampled_from([(2, 4), (1, 4), (4, 8), (2, 3), (9, 32), None]),
    ties=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    threads=st.integers(1, 4),
)
def test_pruning_by_columns_equals_the_reference(
    isa: str, rows: int, pattern: tuple[int, int] | None, ties: bool, seed: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = pattern[1] if pattern else 1
    cols = group * int(torch.randint(1, 128 // group + 1, (1,), generator=generator))
    weight = torch.randn(rows, cols + 3, generator=generator)[:, 3:]
    factor = torch.randn(cols, cols, generator=generator).triu() / 8
    factor.diagonal().abs_().add_(0.1)
    if ties:
        weight, factor = weight.sign(), torch.eye(cols)
    keep = pattern or torch.rand(rows, cols, generator=generator) < 0.5
    got, want = (
        NativeKernels(isa, threads).prune_columns(weight, factor, keep),
        REFERENCE.prune_columns(weight, factor, keep),
    )
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(rows=st.integers(1, 40), cols=st.integers(1, 128), seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 4))
def test_rounding_equals_the_reference(isa: str, rows: int, cols: int, seed: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernels = NativeKernels(isa, threads)
    weight = torch.randn(rows, 3 * cols, generator=generator) * 10.0 ** torch.randint(
        -40, 30, (rows, 1), generator=generator
    )
    keep = torch.rand(rows, 3 * cols, generator=generator) < 0.5
    weight *= keep
    importance = torch.rand(3 * cols, generator=generator)
    for weighs in (None, importance):
        assert torch.equal(kernels.int4_scales(weight, weighs), REFERENCE.int4_scales(weight, weighs))
    # Views, and weights as large as their scales are.
    x = torch.randn(2 * cols, cols, generator=generator)
    weight, keep, gram = torch.randn(rows, 2 * cols, generator=generator)[:, 1 : cols + 1], keep[:, :cols], x.T @ x
    scales = (torch.randn(rows, 1, generator=generator) / 50).bfloat16()
    quantized: Quantized
    for quantized in ("int8", "int4"):
        arguments = (weight, keep, x[:cols].triu().abs() + 0.1, scales, quantized)
        assert all(map(torch.equal, kernels.round_columns(*arguments), REFERENCE.round_columns(*arguments)))
    descent = (weight, weight @ gram, keep, gram, scales)
    assert all(map(torch.equal, kernels.descend_columns(*descent), REFERENCE.descend_columns(*descent)))


def test_rounding_refuses_what_does_not_belong_together() -> None:
    kernels = NativeKernels(ISAS[0])
    weight, keep, square = torch.zeros(3, 8), torch.ones(3, 8, dtype=torch.bool), torch.eye(8)
    scales = torch.ones(3, 1, dtype=torch.bfloat16)
    for wrong in (
        (weight, keep[:, :7], square, scales),
        (weight, keep.int(), square, scales),
        (weight, keep, torch.eye(7), scales),
        (weight, keep, square, scales.float()),
        (weight, keep, square, scales[:2]),
        (torch.zeros(3, 132), torch.ones(3, 132, dtype=torch.bool), torch.eye(132), scales),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            kernels.round_columns(*wrong, "int4")
    for bad in ((weight, torch.eye(7), (2, 4)), (weight, square, (2, 3)), (weight, square, keep[:2])):
        with pytest.raises(ValueError, match="do not belong together"):
            kernels.prune_columns(*bad)
    with pytest.raises(ValueError, match="differ"):
        kernels.descend_columns(weight[:2], weight, keep, square, scales)
    with pytest.raises(ValueError, match="score factor has shape"):
        kernels.int4_scales(weight, torch.ones(7))


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot run here"):
        NativeKernels("avx1024")
