"""Mask and kept weights found together by alternating directions (ADMM), without visiting columns one by one.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models" (arXiv 2401.02938), and Meng et al., "ALPS"
(arXiv 2406.07831), from which the finish by conjugate gradients is; the targets are those of `least_squares`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.errors import CheckpointError
from swiftprune.formats import spec
from swiftprune.kernels import packing
from swiftprune.kernels.score_factors import ScoreFactors
from swiftprune.methods.least_squares import NormalEquations
from swiftprune.methods.mask import Pattern, select

# Penalties, one a step, of the split between the weight that fits and the one that is sparse, in units of a channel's
# energy. A low one lets the mask move, a high one settles it. Two steps each with four of them found worse masks, and
# four steps each with two of them much worse ones.
PENALTIES = (0.1, 0.153, 0.235, 0.361, 0.554, 0.85, 1.3, 2.0)


def admm(weight: Tensor, gram: Tensor, drift: Tensor | None, pattern: Pattern, name: str = "weight") -> Tensor:
    """Prunes `weight` (N, K) under the arguments of `least_squares.NormalEquations.of`; returns the pruned fp32 weight.

    In turn: V fits the targets but is pulled towards Z, V = (B + rho (Z - U)) (A + rho)^-1; Z is V + U with all but
    the largest weights of each group set to zero; U is the scaled dual variable. In the coordinates of
    `NormalEquations` the largest weights are those of the highest Wanda score, so that is where the mask starts.
    """
    normal = NormalEquations.of(weight.float(), gram, drift)
    sparse = _largest(normal.start, pattern)
    dual = torch.zeros_like(sparse)
    before = PENALTIES[0]
    for penalty in PENALTIES:
        dual *= before / penalty  # what carries over is the unscaled dual, penalty x dual
        before = penalty
        v_plus_u = _solve(normal.matrix, penalty, normal.target + penalty * (sparse - dual), name) + dual
        sparse = _largest(v_plus_u, pattern)
        dual = v_plus_u - sparse
    return normal.solve(sparse != 0, sparse) / normal.scale


def _largest(weight: Tensor, pattern: Pattern) -> Tensor:
    """`weight` with all but the largest of each group set to zero; for 2:4 by the kernels, several times faster."""
    if pattern.name == spec.FORMAT:
        return packing.unpack(packing.prune_and_pack(weight, ScoreFactors.of_magnitude(weight.shape[1], weight.device)))
    return weight * select(weight.abs(), pattern)


def _solve(matrix: Tensor, penalty: float, right: Tensor, name: str) -> Tensor:
    """V (N, K) with V (matrix + penalty) = right."""
    shifted = matrix.clone()
    shifted.diagonal().add_(penalty)
    try:
        factor = torch.linalg.cholesky(shifted)
    except RuntimeError as error:
        raise CheckpointError(
            f"{name}: the Gram matrix of its inputs is not positive definite ({error}); "
            "use more calibration samples or another method"
        ) from error
    if len(right) > matrix.shape[0]:  # an inverse costs K^3, and a product with it half of two triangular solves
        return right @ torch.cholesky_inverse(factor)
    solved: Tensor = torch.cholesky_solve(right.T, factor).T
    return solved.contiguous()
