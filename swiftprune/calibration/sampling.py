"""Text that the dense model samples itself, many sequences at once, so that no data set is needed.

On a CPU the products of a batch should be what costs the time. transformers' defaults spend most of it elsewhere:
drawing by `torch.multinomial` (a random number for each token of the vocabulary), and reading keys and values once for
every head that shares them. Both are done otherwise here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from swiftprune.calibration.text import load_tokenizer
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.compute import Compute
from swiftprune.errors import SettingsError, first_line
from swiftprune.models.attention import is_plain
from swiftprune.models.load import load_whole_model
from swiftprune.progress import ProgressCallback

# Sequences at once: more are faster for each, and their caches larger.
_BATCH = 96
# Of conversations: at 1 small models soon ramble, and then no question is answered.
_TEMPERATURE = 0.7
# Where a user speaks, in a chat template: nothing that a template could hold by itself.
_SPEAKS = "\N{SYMBOL FOR NULL}swiftprune\N{SYMBOL FOR NULL}"


def sampled_text(
    checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, compute: Compute, progress: ProgressCallback
) -> Tensor:
    """(samples, seqlen) int64: text that the dense model samples, at temperature 1 and from its start token.

    A text that ends is followed by the next. Deterministic for a seed on one machine. Needs memory for the whole model,
    which computes in `compute` if that is bfloat16.
    """
    model = _load(checkpoint, compute)
    tokenizer = load_tokenizer(checkpoint)
    config = model.config.get_text_config()
    start = next(
        (token for token in (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id) if token is not None),
        0,
    )
    return _sample(model, torch.tensor([start]), samples, seqlen, seed, 1.0, "sample calibration text", progress)


def sampled_conversations(
    checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, compute: Compute, progress: ProgressCallback
) -> Tensor:
    """(samples, seqlen) int64: conversations that the dense model samples, the questions included.

    It gets its chat template up to where a user begins to speak and goes on from there (Magpie, arXiv 2406.08464).
    Raises SettingsError as `conversation_start` does.
    """
    before = conversation_start(checkpoint, seqlen)
    return _sample(
        _load(checkpoint, compute), before, samples, seqlen, seed, _TEMPERATURE, "sample conversations", progress
    )


def conversation_start(checkpoint: Checkpoint, seqlen: int) -> Tensor:
    """(T,) int64: what the chat template writes up to where a user begins to speak.

    Raises SettingsError when it takes no user's message, or leaves no room within `seqlen`.
    """
    tokenizer = load_tokenizer(checkpoint)
    try:
        written: str = tokenizer.apply_chat_template([{"role": "user", "content": _SPEAKS}], tokenize=False)
    except Exception as error:  # templates raise what they like
        raise SettingsError(f"--conversations: the model's chat template fails: {first_line(error)}") from error
    start, speaks, _ = written.partition(_SPEAKS)
    if not (speaks and start):
        what = "writes nothing before a user speaks" if speaks else "leaves out what a user says"
        raise SettingsError(f"--conversations: the model's chat template {what}")
    before: Tensor = tokenizer(start, add_special_tokens=False, return_tensors="pt").input_ids[0].long()
    if len(before) >= seqlen:
        raise SettingsError(
            f"--conversations: the chat template takes {len(before)} tokens, and --seqlen is {seqlen}; make it longer"
        )
    return before


def _load(checkpoint: Checkpoint, compute: Compute) -> Any:
    model = load_whole_model(
        checkpoint.folder,
        checkpoint.parameter_count,
        None if compute.dtype == torch.float32 else compute.dtype,
        trust_remote_code=checkpoint.trust_remote_code,
    )
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_ATTENTION)
    return model.to(compute.device)


def _sample(
    model: Any,
    begin: Tensor,
    samples: int,
    seqlen: int,
    seed: int,
    temperature: float,
    stage: str,
    progress: ProgressCallback,
) -> Tensor:
    """(samples, seqlen) int64: what `model` samples after `begin`, past any end of text."""
    model.generation_config.eos_token_id = None
    draw = _Draw(temperature, torch.Generator().manual_seed(seed))
    batches = []
    for done in range(0, samples, _BATCH):
        prompt = begin.repeat(min(_BATCH, samples - done), 1).to(model.device)
        batch = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            logits_processor=LogitsProcessorList([draw]),
            max_new_tokens=seqlen - len(begin),
            pad_token_id=int(begin[0]),
            stopping_criteria=StoppingCriteriaList([_Tick(stage, progress, done, samples, seqlen)]),
        )
        batches.append(batch.cpu())
    return torch.cat(batches)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws each next token, by one uniform number a sequence, and leaves it as the only one that can be taken."""

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self._temperature, self._generator = temperature, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores.float() / self._temperature, dim=-1).cumsum(dim=-1)
        # Drawn on the CPU, so that a seed gives the same numbers on every device.
        drawn = torch.rand(len(scores), 1, generator=self._generator).to(scores.device) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn, right=True).clamp_max_(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


_ATTENTION = "swiftprune_one_query"


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`; of one new token, heads that share keys and values are queries of one head of these.

    query (B, H, T, D); key and value (B, H / G, S, D). torch's kernel reads shared keys and values once for each head,
    so that a step of many sequences takes nine times as long.
    """
    batch, heads, queries, width = query.shape
    shared = key.shape[1]
    if queries > 1 or heads == shared or not is_plain(attention_mask, kwargs):
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    grouped = query.reshape(batch, shared, heads // shared, width)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return mixed.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


class _Tick(StoppingCriteria):  # type: ignore[misc]
    """Reports each sampled token; never stops."""

    def __init__(self, stage: str, progress: ProgressCallback, done: int, samples: int, seqlen: int) -> None:
        self.stage, self.progress, self.done, self.samples, self.seqlen = stage, progress, done, samples, seqlen

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = self.done * self.seqlen + input_ids.numel()
        self.progress(self.stage, done, self.samples * self.seqlen)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
