"""Prunes block after block: calibrate, score, mask, and refine what is in the block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftprune.calibration.runner import BlockRunner
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.formats import spec
from swiftprune.formats.spec import check_finite
from swiftprune.kernels import packing
from swiftprune.methods.least_squares import refine_weights
from swiftprune.methods.mask import select
from swiftprune.methods.statistics import InputStats
from swiftprune.models.plan import Block, Linear
from swiftprune.results import PrunedBlock, PrunedWeight, layer_result, moved
from swiftprune.stages import refine_blocks
from swiftprune.stages.clock import Tick
from swiftprune.stages.round_values import on_same_inputs, rounded_block, rounds_last
from swiftprune.stages.store import BlockStore
from swiftprune.stages.text import calibration_tokens

if TYPE_CHECKING:
    from swiftprune.stages.context import Run

# Of the minutes of a preset, what pruning may take at most; the rest is for distillation.
_PRUNING_SHARE = 0.6
_LEAST_SAMPLES = 4


def prune_blocks(run: Run, store: BlockStore) -> None:
    """Prunes all blocks that `store` has not."""
    for done in pruned_blocks(run, store):
        run.save(store, done)


def pruned_blocks(run: Run, store: BlockStore) -> Iterator[PrunedBlock]:
    """Prunes block after block, each on the outputs of the pruned blocks before it.

    A block that `store` has already is only run forward, if one that it has not follows, and is not yielded.
    """
    unfinished = run.ranks.from_first(
        [index for index, block in enumerate(run.targets.blocks) if not store.finished(block)]
    )
    if not unfinished:
        return
    runner = _runner(run)
    steps = len(runner.hidden) * (1 if run.settings.one_pass else 2) if runner else 1
    if "blocks" in run.settings.refine:
        steps += refine_blocks.STEPS
    announced = False
    starved: list[str] = []
    for index, block in enumerate(run.targets.blocks[: unfinished[-1] + 1]):
        tick = Tick(run.progress, index * steps, len(run.targets.blocks) * steps)
        if index not in unfinished:
            if runner:
                _forward_finished(run, runner, block, store, tick)
            continue
        start = time.monotonic()
        pruned = _prune_and_advance(run, block, runner, tick)
        if index == 0 and runner and (fewer := run.ranks.from_first(_too_many_samples(run, time.monotonic() - start))):
            run.fitted_samples = fewer
            store.keep_fitted_samples(fewer)
            runner = _runner(run)
            start = time.monotonic()
            pruned = _prune_and_advance(run, block, runner, tick)
        tick.to_end(index + 1, steps)
        if not announced:
            _announce_cost(run, time.monotonic() - start, len(run.targets.blocks) - index)
            announced = True
        starved += [result.name for result in pruned.results if result.on_all_tokens]
        yield pruned
    _note_starved_experts(run, starved)


def _runner(run: Run) -> BlockRunner | None:
    tokens = calibration_tokens(run)
    if tokens is None or (run.needs == "nothing" and "blocks" not in run.settings.refine):
        return None
    if len(tokens) < run.ranks.count:
        raise SettingsError(
            f"the calibration text gives {len(tokens)} sequences for {run.ranks.count} processes; give more text"
        )
    with run.clock("calibrate"):
        return BlockRunner(
            run.model,
            run.checkpoint,
            run.targets,
            run.ranks.share(tokens),
            compute=run.compute,
            ranks=run.ranks,
            track_dense=run.needs == "drift" or "blocks" in run.settings.refine,
        )


def _prune_and_advance(run: Run, block: Block, runner: BlockRunner | None, tick: Callable[[], None]) -> PrunedBlock:
    with runner.block(block) if runner else nullcontext():
        pruned = _prune_block(run, block, runner, tick)
        if runner and not run.settings.one_pass:
            with run.clock("calibrate"):
                runner.advance(block, run.by_parameter(block, pruned.weights), tick)
    return pruned


def _too_many_samples(run: Run, seconds: float) -> int | None:
    """How many calibration sequences a preset can afford, if fewer than the first block, so slow, was pruned on."""
    minutes, tokens = run.settings.minutes, calibration_tokens(run)
    assert tokens is not None
    samples = len(tokens)
    if minutes is None or "samples" not in run.settings.from_preset or run.fitted_samples is not None:
        return None
    spent = (time.monotonic() - run.started) / 60
    whole = seconds * len(run.targets.blocks) / 60
    room = _PRUNING_SHARE * minutes - spent
    if spent - seconds / 60 + whole <= _PRUNING_SHARE * minutes:
        return None
    fewer = max(_LEAST_SAMPLES, run.ranks.count, int(samples * room / whole))
    if fewer >= samples:
        return None
    run.notify(
        f"One block took {seconds:.1f} s, so all on {samples} calibration sequences would take too much of "
        f"{minutes:g} minutes: {fewer} are used instead. To use more, give --samples or more --minutes."
    )
    return fewer


def _announce_cost(run: Run, seconds: float, blocks: int) -> None:
    """Says how long it will all take, from one block that was pruned, before most of it is done."""
    spent = (time.monotonic() - run.started) / 60
    total = spent + seconds * (blocks - 1) / 60
    text = f"One block took {seconds:.1f} s; pruning all will have taken about {total:.1f} minutes"
    if minutes := run.settings.minutes:
        text += f", and distillation goes on until minute {minutes:g}"
        if total >= minutes:
            text += ": there will be no time left for it, so give more --minutes, or fewer --samples"
    elif run.settings.steps:
        text += f", and {run.settings.steps} steps of distillation follow"
    run.notify(f"{text}.")


def _note_starved_experts(run: Run, linears: list[str]) -> None:
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in linears))
    if names:
        run.notify(
            f"Experts whose routers gave them too few calibration tokens: {len(names)}, first {names[0]}. They were "
            "calibrated on all tokens (swiftprune.json says which); more --samples route more to them."
        )


def _forward_finished(run: Run, runner: BlockRunner, block: Block, store: BlockStore, tick: Callable[[], None]) -> None:
    weights = run.ranks.by_first(lambda: store.load(block))
    with run.clock("calibrate"), runner.block(block):
        runner.advance_dense(block)
        runner.advance(block, {} if run.settings.one_pass else run.by_parameter(block, weights), tick)


def _prune_block(run: Run, block: Block, runner: BlockRunner | None, tick: Callable[[], None]) -> PrunedBlock:
    stats: dict[str, InputStats] = {}
    if runner:
        with run.clock("calibrate"):
            stats = runner.collect(block, run.needs, tick, advance=run.settings.one_pass)
            _check_inputs(stats, block, run.checkpoint.folder)
    with run.clock("read"):
        dense = moved(run.checkpoint.read(linear.tensor for linear in block.linears), run.compute.device)
    weights: dict[str, PrunedWeight] = {}
    seconds: dict[str, float] = {}
    for linears in run.ranks.share(_together(run, block, stats)):
        layer_stats = stats.get(linears[0].name)
        before = [dense[linear.tensor] for linear in linears]
        run.compute.wait()
        start = time.perf_counter()
        after = _prune_linears(run, linears, before, layer_stats or InputStats(token_count=0))
        run.compute.wait()
        elapsed = time.perf_counter() - start
        run.clock.seconds["mask"] += elapsed
        size = sum(weight.numel() for weight in before)
        for linear, old, new in zip(linears, before, after, strict=True):
            seconds[linear.name] = elapsed * old.numel() / size
            weights[linear.tensor] = new
    if run.ranks.count > 1:
        with run.clock("exchange"):
            weights, seconds = _exchanged(run, weights, seconds)
    if runner and "blocks" in run.settings.refine:
        with run.clock("refine blocks"):
            weights = _refine_block(run, block, weights, runner, tick)
    if run.settings.values and not run.keeps_values and not rounds_last(run.settings):
        with run.clock("round values"):
            weights = rounded_block(run, block, weights, stats, runner)
            dense = run.with_input_scales(block, dense)
    with run.clock("output error"):
        results = [
            layer_result(
                linear, dense[linear.tensor], weights[linear.tensor], stats.get(linear.name), seconds[linear.name]
            )
            for linear in block.linears
        ]
    return PrunedBlock(block, moved(weights, torch.device("cpu")), results)


def _exchanged(
    run: Run, weights: dict[str, PrunedWeight], seconds: dict[str, float]
) -> tuple[dict[str, PrunedWeight], dict[str, float]]:
    """What all processes have pruned of a block, and how long each linear took."""
    all_weights: dict[str, PrunedWeight] = {}
    all_seconds: dict[str, float] = {}
    for their_weights, their_seconds in run.ranks.from_all((moved(weights, torch.device("cpu")), seconds)):
        all_weights |= their_weights
        all_seconds |= their_seconds
    return moved(all_weights, run.compute.device), all_seconds


def _refine_block(
    run: Run, block: Block, weights: dict[str, PrunedWeight], runner: BlockRunner, tick: Callable[[], None]
) -> dict[str, PrunedWeight]:
    pruned = run.by_parameter(block, weights)
    parameters = run.parameters(block)
    keep_masks = {name: packing.keep_mask(weights[parameters[name]]) for name in pruned}
    refined = refine_blocks.refine(runner, block, pruned, keep_masks, tick)
    return {
        parameters[name]: run.to_store(parameters[name], weight, name in pruned) for name, weight in refined.items()
    }


def _together(run: Run, block: Block, stats: Mapping[str, InputStats]) -> list[list[Linear]]:
    """The linears of a block in order; those on the same inputs together, where methods share what inputs cost."""
    if run.method.prune is None or not run.pattern.structured:
        return [[linear] for linear in block.linears]
    return on_same_inputs(block, stats)


def _prune_linears(run: Run, linears: list[Linear], weights: list[Tensor], stats: InputStats) -> list[PrunedWeight]:
    if run.stored_weights and run.keeps_values:
        return [run.stored_weights.packed(linear.tensor) for linear in linears]
    # One that does not fit its new type becomes infinite and is refused.
    weights = [weight.to(run._stored(weight.dtype)) for weight in weights]
    if run.method.factors and "weights" not in run.settings.refine and run.pattern.name == spec.FORMAT:
        factors = run.method.factors(weights[0], stats, run.pattern.group)
        return [packing.prune_and_pack(weights[0], factors, linears[0].tensor)]
    for linear, weight in zip(linears, weights, strict=True):
        check_finite(weight, linear.tensor)
    whole = torch.cat(weights) if len(weights) > 1 else weights[0]
    given = None
    if run.masks:
        given = torch.cat([_given_mask(run, *pair) for pair in zip(linears, weights, strict=True)])
    pruned = _prune_dense(run, whole, stats, linears[0].name, given).to(whole.dtype)
    parts = torch.split(pruned, [len(weight) for weight in weights])
    if run.pattern.name != spec.FORMAT:
        return list(parts)
    return [packing.pack(part, linear.tensor) for part, linear in zip(parts, linears, strict=True)]


def _given_mask(run: Run, linear: Linear, weight: Tensor) -> Tensor:
    assert run.masks is not None
    mask = run.masks.read(linear.tensor, (weight.shape[0], weight.shape[1]), run.pattern)
    return weight != 0 if mask is None else mask.to(weight.device)


def _prune_dense(run: Run, weight: Tensor, stats: InputStats, name: str, given: Tensor | None) -> Tensor:
    """`weight` (N, K) with zeros in place, its kept weights refined where that is asked for.

    `given` is a keep_mask that was made elsewhere.
    """
    if given is not None:
        keep_mask = given
        pruned = torch.where(keep_mask, weight, 0)
    elif run.method.prune is not None:
        pruned = run.method.prune(weight, stats, run.pattern, name)
        keep_mask = pruned != 0
    else:
        assert run.method.factors is not None
        group = run.pattern.group if run.pattern.structured else weight.shape[1]
        scores = run.method.factors(weight, stats, group).scores(weight)
        if run.pattern.structured:  # a zero never takes the place of a weight whose score is 0 too
            scores.masked_fill_(weight == 0, -torch.inf)
        keep_mask = select(scores, run.pattern)
        pruned = torch.where(keep_mask, weight, 0)
    if "weights" not in run.settings.refine:
        return pruned
    assert stats.gram is not None
    return refine_weights(weight, keep_mask, stats.gram, stats.drift(weight))


def _check_inputs(stats: dict[str, InputStats], block: Block, folder: Path) -> None:
    """Raises CheckpointError for inputs that are not finite, since scores of NaN would order nothing, or that lack."""
    for linear in block.linears:
        name = linear.name
        if name not in stats:
            raise CheckpointError(
                f"{folder}: {name} did not run on the calibration text, so nothing is known of its inputs; leave it "
                "dense with --ignore"
            )
        seen = stats[name].channel_energy
        if torch.isfinite(seen).all():
            continue
        channel = int((~torch.isfinite(seen)).nonzero()[0])
        raise CheckpointError(
            f"{folder}: input channel {channel} of {name} is not finite on the calibration text, though all "
            "weights are: the model computes numbers that are too large"
        )
