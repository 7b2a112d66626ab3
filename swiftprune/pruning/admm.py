"""Mask and kept weights found together by alternating directions (ADMM), without visiting columns one by one.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (arXiv 2401.02938), and Meng et al., "ALPS"
(arXiv 2406.07831), from which the finish by conjugate gradients is; the targets are those of `least_squares`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.errors import CheckpointError
from swiftprune.pruning.least_squares import Normal
from swiftprune.pruning.mask import Pattern, select

# Penalties, one a step, of the split between the weight that fits and the one that is sparse, in units of a channel's
# energy. A low one lets the mask move, a high one settles it. Two steps each with four of them found worse masks, and
# four steps each with two of them much worse ones.
PENALTIES = (0.1, 0.153, 0.235, 0.361, 0.554, 0.85, 1.3, 2.0)


def admm(weight: Tensor, gram: Tensor, drift: Tensor | None, pattern: Pattern, name: str = "weight") -> Tensor:
    """Prunes `weight` (N, K) under the arguments of `least_squares.Normal.of`; returns the pruned fp32 weight.

    In turn: V fits the targets but is pulled towards Z, V = (B + rho (Z - U)) (A + rho)^-1; Z is V + U with all but
    the largest weights of each group set to zero; U sums up by how much the two differ. In the coordinates of `Normal`
    the largest weights are those of the highest Wanda score, so that is where the mask starts.
    """
    normal = Normal.of(weight.float(), gram, drift)
    keep_mask = select(normal.start.abs(), pattern)
    sparse = normal.start * keep_mask
    gap = torch.zeros_like(sparse)
    before = PENALTIES[0]
    for penalty in PENALTIES:
        inverse = _inverse(normal.matrix, penalty, name)
        gap *= before / penalty  # the dual variable is penalty x gap, and it is what carries over
        before = penalty
        wish = (normal.target + penalty * (sparse - gap)) @ inverse + gap
        keep_mask = select(wish.abs(), pattern)
        sparse = wish * keep_mask
        gap = wish - sparse
    return normal.solve(keep_mask, sparse) / normal.scale


def _inverse(matrix: Tensor, penalty: float, name: str) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    try:
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    except RuntimeError as error:
        raise CheckpointError(f"{name}: the Gram matrix of its inputs is not positive definite ({error}); "
                              "use more calibration samples or another method") from error  # fmt: skip
