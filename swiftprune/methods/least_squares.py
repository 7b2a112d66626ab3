"""Least squares for kept weights: which values serve the layer's output best once the mask is given.

With X (T, K) what enters a linear of the pruned model, W (N, K) its dense weight and Y (T, N) what it should give, the
pruned weight V minimises ||X V^T - Y||^2 over the weights that its mask keeps. Y is X W^T, moved by `DRIFT_SHARE` of
the way to what the dense model gives there: see `NormalEquations.of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Ridge towards the dense weight, relative to the diagonal of the Gram matrix.
DAMPING = 0.1
# How much of the drift between the dense and the pruned model a layer makes up for. All of it is too much: regression
# on inputs that carry noise shrinks what comes out, and over thirty blocks little is left (docs/lab-notes.md).
DRIFT_SHARE = 0.3
ITERATIONS = 6


@dataclass(frozen=True)
class NormalEquations:
    """The normal equations V A = B in coordinates where every input channel has unit energy.

    There V is the weight times `scale`, |V| is Wanda's score, and the diagonal of A is 1 + DAMPING, which is the whole
    preconditioning that conjugate gradients need.
    """

    matrix: Tensor
    """A: (K, K) fp32, D^-1 X^T X D^-1 + DAMPING, with D = diag(scale)."""
    target: Tensor
    """B: (N, K) fp32."""
    start: Tensor
    """(N, K) fp32: the dense weight times `scale`. Inputs that were never active have zeros."""
    scale: Tensor
    """(K,) fp32: ||X_k||, 1 where that is 0."""

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, drift: Tensor | None) -> NormalEquations:
        """From `weight` (N, K), `gram` = X^T X (K, K) and `drift` = (Y_dense - X W^T)^T X (N, K), all fp32.

        `drift` of None stands for zero: targets are then the layer's own dense outputs on the inputs it has.
        """
        norm = gram.diagonal().clamp_min(0).sqrt()
        scale = torch.where(norm > 0, norm, 1)
        matrix = gram / (scale[:, None] * scale)
        start = torch.where(norm > 0, weight * scale, 0)
        target = start @ matrix + DAMPING * start
        if drift is not None:
            target += DRIFT_SHARE * (drift / scale)
        matrix.diagonal().add_(DAMPING)
        return cls(matrix, target, start, scale)

    def solve(self, keep_mask: Tensor, guess: Tensor, iterations: int = ITERATIONS) -> Tensor:
        """The kept weights, times `scale`, by conjugate gradients on all rows at once.

        `keep_mask` (N, K) is True where a weight stays and `guess` (N, K) where to start from. Each row is a system of
        its own, so steps are taken row by row; what they share is the product with A, one matrix product for all.
        """
        values = guess * keep_mask
        residual = (self.target - values @ self.matrix) * keep_mask
        direction = residual.clone()
        energy = residual.square().sum(1, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny
        for _ in range(iterations):
            image = (direction @ self.matrix) * keep_mask
            step = energy / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
            values += step * direction
            residual -= step * image
            before, energy = energy, residual.square().sum(1, keepdim=True)
            direction = residual + energy / before.clamp_min(tiny) * direction
        return values


def refine_weights(weight: Tensor, keep_mask: Tensor, gram: Tensor, drift: Tensor | None) -> Tensor:
    """The (N, K) fp32 weight with zeros where `keep_mask` is False and least-squares values elsewhere.

    `weight` (N, K) is the dense one; `gram` and `drift` are as in `NormalEquations.of`.
    """
    normal = NormalEquations.of(weight.float(), gram, drift)
    return normal.solve(keep_mask, normal.start) / normal.scale
