"""Rounding kept weights to 8 or 4 bits so that the layer's output, rather than each weight, moves least.

GPTQ (Frantar et al., arXiv 2210.17323) on a fixed mask: columns are visited in order, and what rounding one changes is
made up for by those to its right, through the Cholesky factor that SparseGPT uses. Weights that the mask drops count as
rounded to zero, so that what earlier columns would have put into them is passed on too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.formats.spec import Packed24, Quantized
from swiftprune.kernels import quantize
from swiftprune.methods.sparsegpt import inverse_factor, replace_columns


def round_kept(weight: Tensor, keep_mask: Tensor, gram: Tensor, quantized: Quantized, name: str = "weight") -> Packed24:
    """`weight` (N, K), zero where `keep_mask` is False, with its kept weights rounded under `gram` = X^T X (K, K) fp32.

    Scales are chosen as their inputs are reached, of the weights as they are then. Raises CheckpointError where the
    Gram matrix is not positive definite.
    """
    weight = torch.where(keep_mask, weight, 0).float()
    columns = weight.shape[1]
    dead = gram.diagonal() == 0
    upper = inverse_factor(gram, dead, name)
    values = torch.empty(weight.shape, dtype=torch.uint8 if quantized == "int4" else torch.int8, device=weight.device)
    step = quantize.scaled_inputs(quantized, columns)
    scales: list[Tensor] = []

    def rounded(k: int) -> Tensor:
        if k % step == 0:
            inputs = slice(k, k + step)
            importance = upper.diagonal()[inputs].square().reciprocal()
            scales.append(quantize.scales_of(weight[:, inputs] * keep_mask[:, inputs], quantized, importance))
        stored = quantize.to_values(weight[:, k : k + 1], scales[-1], quantized)
        values[:, k] = stored[:, 0]
        return torch.where(keep_mask[:, k], quantize.from_values(stored, scales[-1])[:, 0], 0)

    replace_columns(weight, upper, rounded)
    return quantize.pack_values(values, torch.cat(scales, dim=1), keep_mask, name)
