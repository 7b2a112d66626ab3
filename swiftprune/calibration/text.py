"""Calibration text from files and data sets, as windows of tokens."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from swiftprune.calibration.text_files import DEFAULT_COLUMN, Render, document, read_text
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import CheckpointError, SettingsError, TextError, first_line

logger = logging.getLogger(__name__)


# Windows that are held back to judge the result by: at most so many, and no more than one of so many.
HELD_BACK, HELD_BACK_OF = 8, 8
# They are spread over the beginning of the text, since a data set is not read to its end, at most so many tokens from
# one to the next. All of it is held back: amid what was trained on the result would look better (docs/lab-notes.md).
_APART = 2048
# Tokens after that beginning that are held back too, to see by when training gains nothing more; no more than one of so
# many.
_UNSEEN_TOKENS, _UNSEEN_OF = 10_240, 16


class CalibrationText:
    """A text as tokens, cut into windows; its beginning is held back, to judge by what is pruned on the others."""

    def __init__(
        self, source: str, checkpoint: Checkpoint, *, seqlen: int, needed: int, column: str = DEFAULT_COLUMN
    ) -> None:
        """`source` is a text file (see `text_files`), or a data set id, of which `needed` windows and more are read.

        Raises TextError when there is not one window.
        """
        self._source = source
        tokenizer = load_tokenizer(checkpoint)
        render = chat_template(tokenizer)
        path = Path(source)
        text = (
            read_text(path, column=column, render=render)
            if path.exists()
            else _dataset_text(source, needed * seqlen * 8, column, render)
        )
        self._ids, self._start = token_ids(text, tokenizer), start_tokens(tokenizer)
        windows = _windows(self._ids, self._start, seqlen, source)
        width = seqlen - len(self._start)
        beginning = min(HELD_BACK * max(1, _APART // width), len(windows) // HELD_BACK_OF)
        count = min(HELD_BACK, beginning)
        apart = max(1, beginning // HELD_BACK)
        self.held_back = windows[: count * apart : apart]
        """(W, seqlen) int64; none where the text is short."""
        held = count * apart * width
        unseen = min(_UNSEEN_TOKENS, len(self._ids) // _UNSEEN_OF)
        self._unseen = slice(held, held + (unseen if unseen >= width else 0))

    def unseen(self, seqlen: int) -> Tensor:
        """(W, seqlen) int64: windows of `seqlen` tokens that are held back beside those; none of a short text."""
        ids = self._ids[self._unseen]
        if len(ids) < seqlen - len(self._start):
            return ids.new_empty(0, seqlen)
        return _windows(ids, self._start, seqlen, self._source)

    def windows(self, seqlen: int, seed: int) -> Tensor:
        """(W, seqlen) int64: all windows of `seqlen` tokens beyond the part that is held back, in random order."""
        windows = _windows(self._ids, self._start, seqlen, self._source)
        width = seqlen - len(self._start)
        windows = windows[-(-self._unseen.stop // width) :]
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


def token_ids(text: str, tokenizer: Any) -> Tensor:
    """(L,) int64: the tokens of `text` alone."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)


def token_windows(text: str, tokenizer: Any, seqlen: int, source: str) -> Tensor:
    """(windows, seqlen) consecutive token windows of `text`, each after `start_tokens`; a rest is dropped."""
    return _windows(token_ids(text, tokenizer), start_tokens(tokenizer), seqlen, source)


def _windows(ids: Tensor, before: list[int], seqlen: int, source: str) -> Tensor:
    start = torch.tensor(before, dtype=torch.int64)
    width = seqlen - len(start)
    if width < 1:
        raise TextError(
            f"{source}: windows of {seqlen} tokens have no room for text after the {len(start)} at the start"
        )
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


def has_conversations(checkpoint: Checkpoint) -> bool:
    """Whether the model has a chat template, and so conversations to sample."""
    return bool(load_tokenizer(checkpoint).chat_template)
