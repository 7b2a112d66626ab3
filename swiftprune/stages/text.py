"""The first stage: the tokens that the run is calibrated, trained and judged on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftprune.calibration.data import CalibrationData, calibration_data
from swiftprune.calibration.sampling import sampled_conversations
from swiftprune.calibration.text import CalibrationText
from swiftprune.config import DTYPES, DtypeName
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.formats.spec import check_finite

if TYPE_CHECKING:
    from swiftprune.stages.context import Run
    from swiftprune.stages.store import BlockStore

# Windows that are read of a data set to distill on: a million tokens.
_TRAINING_WINDOWS = 4096
# Where the model samples its own text, it samples so many times more when it is distilled on as well.
_TRAINING_SAMPLES = 3
# Of calibration, and of what is trained on, every so many windows is a conversation, if there are any.
_EVERY_CONVERSATION = 4
TRAINING_SEQLEN = 256  # tokens of a window that is trained on, where the text is not sampled
# Windows that a perplexity budget is held on, and that training is validated on: at most so many, and of all no more
# than half, and this share.
JUDGED_WINDOWS = 32
VALIDATION_WINDOWS, VALIDATION_SHARE = 8, 0.03


def take_text(run: Run, store: BlockStore) -> None:
    """Checks that the weights are finite, and makes the calibration tokens where that was not done yet."""
    if run.ranks.is_first:
        with run.clock("read"):
            _check_weights(run)
        if run.data is None and (data := load_data(run)) is not None:
            store.keep_data(data)
    run.data = run.ranks.from_first(run.data)


def load_data(run: Run) -> CalibrationData | None:
    """The calibration tokens, made on the first call; None when the method needs none.

    Conversations stand at the end of the first `samples` rows, and those that are too many for calibration follow.
    Where the model samples all of its text and is distilled, more of it comes last. What follows is only for
    training.
    """
    if run.data is None and run.settings.calibration != "none":
        with run.clock("calibration text"):
            s = run.settings
            more = _TRAINING_SAMPLES if s.calibration == "self" and "distill" in s.refine else 1
            run.data = calibration_data(
                s.calibration,
                run.checkpoint,
                samples=s.samples * more,
                seqlen=s.seqlen,
                seed=s.seed,
                compute=run.compute,
                progress=run.progress,
                column=s.text_column,
            )
        if count := run.settings.conversations:
            with run.clock("sample conversations"):
                found = sampled_conversations(
                    run.checkpoint,
                    samples=count,
                    seqlen=s.seqlen,
                    seed=s.seed,
                    compute=run.compute,
                    progress=run.progress,
                )
            tokens = run.data.tokens
            start = _conversation_rows(run, len(tokens) + count).start
            tokens = torch.cat([tokens[:start], found, tokens[start:]])
            run.data = CalibrationData(tokens, run.data.held_back)
        _check_tokens(run, run.data)
    return run.data


def _check_weights(run: Run) -> None:
    """Raises FormatError for NaN or infinities anywhere in the model: before any work, which they would spoil."""
    parameters = (name for name, _ in run.model.named_parameters(remove_duplicate=False))
    tensors = sorted({run.targets.tensor_of[name] for name in parameters if name in run.targets.tensor_of})
    for index, name in enumerate(tensors):
        run.progress("check weights", index, len(tensors))
        tensor = run.checkpoint.read([name])[name]
        if tensor.is_floating_point() and tensor.itemsize > 1:
            check_finite(tensor, name)
            if run.settings.dtype:
                check_fits(tensor, run.settings.dtype, name)
    run.progress("check weights", len(tensors), len(tensors))


def check_fits(tensor: Tensor, dtype: DtypeName, name: str) -> None:
    """Raises SettingsError where `dtype` makes infinities of the numbers of a tensor that has none."""
    if not tensor.numel():
        return
    largest = torch.stack(torch.aminmax(tensor)).abs().max()
    if torch.isfinite(largest) and not torch.isfinite(largest.to(DTYPES[dtype])):
        raise SettingsError(f"--dtype {dtype}: {name} holds {float(largest):g}, which does not fit")


def _check_tokens(run: Run, data: CalibrationData) -> None:
    """Raises CheckpointError when the tokenizer has tokens that the model has no embedding for."""
    highest = int(max(part.max() for part in (data.tokens, data.held_back) if part.numel()))
    embeddings = run.checkpoint.entry(run.targets.embedding).shape[0]
    if highest >= embeddings:
        raise CheckpointError(
            f"{run.checkpoint.folder}: its tokenizer gives token {highest}, but it has {embeddings} embeddings; "
            "put back the tokenizer that belongs to these weights"
        )


def _conversation_rows(run: Run, rows: int) -> slice:
    """Where conversations are, of so many rows of tokens."""
    count = run.settings.conversations or 0
    calibration = min(run.settings.samples, rows - count)
    start = calibration - min(count, calibration // _EVERY_CONVERSATION)
    return slice(start, start + count)


def calibration_tokens(run: Run) -> Tensor | None:
    """(samples, seqlen). Fewer, where time is short, are taken evenly, so that conversations keep their share."""
    data = load_data(run)
    if data is None:
        return None
    tokens = data.tokens[: run.settings.samples]
    if run.fitted_samples is None or run.fitted_samples >= len(tokens):
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, run.fitted_samples).round().long()]


@dataclass(frozen=True)
class TrainingText:
    """Windows of one text, each (W, T) int64."""

    train: Tensor
    validation: Tensor
    judged: Tensor
    """A perplexity budget, if any, holds on these."""


def training_text(run: Run) -> TrainingText:
    """All there is of the calibration text, or what the model sampled.

    What is not trained on comes from the part that is held back: amid what is, a text that is read several times looks
    better than others like it. Only where that is too short it is of the rest.
    """
    windows, unseen = _windows(run)
    judged = 0 if run.settings.max_perplexity_ratio is None else min(JUDGED_WINDOWS, (len(windows) + 1) // 2)
    validation = min(VALIDATION_WINDOWS, max(1, int(len(windows) * VALIDATION_SHARE)))
    others = torch.cat([windows, unseen])
    others, judging = others.tensor_split([len(others) - judged])
    others, validating = others.tensor_split([max(0, len(others) - validation)])
    return TrainingText(others[: len(windows)], validating, judging)


def _windows(run: Run) -> tuple[Tensor, Tensor]:
    """Windows of TRAINING_SEQLEN or fewer tokens to train on, and those of the part that is held back."""
    data = load_data(run)
    assert data is not None
    tokens = data.tokens
    sampled = tokens if run.settings.calibration == "self" else tokens[_conversation_rows(run, len(tokens))]
    width = min(TRAINING_SEQLEN, tokens.shape[1]) if len(sampled) else TRAINING_SEQLEN
    sampled = sampled[:, : tokens.shape[1] // width * width].reshape(-1, width)
    if run.settings.calibration == "self":
        return sampled, sampled[:0]
    needed = max(1, _TRAINING_WINDOWS * width // tokens.shape[1])
    text = CalibrationText(
        run.settings.calibration,
        run.checkpoint,
        seqlen=tokens.shape[1],
        needed=needed,
        column=run.settings.text_column,
    )
    windows, unseen = text.windows(width, run.settings.seed), text.unseen(width)
    if not len(sampled):
        return windows, unseen
    often = max(1, len(windows) // (_EVERY_CONVERSATION - 1) // len(sampled))
    # Text comes last, since that is what judges where nothing else is held back: conversations are there several times.
    return torch.cat([sampled.repeat(often, 1), windows]), unseen
