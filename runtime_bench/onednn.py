"""Dense linears as oneDNN runs them best: the weight laid out beforehand for the number of tokens to come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out weights of that type on this machine: 16 bits need AVX-512 or AVX-NE-CONVERT."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def prepack(weight: Tensor, tokens: int) -> Tensor:
    """A (rows, cols) weight in oneDNN's own layout."""
    reorder: Any = torch.ops.mkldnn._reorder_linear_weight
    laid_out: Tensor = reorder(weight.detach().contiguous(), tokens)
    return laid_out


def linear(x: Tensor, prepacked: Tensor, bias: Tensor | None) -> Tensor:
    """x of shape (..., cols) times a prepacked weight, transposed."""
    product: Any = torch.ops.mkldnn._linear_pointwise
    y: Tensor = product(x, prepacked, bias, "none", [], "")
    return y
