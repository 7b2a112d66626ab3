"""Layouts and calls of torch's 2:4 operators: bits against torch's own converter, products on stand-in operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from swiftprune.errors import FormatError
from swiftprune.formats import cutlass
from swiftprune.kernels import semi_structured
from tests.gpu.weights import masked, packed_pair, random_weight

MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (16, 128)}


@pytest.mark.parametrize("dtype", MULTIPLES)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 9), zeros=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_cutlass_layout_is_torchs_bit_for_bit(
    dtype: torch.dtype, rows: int, columns: int, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows * MULTIPLES[dtype][0], columns * MULTIPLES[dtype][1])
    weight = masked(torch.randn(shape, generator=generator) * 30, generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < zeros] = 0  # groups with fewer than two
    values, metadata = packed_pair(weight)
    want_values, want_metadata = sparse_semi_structured_from_dense_cutlass(weight)  # type: ignore[no-untyped-call]
    got_values, got_metadata = cutlass.to_cutlass(values, metadata)
    assert torch.equal(got_values, want_values)
    assert got_metadata.dtype == want_metadata.dtype
    assert torch.equal(got_metadata, want_metadata)
    assert torch.equal(cutlass.from_cutlass(got_values, got_metadata)[1], metadata)


def test_cutlass_words_by_hand() -> None:
    """64 weights in a row are 16 groups, so four words; all groups keep places 0 and 1 (nibble 4) but these two.

    Row 0, group 0 keeps 2 and 3 (nibble E): its word, row 0 word 0, is 0x444E. Row 8, group 4 keeps 1 and 3 (nibble D):
    row 8 word 1 is 0x444D. In CUTLASS' order row 8 stands at place 1, and the block of rows 0 and 1 by words 0 and 1
    is transposed. Row 0 word 0 stays first. Row 8 word 1 is on the diagonal and stays fourth, in the first column pair.
    Row 8, group 0 keeps 0 and 3 (nibble C): row 8 word 0, 0x444C, changes places with row 0 word 1.
    """
    weight = torch.zeros(32, 64)
    weight.view(32, 16, 4)[..., :2] = 1
    for row, group, places in ((0, 0, (2, 3)), (8, 4, (1, 3)), (8, 0, (0, 3))):
        weight.view(32, 16, 4)[row, group] = torch.zeros(4).index_fill(0, torch.tensor(places), 1)
    _, words = cutlass.to_cutlass(*packed_pair(weight.half()))
    flat = [word & 0xFFFF for word in words.flatten().tolist()]
    assert flat[:4] == [0x444E, 0x444C, 0x4444, 0x444D]
    assert set(flat[4:]) == {0x4444}


@pytest.mark.parametrize(
    ("backend", "shape", "dtype", "message"),
    [
        ("cutlass", (48, 64), torch.float16, r"multiples of \(32, 64\), not \(48, 64\)"),
        ("cutlass", (32, 96), torch.bfloat16, r"multiples of \(32, 64\)"),
        ("cutlass", (16, 64), torch.int8, r"multiples of \(16, 128\)"),
        ("cutlass", (32, 64), torch.float32, "does not take float32"),
        ("cutlass", (32, 64), torch.float8_e4m3fn, "does not take float8_e4m3fn"),
        ("cusparselt", (16, 24), torch.float16, r"multiples of \(16, 16\)"),
        ("cusparselt", (32, 48), torch.int8, r"multiples of \(32, 32\)"),
        ("cusparselt", (16, 32), torch.float8_e4m3fn, r"multiples of \(32, 32\)"),
        ("cusparselt", (32, 32), torch.float32, "does not take float32"),
    ],
)
def test_shapes_that_are_refused(backend: str, shape: tuple[int, int], dtype: torch.dtype, message: str) -> None:
    values, metadata = torch.zeros(shape[0], shape[1] // 2).to(dtype), torch.zeros(shape[0], shape[1] // 8).byte()
    lay_out = cutlass.to_cutlass if backend == "cutlass" else semi_structured.compress_cusparselt
    with pytest.raises(FormatError, match=f"^down: torch's {backend} .*{message}"):
        lay_out(values, metadata, "down")


@pytest.mark.usefixtures("cuda_operators")
@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 33])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_and_biases(dtype: torch.dtype, with_bias: bool, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight = random_weight(96, 128, dtype)
    x = torch.randn(tokens, 128, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if with_bias else None
    values, metadata = packed_pair(weight)
    want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(dtype)
    assert torch.equal(semi_structured.cutlass_linear(x, *cutlass.to_cutlass(values, metadata), bias), want)
    compressed = semi_structured.compress_cusparselt(values, metadata)
    assert torch.equal(semi_structured.cusparselt_linear(x, compressed, bias), want)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), power=st.integers(-30, 30), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize(("dtype", "step"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
def test_quantized_rows_are_near(
    dtype: torch.dtype, step: float, rows: int, columns: int, power: int, seed: int
) -> None:
    """int8: off by half a step, of which the largest has 127. fp8: by a sixteenth of itself, or half its least step."""
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    numbers[0] = 0
    quantized, scale = semi_structured.quantize_rows(numbers, dtype)
    assert quantized.dtype == dtype
    assert scale[0] == 1
    assert not quantized[0].float().any()
    largest = numbers.abs().amax(1, keepdim=True)
    allowed = largest * step if dtype == torch.int8 else numbers.abs() * step + largest / 448 * 2**-10
    assert ((quantized.double() * scale.double()[:, None] - numbers).abs() <= allowed * 1.001).all()
    assert (quantized.float().abs().amax(1)[1:] == (127 if dtype == torch.int8 else 448)).all()


class Searching:
    """Counts searches and says 3; remembers which algorithm a product was asked to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.searched: list[int] = []
        self.capturing = False
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", self.search)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(semi_structured, "_algorithms", {})

    def search(self, compressed: Tensor, dense: Tensor, **_: object) -> int:
        self.searched.append(dense.shape[1])
        return 3


def test_algorithms_are_searched_once_for_a_shape_and_never_while_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)
        dtype = torch.float16
        shape = (32, 36)

    searching = Searching(monkeypatch)
    for capturing, tokens, algorithm, searched in [
        (True, 16, 0, []),
        (False, 16, 3, [16]),
        (False, 16, 3, [16]),
        (True, 16, 3, [16]),
        (False, 24, 3, [16, 24]),
        (False, 32, 3, [16, 24]),
    ]:
        searching.capturing = capturing
        dense = torch.zeros(64, tokens)
        assert semi_structured._algorithm(OnGpu(), dense, None) == algorithm  # type: ignore[arg-type]
        assert searching.searched == searched
