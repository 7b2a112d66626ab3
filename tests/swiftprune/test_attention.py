"""Attention of short windows against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from swiftprune.models.attention import attention


class Causal(nn.Module):
    is_causal = True


def by_definition(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) * scale
    share = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bhsd->bthd", share, value)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", ["causal", "bool", "float"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_outputs_and_gradients_are_those_of_the_definition(heads: int, shared: int, mask: str, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(heads)
    length = 37
    given = [
        torch.randn(2, count, length, width, generator=generator).bfloat16().double().requires_grad_()
        for count, width in ((heads, 16), (shared, 16), (shared, 24))
    ]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if mask != "causal":  # a sliding window
        allowed = allowed.triu(-5)[None, None].expand(2, 1, -1, -1)
    as_given = {
        "causal": None,
        "bool": allowed,
        "float": torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill_(~allowed, -torch.inf),
    }[mask]
    query, key, value = given
    expected = by_definition(query, key, value, allowed, 0.3)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, given, gradient)

    # Under autocast rotary embeddings leave queries and keys in float32.
    ours = [tensor.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for tensor in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        query, key, value = ours
        found, _ = attention(Causal(), query, key, value, as_given, scaling=0.3)
    assert found.dtype == torch.bfloat16
    pairs = zip([found, *torch.autograd.grad(found, ours, gradient.bfloat16())], [expected, *wanted], strict=True)
    for got, exact in pairs:
        assert float((got.detach().double() - exact.detach()).norm() / exact.detach().norm()) < 0.02


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 32), (torch.bfloat16, 600)])
def test_what_is_not_faster_is_left_to_torch(dtype: torch.dtype, length: int) -> None:
    query, key, value = (torch.randn(1, 2, length, 8, dtype=dtype) for _ in range(3))
    found, _ = attention(Causal(), query, key, value, None)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.equal(found, expected)
