"""Trains what rounding left free, scales and norms, towards the dense model: the last part of distillation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from swiftprune.formats.spec import Packed24
from swiftprune.stages.distill import (
    Budget,
    Distillation,
    Scaled,
    minutes_left,
    models_to_train,
    trained_block,
    within_blocks,
)
from swiftprune.stages.round_values import rounds_last

if TYPE_CHECKING:
    from swiftprune.stages.context import Run
    from swiftprune.stages.store import BlockStore

LEARNING_RATE = 1e-3
_STEPS_SHARE = 4  # one for so many of the steps that weights were trained for


def tune_scales(run: Run, store: BlockStore) -> None:
    """Trains scales and norms of the rounded model, and saves every block anew."""
    if not rounds_last(run.settings):
        return
    steps = run.settings.steps
    with run.clock("tune scales"):
        text, teacher, student, rounded = models_to_train(run, store.load)
        scaled = {
            name: Scaled(weight, run.compute.device) for name, weight in rounded.items() if isinstance(weight, Packed24)
        }
        tuning = Distillation(
            student,
            teacher,
            {},
            within_blocks(run),
            text.train,
            text.validation,
            scaled=scaled,
            fixed=run.checkpoint.made,
            learning_rate=LEARNING_RATE,
            compute=run.compute,
            seed=run.settings.seed,
            progress=run.progress,
        )
        before = run.validations[-1]
        found = tuning.run(Budget(minutes_left(run), None if steps is None else -(-steps // _STEPS_SHARE)))
        run.validations += [
            dataclasses.replace(one, step=one.step + before.step, minutes=one.minutes + before.minutes, rounded=True)
            for one in found
        ]
    for block in run.targets.blocks:
        run.save(store, trained_block(run, student, block, scaled))
