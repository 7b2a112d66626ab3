"""The linears of distillation against autograd's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swiftprune.compute import Compute
from swiftprune.models.masked_linear import train_kept


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_kept_weights(dtype: torch.dtype, error: float, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias)
    keep_mask = torch.rand(10, 24) < 0.5
    linear.weight.data *= keep_mask
    exact = nn.Linear(24, 10, bias=bias, dtype=torch.float64)
    exact.load_state_dict(linear.state_dict())
    train_kept(linear, keep_mask, Compute(dtype=dtype))

    def difference(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
        assert a is not None
        assert b is not None
        return float((a.double() - b).norm() / b.norm())

    for _ in range(2):  # the second step begins with no gradient, in memory that holds the first one
        linear.zero_grad()
        exact.zero_grad()
        x, once_more = torch.randn(2, 5, 24, requires_grad=True), torch.randn(3, 24)
        x64 = x.detach().double().requires_grad_()
        total = linear(x).square().sum() + linear(once_more).sum()
        (exact(x64).square().sum() + exact(once_more.double()).sum()).backward()
        total.backward()
        assert exact.weight.grad is not None
        assert difference(linear.weight.grad, exact.weight.grad * keep_mask) < error
        assert linear.weight.grad is not None
        assert not linear.weight.grad[~keep_mask].any()
        assert difference(x.grad, x64.grad) < error
        if bias:
            assert difference(linear.bias.grad, exact.bias.grad) < error
        with torch.no_grad():  # as an optimizer does
            for module in (linear, exact):
                module.weight += 0.5 * keep_mask

    linear.zero_grad()
    linear.weight.sum().backward()  # type: ignore[no-untyped-call] # by a module that does not call it
    assert linear.weight.grad is not None
    assert torch.equal(linear.weight.grad, keep_mask.float())
    linear.zero_grad()
    assert linear.weight.grad is None, "an expert without tokens has no gradient, so Adam leaves it alone"
