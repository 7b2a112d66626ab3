"""The tokens that calibration runs on: from a text file, a data set, or the model's own samples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from swiftprune.errors import CheckpointError, SettingsError, TextError, first_line
from swiftprune.pruning.checkpoint import Checkpoint
from swiftprune.pruning.progress import Progress
from swiftprune.pruning.whole_model import load_whole_model

logger = logging.getLogger(__name__)

_SELF_BATCH = 32
# Of conversations: at 1 small models soon ramble, and then no question is answered.
_TEMPERATURE = 0.7
# Where a user speaks, in a chat template: nothing that a template could hold by itself.
_SPEAKS = "\N{SYMBOL FOR NULL}swiftprune\N{SYMBOL FOR NULL}"


def calibration_tokens(
    source: str, checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, progress: Progress
) -> Tensor:
    """(samples, seqlen) int64 token ids from `source`: `self`, a text file, or a data set id.

    A text is cut into windows of `seqlen` tokens, of which `samples` are drawn without replacement under `seed`; a
    text that has fewer windows gives what it has, with a warning. Raises TextError when it has none.
    """
    if source == "self":
        return self_sampled(checkpoint, samples=samples, seqlen=seqlen, seed=seed, progress=progress)
    windows = shuffled_windows(source, checkpoint, seqlen=seqlen, seed=seed, needed=samples)
    if len(windows) < samples:
        logger.warning("%s gives %d windows of %d tokens, not the %d asked for", source, len(windows), seqlen, samples)
    return windows[:samples]


def shuffled_windows(source: str, checkpoint: Checkpoint, *, seqlen: int, seed: int, needed: int) -> Tensor:
    """(windows, seqlen) int64 token ids: all of a text file in random order, or `needed` and some of a data set."""
    path = Path(source)
    text = read_text(path) if path.is_file() else _dataset_text(source, needed=needed * seqlen * 8)
    windows = token_windows(text, load_tokenizer(checkpoint.folder), seqlen, source)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises TextError when it is missing, not text, or empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TextError(f"{path}: no such file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise TextError(f"{path}: not a UTF-8 text file ({error})") from error
    if not text.strip():
        raise TextError(f"{path}: is empty")
    return text


def load_tokenizer(model_folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model_folder)
    except Exception as error:  # many types, one meaning
        raise CheckpointError(f"{model_folder}: its tokenizer cannot be loaded: {first_line(error)}") from error


def token_windows(text: str, tokenizer: Any, seqlen: int, source: str) -> Tensor:
    """(windows, seqlen) consecutive token windows of `text`; the rest at its end is dropped."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < seqlen:
        raise TextError(f"{source}: has {len(ids)} tokens, fewer than one window of {seqlen}; give more text")
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


def _dataset_text(source: str, needed: int) -> str:
    """About `needed` characters of a data set's `text` column; `source` is `id[:config[:split]]`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise SettingsError(
            f"--calibration {source}: no such file; to read it as a data set, pip install 'swiftprune[datasets]'"
        ) from None
    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        parts: list[str] = []
        length = 0
        for row in rows:
            parts.append(row["text"])
            length += len(row["text"])
            if length >= needed:
                break
    except KeyError:
        raise TextError(f"--calibration {source}: the data set has no column `text`") from None
    except Exception as error:  # datasets raises many types, offline and on
        raise TextError(
            f"--calibration {source}: no such file, nor a readable data set: {first_line(error)}"
        ) from error
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise TextError(f"--calibration {source}: the data set's `text` column is empty")
    return text


def self_sampled(checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, progress: Progress) -> Tensor:
    """Text that the dense model itself samples (temperature 1, from its start token): no data set is needed.

    A text that ends is followed by the next. Deterministic for a seed on one machine. Needs memory for the whole model.
    """
    model = load_whole_model(checkpoint.folder, checkpoint.parameter_count)
    tokenizer = load_tokenizer(checkpoint.folder)
    start = next(
        (
            token
            for token in (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id)
            if token is not None
        ),
        0,
    )
    return _sampled(model, torch.tensor([start]), samples, seqlen, seed, 1.0, "sample calibration text", progress)


def has_conversations(checkpoint: Checkpoint) -> bool:
    """Whether the model has a chat template, and so conversations to sample."""
    return bool(load_tokenizer(checkpoint.folder).chat_template)


def sampled_conversations(
    checkpoint: Checkpoint, *, samples: int, seqlen: int, seed: int, progress: Progress
) -> Tensor:  # fmt: skip
    """(samples, seqlen) int64: conversations that the dense model samples, the questions included.

    It gets its chat template up to where a user begins to speak and goes on from there (Magpie, arXiv 2406.08464).
    Raises SettingsError when that takes all of `seqlen`.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    written: str = tokenizer.apply_chat_template([{"role": "user", "content": _SPEAKS}], tokenize=False)
    before = tokenizer(written.partition(_SPEAKS)[0], add_special_tokens=False, return_tensors="pt").input_ids[0]
    if len(before) >= seqlen:
        raise SettingsError(
            f"--conversations: the chat template takes {len(before)} tokens, and --seqlen is {seqlen}; make it longer"
        )
    model = load_whole_model(checkpoint.folder, checkpoint.parameter_count)
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
