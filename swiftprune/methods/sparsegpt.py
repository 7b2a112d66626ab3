"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): second-order masks with an update of the kept weights."""

from __future__ import annotations

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
    columns = weight.shape[1]
    group_size = pattern.group if pattern.structured else 1
    block = BLOCK // group_size * group_size
    dead = gram.diagonal() == 0
    weight[:, dead] = 0
    upper = inverse_factor(gram, dead, name)

    for start in range(0, columns, block):
        end = min(start + block, columns)
        part = weight[:, start:end]
        factor = upper[start:end, start:end]
        saliency = part.square() / factor.diagonal().square()
        if not pattern.structured:
            count = int(saliency.numel() * pattern.sparsity)
            threshold = saliency.flatten().kthvalue(count).values if count else saliency.new_tensor(-1.0)
            keep = saliency > threshold
        errors = torch.empty_like(part)
        for i in range(end - start):
            if pattern.structured and i % pattern.group == 0:
                group = slice(i, i + pattern.group)
                scores = part[:, group].square() / factor.diagonal()[group].square()
                group_keep = n_of_m(scores, pattern.kept, pattern.group)
            kept = group_keep[:, i % pattern.group] if pattern.structured else keep[:, i]
            column = part[:, i]
            pruned = torch.where(kept, column, 0)
            error = (column - pruned) / factor[i, i]
            part[:, i:] -= error[:, None] * factor[i, i:]
            part[:, i] = pruned
            errors[:, i] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def inverse_factor(gram: Tensor, dead: Tensor, name: str) -> Tensor:
    """Upper Cholesky factor of (gram + damping)^-1, (K, K) fp32."""
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    diagonal[dead] = 1
    diagonal += DAMPING * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor
    except RuntimeError as error:
        raise CheckpointError(
            f"{name}: the Hessian of its inputs is not positive definite ({error}); "
            "use more calibration samples or another method"
        ) from error
