"""Linears of which only the kept weights are trained, in memory that lasts from step to step.

Autograd's own way makes, in every step and for every weight, a copy in the type that is computed in, a gradient in that
type, the same in float32 and the same once more with the mask applied: a third of a step was spent on clearing fresh
pages (docs/lab-notes.md).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swiftprune.compute import Compute


def train_kept(linear: nn.Linear, keep_mask: Tensor, compute: Compute) -> None:
    """From now on the gradient of `linear`'s weight (N, K), float32, is zero where `keep_mask`, bool, is False.

    Its products are in the type of `compute`, and so is what it returns.
    """
    linear.forward = _MaskedLinear(linear.weight, linear.bias, keep_mask, compute)  # type: ignore[method-assign, assignment]


class _MaskedLinear:
    """The forward of such a linear."""

    def __init__(self, weight: Tensor, bias: Tensor | None, keep_mask: Tensor, compute: Compute) -> None:
        self._weight, self._bias = weight, bias
        # Of the type of what it multiplies: torch takes ten times as long with a bool one.
        self._keep = keep_mask.to(self._weight.device, compute.dtype)
        # For what reads the weight and does not call its module.
        weight.register_hook(functools.partial(_times, self._keep))  # type: ignore[no-untyped-call]
        self._gradient = torch.empty_like(self._weight)
        same = compute.dtype == self._weight.dtype
        self._cast = None if same else torch.empty_like(self._weight, dtype=compute.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N), in the type that is computed in."""
        y: Tensor = _Product.apply(x, self._weight, self)  # type: ignore[no-untyped-call]
        return y if self._bias is None else y + self._bias.to(y.dtype)

    def weight(self) -> Tensor:
        """(N, K), in the type that is computed in."""
        return self._weight.detach() if self._cast is None else self._cast.copy_(self._weight)

    def add_gradient(self, of_weight: Tensor) -> None:
        """Takes one (N, K), in the type that is computed in."""
        of_weight *= self._keep
        if self._weight.grad is None:
            self._weight.grad = self._gradient.copy_(of_weight)
        else:
            self._weight.grad += of_weight


def _times(mask: Tensor, gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient * mask


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: _MaskedLinear) -> Tensor:
        used = linear.weight()
        ctx.linear, ctx.weight, ctx.type = linear, used, x.dtype  # lasts, so it need not be saved
        x = x.to(used.dtype)
        ctx.save_for_backward(x)
        return F.linear(x, used)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        ctx.linear.add_gradient(gradient.flatten(0, -2).T @ x.flatten(0, -2))
        return (gradient @ ctx.weight).to(ctx.type), None, None
