"""Stores the kept weights in 8 or 4 bits: block by block as they are pruned, or at the end where they are trained."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftprune.calibration.runner import BlockRunner
from swiftprune.config import PruneSettings
from swiftprune.formats.spec import Quantized
from swiftprune.kernels import packing
from swiftprune.kernels.quantize import quantize, split_rows
from swiftprune.methods.rounding import round_kept
from swiftprune.methods.statistics import InputStats
from swiftprune.models.plan import Block, Linear
from swiftprune.results import PrunedBlock, PrunedWeight, layer_result, moved
from swiftprune.stages.clock import Tick
from swiftprune.stages.equalize import equalize, equalizes, scaled
from swiftprune.stages.text import calibration_tokens

if TYPE_CHECKING:
    from swiftprune.stages.context import Run
    from swiftprune.stages.store import BlockStore


# Forwards of the pruned model and its Gram matrices, of what calibration takes, which runs the dense model too.
_OF_CALIBRATION = 0.6


def rounds_last(settings: PruneSettings) -> bool:
    """Whether values are rounded after distillation: steps of training are smaller than those between 4-bit values."""
    return settings.values is not None and "distill" in settings.refine


def round_values(run: Run, store: BlockStore) -> None:
    """Rounds all blocks, each for what the rounded blocks before it give."""
    if not (run.settings.values and rounds_last(run.settings)):
        return
    tokens = calibration_tokens(run)
    assert tokens is not None, "distillation has text"
    with run.clock("round values"):
        runner = BlockRunner(run.model, run.checkpoint, run.targets, tokens, compute=run.compute)
    for index, block in enumerate(run.targets.blocks):
        tick = Tick(run.progress, index * 2 * len(tokens), len(run.targets.blocks) * 2 * len(tokens), "round values")
        with run.clock("round values"), runner.block(block):
            trained = moved(store.load(block), run.compute.device)
            runner.put(run.by_parameter(block, trained))
            stats = runner.collect(block, "gram", tick)
            rounded = rounded_block(run, block, trained, stats, runner)
            runner.advance(block, run.by_parameter(block, rounded), tick)
            dense = moved(run.read_dense(block), run.compute.device)
            results = [
                layer_result(linear, dense[linear.tensor], rounded[linear.tensor], stats.get(linear.name), 0.0)
                for linear in block.linears
            ]
        run.save(store, PrunedBlock(block, moved(rounded, torch.device("cpu")), results))


def rounded_block(
    run: Run,
    block: Block,
    weights: Mapping[str, PrunedWeight],
    stats: dict[str, InputStats],
    runner: BlockRunner | None,
) -> dict[str, PrunedWeight]:
    """`weights` of the loaded block with kept ones rounded, and its norms where these make inputs more alike.

    `stats` are then changed to those of the new inputs, and `run.input_scales` has what weights were multiplied by.
    """
    assert run.settings.values
    norms: dict[str, Tensor] = {}
    if runner and equalizes(run.settings):
        norms, run.input_scales[block.name] = equalize(run, block, runner, stats)
    scales = run.input_scales.get(block.name, {})
    for linears in on_same_inputs(block, stats):
        first = linears[0]
        if (scale := scales.get(first.tensor)) is not None:
            stats |= dict.fromkeys([linear.name for linear in linears], scaled(stats[first.name], scale))
    return round_block(run.settings.values, block, weights, stats, scales) | norms


def seconds_to_round(run: Run, store: BlockStore) -> float:
    """About how long `round_values` will take: from the forwards of calibration, and rounding one block for show."""
    assert run.settings.values
    block = run.targets.blocks[0]
    weights = moved(store.load(block), run.compute.device)
    stats = {}
    for linear in block.linears:
        columns = run.checkpoint.tensors[linear.tensor].shape[1]
        stats[linear.name] = InputStats(token_count=1, gram=torch.eye(columns, device=run.compute.device))
    run.compute.wait()
    start = time.monotonic()
    round_block(run.settings.values, block, weights, stats)
    run.compute.wait()
    one = time.monotonic() - start
    return one * len(run.targets.blocks) + _OF_CALIBRATION * run.clock.seconds["calibrate"]


def round_block(
    values: Quantized,
    block: Block,
    weights: Mapping[str, PrunedWeight],
    stats: Mapping[str, InputStats],
    scales: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, PrunedWeight]:
    """`weights` with the kept ones of linears in 8 or 4 bits; those on the same inputs share what these cost.

    Those that `scales` (K,) names are multiplied by them before.
    """
    rounded = dict(weights)
    for linears in on_same_inputs(block, stats):
        seen = stats.get(linears[0].name)
        kept = [packing.unpack(weights[linear.tensor]) for linear in linears]
        kept = [weight * scales.get(linear.tensor, 1) for linear, weight in zip(linears, kept, strict=True)]
        masks = [packing.keep_mask(weights[linear.tensor]) for linear in linears]
        if seen is None or seen.gram is None:
            parts = [quantize(*pair, values, linears[0].tensor) for pair in zip(kept, masks, strict=True)]
        else:
            whole = round_kept(torch.cat(kept), torch.cat(masks), seen.gram, values, linears[0].name)
            parts = split_rows(whole, [len(weight) for weight in kept])
        rounded |= {linear.tensor: part for linear, part in zip(linears, parts, strict=True)}
    return rounded


def on_same_inputs(block: Block, stats: Mapping[str, InputStats]) -> list[list[Linear]]:
    """The linears of a block in order, those together whose inputs are the same; each alone where none were seen."""
    if not stats:
        return [[linear] for linear in block.linears]
    sharing: dict[int, list[Linear]] = defaultdict(list)
    for linear in block.linears:
        sharing[id(stats[linear.name])].append(linear)
    return list(sharing.values())
