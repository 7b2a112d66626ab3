"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): second-order masks with an update of the kept weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from swiftprune.errors import CheckpointError
from swiftprune.methods.mask import Pattern, n_of_m

BLOCK = 128
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
    competing = pattern.group if pattern.structured else block
    keep = torch.empty(0)

    def pruned(k: int) -> Tensor:
        nonlocal keep
        if k % competing == 0:
            together = slice(k, k + competing)
            saliency = weight[:, together].square() / upper.diagonal()[together].square()
            keep = n_of_m(saliency, pattern.kept, pattern.group) if pattern.structured else _most(saliency, pattern)
        return torch.where(keep[:, k % competing], weight[:, k], 0)

    replace_columns(weight, upper, pruned, block)
    return weight


def replace_columns(weight: Tensor, upper: Tensor, replaced: Callable[[int], Tensor], block: int = BLOCK) -> None:
    """Puts `replaced(k)` (N,) in the place of each column k of `weight` (N, K), in order and in place.

    What that changes is made up for by the columns to its right, through `upper` as `inverse_factor` gives it: within
    `block` columns at once, beyond them together. So `replaced` may read, in `weight`, column k and those behind it
    up to the end of its block, as they are by then.
    """
    columns = weight.shape[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part = weight[:, start:end]
        factor = upper[start:end, start:end]
        errors = torch.empty_like(part)
        for i in range(end - start):
            new = replaced(start + i)
            error = (part[:, i] - new) / factor[i, i]
            part[:, i:] -= error[:, None] * factor[i, i:]
            part[:, i] = new
            errors[:, i] = error
        weight[:, end:] -= errors @ upper[start:end, end:]


def _most(saliency: Tensor, pattern: Pattern) -> Tensor:
    """The bool keep_mask of a block in which any may go."""
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
