"""The order of stages, for `prune` and for `exporters.export` alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from swiftprune.calibration.data import CalibrationData
from swiftprune.checkpoints.source import Checkpoint, Orders
from swiftprune.config import PruneSettings
from swiftprune.models.plan import Block
from swiftprune.progress import ProgressCallback, no_progress
from swiftprune.ranks import Ranks, local_device
from swiftprune.results import PrunedBlock
from swiftprune.stages.context import Run
from swiftprune.stages.distill import distill
from swiftprune.stages.keep_dense import keep_dense
from swiftprune.stages.permute import permute
from swiftprune.stages.prune import prune_blocks, pruned_blocks
from swiftprune.stages.round_values import round_values
from swiftprune.stages.store import BlockStore, MemoryStore, NoStore
from swiftprune.stages.text import take_text
from swiftprune.stages.tune_scales import tune_scales

STAGES: tuple[Callable[[Run, BlockStore], None], ...] = (
    take_text,
    permute,
    prune_blocks,
    distill,
    round_values,
    tune_scales,
    keep_dense,
)
"""Each leaves its result in the store, and does nothing where settings do not ask for it."""
_SHARED = STAGES[: STAGES.index(distill) + 1]
"""Those that all processes of a run go through; the rest is the first one's."""


def run_stages(run: Run, store: BlockStore) -> None:
    """All stages in order: blocks that `store` has are not pruned again, and all of them are there at the end."""
    for stage in STAGES:
        stage(run, store)


def tell_others(run: Run) -> None:
    """In the first process, before `run_stages`: gives those that `follow` what it decided."""
    run.ranks.from_first((run.settings, run.data, run.orders, run.fitted_samples))


def follow(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """The stages in a process that is not the first one: it keeps nothing."""
    told: tuple[PruneSettings, CalibrationData | None, Orders | None, int | None] | None = None
    told = ranks.from_first(told)
    assert told is not None
    settings, data, orders, fitted_samples = told
    device = "cpu" if settings.device == "cpu" else str(local_device())
    run = Run(checkpoint, settings.model_copy(update={"device": device}), data=data, ranks=ranks)
    run.orders, run.fitted_samples = orders, fitted_samples
    store = NoStore()
    for stage in _SHARED:
        stage(run, store)


def stream_blocks(run: Run, store: BlockStore | None = None) -> Iterator[PrunedBlock]:
    """The stages up to `prune_blocks`, each block yielded as soon as it is done and not kept."""
    store = store or MemoryStore(run)
    take_text(run, store)
    permute(run, store)
    yield from pruned_blocks(run, store)


def prune(
    model: str | Path, settings: PruneSettings | None = None, *, progress: ProgressCallback = no_progress
) -> Iterator[PrunedBlock]:
    """Prunes a checkpoint without writing anything.

    `model` is a local folder or a hub id. Yields each decoder block as soon as it is done, so that only one is in
    memory; with `refine=("distill",)` or `max_perplexity_ratio`, which work on the whole model, all of them at the end.
    `weights` of a block holds all of its tensors that differ from the checkpoint's: with `permute`, which reorders
    channels throughout the network, these are norms and biases too, and a last item without linears holds those
    outside of the blocks (embeddings, head). `swiftprune.unpack` makes any of them dense. To write the result use
    `exporters.export`.

    >>> for done in prune("./my-model", PruneSettings(method="wanda", calibration="text.txt")):  # doctest: +SKIP
    ...     print(done.block.name, [layer.output_error for layer in done.results])
    """
    run = Run(Checkpoint.open(model), settings or PruneSettings(), progress=progress)
    if "distill" in run.settings.refine or run.settings.max_perplexity_ratio is not None:
        run_stages(run, store := MemoryStore(run))
        done: Iterable[PrunedBlock] = store.blocks.values()
    else:
        done = stream_blocks(run)
    for block in done:
        yield dataclasses.replace(block, weights=run.permuted(block.block.tensors) | block.weights)
    if outside := run.permuted(run.targets.outside):
        yield PrunedBlock(Block("", [], list(outside)), outside, [])
