"""The separable form in which every one-shot score reaches the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreFactors:
    """The vectors from which the score of every weight of an (N, K) matrix follows.

        v[n, k]     = |w[n, k]| * (column[k] + row[n] * cross[k])
        score[n, k] = v                                    without `curvature`
        score[n, k] = v**2 * (1 - curvature[n] * v**2)     with it

    All are fp32 and contiguous: `column` (K,), `cross` (K,), `row` (N,), `curvature` (N,); `row` and `cross` come
    together or not at all. Only the order of scores within a row matters, so a score may be given as its square root.
    Where N of M are kept, a weight that is zero comes last, below others whose score is 0 too.
    A kernel can thus score and select in one pass over the weights, without an (N, K) matrix of scores in memory.
    """

    column: Tensor
    row: Tensor | None = None
    cross: Tensor | None = None
    curvature: Tensor | None = None

    def scores(self, weight: Tensor) -> Tensor:
        """The (N, K) fp32 scores of `weight` (any float dtype)."""
        scale = self.column
        if self.row is not None and self.cross is not None:
            scale = scale + self.row[:, None] * self.cross
        v = weight.abs().float().mul_(scale)
        if self.curvature is not None:
            v.mul_(v)
            v.mul_(1 - self.curvature[:, None] * v)
        return v

    @staticmethod
    def of_magnitude(in_features: int, device: torch.device | str = "cpu") -> ScoreFactors:
        """Scores that are |w|."""
        return ScoreFactors(torch.ones(in_features, device=device))


@dataclass(frozen=True)
class EwmaGains:
    """Weights of the newest score in the running mean and deviation, and what keeps the deviation above zero."""

    mean: float
    deviation: float
    floor: float
