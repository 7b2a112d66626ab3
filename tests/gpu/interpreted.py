"""What the Triton kernels compute, in Triton's interpreter, against float64. Run by test_triton.py.

Triton decides on import whether it interprets, so this needs a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftprune.kernels import reference, semi_structured, triton_linear
from swiftprune.kernels.triton_linear import Config
from tests.gpu.weights import packed_pair, random_weight

DTYPES = {torch.float16: 5e-4, torch.bfloat16: 8e-3}
"""Relative Frobenius error of sums that are rounded once, at most; the interpreter cuts bfloat16 off."""
SMALL = {
    "vector": Config("", 1, "vector", (4, 8, 16), 4, 2, 2),
    "dot": Config("", 1, "dot", (16, 16, 4), 4, 2, 2),
}
"""Of small tiles, so that small weights take several."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", SMALL)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([1, 2, 3, 9, 16, 36, 63, 64, 130]),
    tokens=st.integers(1, 20),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_equal_those_in_float64(
    kernel: str, dtype: torch.dtype, rows: int, width: int, tokens: int, with_bias: bool, seed: int
) -> None:
    tokens = min(tokens, 4) if kernel == "vector" else tokens
    weight = random_weight(rows, 8 * width, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8 * width, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    y = triton_linear.linear24(x, *packed_pair(weight), bias, config=SMALL[kernel])
    want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    terms = (x.double().square() @ weight.double().square().T).sum().sqrt()
    assert y.dtype == dtype
    assert (y.double() - want).norm() <= DTYPES[dtype] * torch.maximum(want.norm(), terms)


@pytest.mark.parametrize("kernel", SMALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_which_values_meet_which_inputs(dtype: torch.dtype, kernel: str) -> None:
    """Small whole numbers: every sum is exact, over several shares of K, and every element is written."""
    generator = torch.Generator().manual_seed(1)
    weight = random_weight(19, 8 * 130, torch.float32).mul(2).round().clamp(-2, 2).to(dtype)
    x = torch.randint(-2, 3, (3, 8 * 130), generator=generator).to(dtype)
    config = SMALL[kernel]
    shares, share = triton_linear.shares_of(config, 19, 130, 3, 4)
    assert shares > 1
    assert shares * share >= 130 > (shares - 1) * share
    poison = torch.full((shares + 1, 3, 19), float("nan"))  # freed at once: the next allocations get this memory
    del poison
    assert torch.equal(
        triton_linear.linear24(x, *packed_pair(weight), config=config).double(), x.double() @ weight.double().T
    )


@pytest.mark.parametrize("kernel", SMALL)
def test_all_positions(kernel: str) -> None:
    """A weight for each of the six pairs, and each pair in either half of a byte; inputs tell the places apart."""
    nibbles = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
    metadata = torch.tensor([[low | high << 4] for low in nibbles for high in nibbles], dtype=torch.uint8)
    values = torch.tensor([[1.0, 2, 4, 8]]).repeat(36, 1).half()
    x = torch.tensor([[1.0, 3, 5, 7, 11, 13, 17, 19]]).half()
    want = [
        x[0, low & 3] + 2 * x[0, low >> 2] + 4 * x[0, 4 + (high & 3)] + 8 * x[0, 4 + (high >> 2)]
        for low in nibbles
        for high in nibbles
    ]
    assert triton_linear.linear24(x, values, metadata, config=SMALL[kernel]).tolist() == [[float(y) for y in want]]


@pytest.mark.parametrize("kernel", SMALL)
def test_int8_values_with_scales(kernel: str) -> None:
    weight = random_weight(21, 8 * 70, torch.float32)
    values, metadata = packed_pair(weight)
    quantized, scale = semi_structured.quantize_rows(values, torch.int8)
    bias = torch.randn(21).half()
    x = torch.randn(3, 8 * 70).half()
    y = triton_linear.linear24(x, quantized, metadata, bias, scale, SMALL[kernel])
    numbers = reference.scatter(quantized.double(), reference.stored_positions(quantized, metadata))
    want = x.double() @ (numbers * scale.double()[:, None]).T + bias.double()
    assert (y.double() - want).norm() <= DTYPES[torch.float16] * want.norm()


@pytest.mark.parametrize(("rows", "cols"), [(1, 8), (33, 8 * 65), (16, 8 * 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking(rows: int, cols: int, dtype: torch.dtype) -> None:
    weight = random_weight(rows, cols, dtype)
    assert torch.equal(triton_linear.unpack24(*packed_pair(weight)), weight)


def test_inputs_of_other_shapes_and_memory() -> None:
    weight = random_weight(9, 64, torch.float16)
    pair = packed_pair(weight)
    x = torch.randn(2, 3, 64).half()
    for given_x in (x, x.transpose(0, 1), torch.randn(1 + x.numel()).half()[1:].view(2, 3, 64)):
        y = triton_linear.linear24(given_x, *pair, config=SMALL["dot"])
        assert y.shape == (*given_x.shape[:-1], 9)
        assert torch.allclose(y.double(), given_x.double() @ weight.double().T, atol=2e-2)
