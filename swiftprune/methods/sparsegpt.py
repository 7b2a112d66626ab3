"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): second-order masks with an update of the kept weights."""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.errors import CheckpointError
from swiftprune.kernels import dispatch
from swiftprune.methods.mask import Pattern

BLOCK = 128  # columns that kernels take at once
DAMPING = 0.01


def sparsegpt(weight: Tensor, gram: Tensor, pattern: Pattern, name: str = "weight") -> Tensor:
    """Prunes `weight` (N, K) under `gram` = X^T X (K, K) fp32; returns the pruned and updated fp32 weight.

    Algorithm 1 of the paper: with U the upper Cholesky factor of (H + damping)^-1, columns are visited in order; a
    group's (or, unstructured, a block's) weights with the lowest w^2 / U_kk^2 go, and each column's error is spread
    over the columns to its right. Inputs that were never active carry no information: their weights become zero.
    """
    weight = weight.float().clone()
    group_size = pattern.group if pattern.structured else 1
    block = BLOCK // group_size * group_size
    dead = gram.diagonal() == 0
    weight[:, dead] = 0
    upper = inverse_factor(gram, dead, name)
    kernels = dispatch.kernels(weight.device)
    for columns in column_blocks(weight, block):
        part, factor = weight[:, columns], upper[columns, columns]
        keep = (pattern.kept, pattern.group) if pattern.structured else _most(part, factor, pattern)
        weight[:, columns], errors = kernels.prune_columns(part, factor, keep)
        weight[:, columns.stop :] -= errors @ upper[columns, columns.stop :]
    return weight


def column_blocks(weight: Tensor, size: int) -> list[slice]:
    """The columns of `weight` (N, K) in order, `size` at once."""
    count = weight.shape[1]
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _most(weight: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """The bool keep_mask of a block in which any may go."""
    saliency = weight.square() / factor.diagonal().square()
    count = int(saliency.numel() * pattern.sparsity)
    return saliency > (saliency.flatten().kthvalue(count).values if count else -1.0)


def damped(gram: Tensor, dead: Tensor) -> Tensor:
    """`gram` with something added to its diagonal, and 1 in the place of the inputs that are `dead`, never active."""
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[dead] = 1
    diagonal += DAMPING * diagonal.mean()
    return hessian


def inverse_factor(gram: Tensor, dead: Tensor, name: str) -> Tensor:
    """Upper Cholesky factor of the inverse of `damped`, (K, K) fp32."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, dead)))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor
    except RuntimeError as error:
        raise CheckpointError(
            f"{name}: the Hessian of its inputs is not positive definite ({error}); "
            "use more calibration samples or another method"
        ) from error
