"""Rounding kept weights to 8 or 4 bits so that the layer's output, rather than each weight, moves least.

GPTQ (Frantar et al., arXiv 2210.17323) on a fixed mask: columns are visited in order, and what rounding one changes is
made up for by those to its right, through the Cholesky factor that SparseGPT uses. Weights that the mask drops count as
rounded to zero, so that what earlier columns would have put into them is passed on too. 4-bit values are then gone over
again, each set to the level that is best beside all others as they are: coordinate descent, as in QuantEase (Behdin et
al., arXiv 2309.01885). Columns are taken as many at once as share a scale of 4-bit values; what that changes beyond
them follows as one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftprune.formats.spec import SCALED_INPUTS, Packed24, Quantized
from swiftprune.kernels import dispatch, quantize
from swiftprune.kernels.levels import from_values
from swiftprune.methods.sparsegpt import column_blocks, damped, inverse_factor

_PASSES = 2  # two lower the error of outputs by 10 to 20%, more by one or two percent more


def round_kept(weight: Tensor, keep_mask: Tensor, gram: Tensor, quantized: Quantized, name: str = "weight") -> Packed24:
    """`weight` (N, K), zero where `keep_mask` is False, with its kept weights rounded under `gram` = X^T X (K, K) fp32.

    Scales of 4-bit values are chosen as their inputs are reached, of the weights as they are then. Raises
    CheckpointError where the Gram matrix is not positive definite.
    """
    wanted = torch.where(keep_mask, weight, 0).float()
    weight = wanted.clone()
    dead = gram.diagonal() == 0
    upper = inverse_factor(gram, dead, name)
    kernels = dispatch.kernels(weight.device)
    values, scales = [], []
    for block in column_blocks(weight, SCALED_INPUTS):
        part, keep, factor = weight[:, block], keep_mask[:, block], upper[block, block]
        if quantized == "int4":
            importance = factor.diagonal().square().reciprocal()
            scales.append(quantize.scales_of(torch.where(keep, part, 0), quantized, importance))
        elif not scales:
            scales.append(quantize.scales_of(weight, quantized))
        stored, errors = kernels.round_columns(part, keep, factor, scales[-1], quantized)
        values.append(stored)
        weight[:, block.stop :] -= errors @ upper[block, block.stop :]
    all_values, all_scales = torch.cat(values, dim=1), torch.cat(scales, dim=1)
    if quantized == "int4":
        all_values = _descend(all_values, wanted, all_scales, keep_mask, damped(gram, dead))
    return quantize.pack_values(all_values, all_scales, keep_mask, name)


def _descend(values: Tensor, weight: Tensor, scales: Tensor, keep_mask: Tensor, gram: Tensor) -> Tensor:
    """`values` (N, K) that lower tr(D `gram` D^T), D what they lack of `weight` under `scales`."""
    stored = torch.where(keep_mask, from_values(values, quantize.of_each_input(scales, weight.shape[1])), 0)
    gradient = (weight - stored) @ gram
    kernels = dispatch.kernels(weight.device)
    for _ in range(_PASSES):
        for index, block in enumerate(column_blocks(weight, SCALED_INPUTS)):
            before = stored[:, block]
            columns = before, gradient[:, block], keep_mask[:, block], gram[block, block], scales[:, index, None]
            values[:, block], after = kernels.descend_columns(*columns)
            gradient -= (after - before) @ gram[block]
            stored[:, block] = after
    return values
