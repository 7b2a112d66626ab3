"""Attention for training on short windows: plain products, where torch's fused kernel is slow.

On CPUs in bfloat16 `scaled_dot_product_attention` takes three times as long, forward and backward, for 2 x 256 tokens
of SmolLM2, 9 heads that share 3 (docs/lab-notes.md). All scores of a window are in memory at once, so it is for short
ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "swiftprune_short_windows"
_LONGEST = 512
"""Tokens of a window; the fused kernel catches up with longer ones."""


def is_plain(attention_mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    """Whether attention is softmax(scale Q K^T + mask) V, with one mask for all heads."""
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    return one_mask and all(options.get(name) is None for name in ("position_bias", "softcap", "s_aux"))


@functools.cache
def _causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), -torch.inf, dtype=dtype).triu_(1)


def use_short_window_attention(model: Any) -> None:
    """For a model of transformers that attends by `sdpa` and is trained on windows of some hundred tokens."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, which it calls where plain products are not the faster way or do not know the case.

    query (B, H, T, D); key and value (B, H / G, T, D). Returns (B, T, H, D).
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    length = query.shape[2]
    is_fast = query.device.type == "cpu" and query.dtype == torch.bfloat16 and length == key.shape[2] <= _LONGEST
    if not (is_plain(attention_mask, kwargs) and is_fast and not dropout and query.dtype == key.dtype == value.dtype):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            is_causal=is_causal,
            **kwargs,
        )
        return found
    if attention_mask is None and (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        attention_mask = _causal_mask(length, query.dtype)
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed: Tensor = _Attention.apply(query, key, value, attention_mask, scale)  # type: ignore[no-untyped-call]
    return mixed.transpose(1, 2), None


AttentionInterface.register(_NAME, attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V, with heads that share keys and values as one of more rows.

    Left to autograd the backward pass takes four times as long.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, heads, length, width = query.shape
        shared = key.shape[1]
        rows = (query * scale).reshape(batch * shared, -1, width)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        scores = torch.bmm(rows, key.transpose(1, 2)).view(batch, heads, length, length)
        if mask is not None:
            scores += mask
        share = scores.softmax(-1).view(batch * shared, -1, length)
        ctx.save_for_backward(rows, key, value, share)
        ctx.scale, ctx.shapes = scale, (query.shape, (batch, shared, length, -1))
        return torch.bmm(share, value).view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, key, value, share = ctx.saved_tensors
        of_query, of_others = ctx.shapes
        gradient = gradient.reshape(len(share), share.shape[1], -1)
        of_share = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_share, share, -1, share.dtype)
        return (
            torch.bmm(of_scores, key).mul_(ctx.scale).view(of_query),
            torch.bmm(of_scores.transpose(1, 2), rows).view(of_others),
            torch.bmm(share.transpose(1, 2), gradient).view(of_others),
            None,
            None,
        )
