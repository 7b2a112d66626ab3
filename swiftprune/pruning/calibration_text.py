"""The tokens that calibration runs on: from a text file, a data set, or the model's own samples."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from swiftprune.errors import CheckpointError, SettingsError, TextError, first_line
from swiftprune.pruning.checkpoint import Checkpoint
from swiftprune.pruning.progress import Progress
from swiftprune.pruning.text_files import DEFAULT_COLUMN, Render, document, read_text
from swiftprune.pruning.whole_model import load_whole_model

logger = logging.getLogger(__name__)

_SELF_BATCH = 32
# Of conversations: at 1 small models soon ramble, and then no question is answered.
_TEMPERATURE = 0.7
# Where a user speaks, in a chat template: nothing that a template could hold by itself.
_SPEAKS = "\N{SYMBOL FOR NULL}swiftprune\N{SYMBOL FOR NULL}"


def calibration_tokens(
    source: str, checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, progress: Progress,
    column: str = DEFAULT_COLUMN,
) -> Tensor:  # fmt: skip
    """(samples, seqlen) int64 token ids from `source`: `self`, a text file (see `text_files`), or a data set id.

    A text is cut into windows of `seqlen` tokens, of which `samples` are drawn without replacement under `seed`; a
    text that has fewer windows gives what it has, with a warning. Raises TextError when it has none.
    """
    if source == "self":
        return self_sampled(checkpoint, samples=samples, seqlen=seqlen, seed=seed, progress=progress)
    windows = shuffled_windows(source, checkpoint, seqlen=seqlen, seed=seed, needed=samples, column=column)
    if len(windows) < samples:
        logger.warning("%s gives %d windows of %d tokens, not the %d asked for", source, len(windows), seqlen, samples)
    return windows[:samples]


def shuffled_windows(
    source: str, checkpoint: Checkpoint, *, seqlen: int, seed: int, needed: int, column: str = DEFAULT_COLUMN
) -> Tensor:
    """(windows, seqlen) int64 token ids: all of a text file in random order, or `needed` and some of a data set."""
    tokenizer = load_tokenizer(checkpoint)
    path = Path(source)
    if path.exists():
        text = read_text(path, column=column, render=chat_template(tokenizer))
    else:
        text = _dataset_text(source, needed * seqlen * 8, column, chat_template(tokenizer))
    windows = token_windows(text, tokenizer, seqlen, source)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def load_tokenizer(model: Path | Checkpoint) -> Any:
    """The tokenizer in the folder of a model. Raises CheckpointError."""
    folder = model.folder if isinstance(model, Checkpoint) else model
    trusted = isinstance(model, Checkpoint) and model.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # many types, one meaning
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {first_line(error)}") from error


def chat_template(tokenizer: Any) -> Render | None:
    """What turns a conversation into text for the model, or None when its tokenizer has no chat template."""
    if not tokenizer.chat_template:
        return None
    return functools.partial(tokenizer.apply_chat_template, tokenize=False)


def start_tokens(tokenizer: Any) -> list[int]:
    """The tokens that `tokenizer` puts before a text, as the model was trained: often a BOS, often nothing."""
    probe = "Every text"
    with_special: list[int] = tokenizer(probe).input_ids
    plain: list[int] = tokenizer(probe, add_special_tokens=False).input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def token_windows(text: str, tokenizer: Any, seqlen: int, source: str) -> Tensor:
    """(windows, seqlen) consecutive token windows of `text`, each after `start_tokens`; a rest is dropped."""
    start = torch.tensor(start_tokens(tokenizer), dtype=torch.int64)
    width = seqlen - len(start)
    if width < 1:
        raise TextError(
            f"{source}: windows of {seqlen} tokens have no room for text after the {len(start)} at the start"
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    if len(ids) < width:
        raise TextError(f"{source}: has {len(ids)} tokens, fewer than one window of {seqlen}; give more text")
    windows = ids[: len(ids) // width * width].view(-1, width)
    return torch.cat([start.expand(len(windows), -1), windows], dim=1)


def _dataset_text(source: str, needed: int, column: str, render: Render | None) -> str:
    """About `needed` characters of a data set's rows; `source` is `id[:config[:split]]`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SettingsError(
            f"--calibration {source}: no such file; to read it as a data set, pip install 'swiftprune[datasets]'"
        ) from None
    name, config, split = [*source.split(":"), "", ""][:3]
    parts: list[str] = []
    length = 0
    try:
        for number, row in enumerate(load_dataset(name, config or None, split=split or "train", streaming=True)):
            parts.append(document(row, f"--calibration {source}: row {number}", column, render))
            length += len(parts[-1])
            if length >= needed:
                break
    except TextError:
        raise
    except Exception as error:  # datasets raises many types, offline and on
        raise TextError(
            f"--calibration {source}: no such file, nor a readable data set: {first_line(error)}"
        ) from error
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise TextError(f"--calibration {source}: the data set holds no text")
    return text


def self_sampled(checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, progress: Progress) -> Tensor:
    """Text that the dense model itself samples (temperature 1, from its start token): no data set is needed.

    A text that ends is followed by the next. Deterministic for a seed on one machine. Needs memory for the whole model.
    """
    model = load_whole_model(
        checkpoint.folder, checkpoint.parameter_count, trust_remote_code=checkpoint.trust_remote_code
    )
    tokenizer = load_tokenizer(checkpoint)
    config = model.config.get_text_config()
    start = next(
        (token for token in (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id) if token is not None),
        0,
    )
    return _sampled(model, torch.tensor([start]), samples, seqlen, seed, 1.0, "sample calibration text", progress)


def has_conversations(checkpoint: Checkpoint) -> bool:
    """Whether the model has a chat template, and so conversations to sample."""
    return bool(load_tokenizer(checkpoint).chat_template)


def sampled_conversations(
    checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, progress: Progress
) -> Tensor:  # fmt: skip
    """(samples, seqlen) int64: conversations that the dense model samples, the questions included.

    It gets its chat template up to where a user begins to speak and goes on from there (Magpie, arXiv 2406.08464).
    Raises SettingsError when that takes all of `seqlen`.
    """
    tokenizer = load_tokenizer(checkpoint)
    written: str = tokenizer.apply_chat_template([{"role": "user", "content": _SPEAKS}], tokenize=False)
    before = tokenizer(written.partition(_SPEAKS)[0], add_special_tokens=False, return_tensors="pt").input_ids[0]
    if len(before) >= seqlen:
        raise SettingsError(
            f"--conversations: the chat template takes {len(before)} tokens, and --seqlen is {seqlen}; make it longer"
        )
    model = load_whole_model(
        checkpoint.folder, checkpoint.parameter_count, trust_remote_code=checkpoint.trust_remote_code
    )
    return _sampled(model, before, samples, seqlen, seed, _TEMPERATURE, "sample conversations", progress)


def _sampled(
    model: Any, begin: Tensor, samples: int, seqlen: int, seed: int, temperature: float, stage: str, progress: Progress
) -> Tensor:  # fmt: skip
    """(samples, seqlen) int64: what `model` samples after `begin`, past any end of text."""
    model.generation_config.eos_token_id = None
    torch.manual_seed(seed)
    batches = []
    for done in range(0, samples, _SELF_BATCH):
        prompt = begin.repeat(min(_SELF_BATCH, samples - done), 1)
        batch = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=seqlen - len(begin),
            pad_token_id=int(begin[0]),
            stopping_criteria=StoppingCriteriaList([_Tick(stage, progress, done, samples, seqlen)]),
        )
        batches.append(batch)
    return torch.cat(batches)


class _Tick(StoppingCriteria):  # type: ignore[misc]
    """Reports each sampled token; never stops."""

    def __init__(self, stage: str, progress: Progress, done: int, samples: int, seqlen: int) -> None:
        self.stage, self.progress, self.done, self.samples, self.seqlen = stage, progress, done, samples, seqlen

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = self.done * self.seqlen + input_ids.numel()
        self.progress(self.stage, done, self.samples * self.seqlen)
        return torch.zeros(len(input_ids), dtype=torch.bool)
