"""The tokens that a model is calibrated on, and those that the result is judged by."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor

from swiftprune.calibration.sampling import sampled_text
from swiftprune.calibration.text import HELD_BACK, HELD_BACK_OF, CalibrationText
from swiftprune.calibration.text_files import DEFAULT_COLUMN
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.compute import Compute
from swiftprune.progress import ProgressCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationData:
    """Token ids, int64, all windows of one length."""

    tokens: Tensor
    """(samples, seqlen): calibration runs on these."""
    held_back: Tensor
    """(W, seqlen): of the same text, for the check alone; W is 0 where there is little text."""


def calibration_data(
    source: str,
    checkpoint: Checkpoint,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    progress: ProgressCallback,
    compute: Compute | None = None,
    column: str = DEFAULT_COLUMN,
) -> CalibrationData:
    """`source` is `self` (the model samples its own text), a text file (see `text_files`) or a data set id.

    A text is cut into windows of `seqlen` tokens, of which `samples` are drawn without replacement under `seed`; a
    text that has fewer windows gives what it has, with a warning. Raises TextError when it has none.
    """
    if source == "self":
        more = min(HELD_BACK, samples // HELD_BACK_OF)
        sampled = sampled_text(
            checkpoint,
            samples=samples + more,
            seqlen=seqlen,
            seed=seed,
            compute=compute or Compute(),
            progress=progress,
        )
        return CalibrationData(sampled[:samples], sampled[samples:])
    text = CalibrationText(source, checkpoint, seqlen=seqlen, needed=samples, column=column)
    windows = text.windows(seqlen, seed)
    if len(windows) < samples:
        logger.warning("%s gives %d windows of %d tokens, not the %d asked for", source, len(windows), seqlen, samples)
    return CalibrationData(windows[:samples], text.held_back)
