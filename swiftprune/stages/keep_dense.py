"""Which linears to leave dense, so that the model stays within a perplexity budget at the least cost in bytes.

To restore the dense weight D of a pruned layer V changes the loss, to first order, by <dL/dV, D - V>: one backward pass
rates all layers at once (Molchanov et al., arXiv 1906.10771, turned around). Layers are restored in the order of what
they promise per byte, and how many it takes is found by bisection, with perplexity measured each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swiftprune.errors import SettingsError
from swiftprune.models.architectures import fused_sets
from swiftprune.models.perplexity import dense_perplexity, perplexity
from swiftprune.models.plan import Block
from swiftprune.progress import ProgressCallback, no_progress
from swiftprune.results import PrunedBlock, PrunedWeight, layer_result
from swiftprune.stages.text import training_text

if TYPE_CHECKING:
    from swiftprune.stages.context import Run
    from swiftprune.stages.store import BlockStore

STAGE = "keep dense"
GRADIENT_WINDOWS = 16


def keep_dense(run: Run, store: BlockStore) -> None:
    """Restores linears until perplexity is within `max_perplexity_ratio`, and saves their blocks anew."""
    if run.settings.max_perplexity_ratio is None:
        return
    if run.dense_linears is None:
        run.dense_linears = _dense_linears(run, store)
        store.keep_dense_linears(run.dense_linears)
    for block in run.targets.blocks:
        if any(linear.name in run.dense_linears for linear in block.linears):
            run.save(store, _with_dense(run, block, store.load(block), run.dense_linears))


def _dense_linears(run: Run, store: BlockStore) -> list[str]:
    """The linears to leave dense for `max_perplexity_ratio`. See `keep_dense`."""
    assert run.settings.max_perplexity_ratio is not None
    linears = {linear.name: linear.tensor for block in run.targets.blocks for linear in block.linears}
    with run.clock("keep dense"), run.compute.autocast():
        windows = training_text(run).judged
        model = run.load_whole(torch.float32)
        dense = dense_perplexity(model, windows)
        run.put_pruned(model, store.load)
        return select_dense(
            model,
            lambda name: run.checkpoint.read([linears[name]])[linears[name]].float(),
            fused_sets(linears),
            windows,
            dense_perplexity=dense,
            max_ratio=run.settings.max_perplexity_ratio,
            progress=run.progress,
        )


def _with_dense(run: Run, block: Block, finished: Mapping[str, PrunedWeight], names: Collection[str]) -> PrunedBlock:
    """`block`, all of whose tensors are `finished`, with the linears of `names` as they were before pruning."""
    linears = {linear.tensor: linear for linear in block.linears}
    weights: dict[str, PrunedWeight] = dict(finished)
    results = []
    before = run.checkpoint.read(linears)
    for tensor, linear in linears.items():
        if linear.name in names:
            weights[tensor] = before[tensor].to(run._stored(before[tensor].dtype))
            continue
        results.append(layer_result(linear, before[tensor], weights[tensor], None, 0.0))
    return PrunedBlock(block, weights, results)


def select_dense(
    model: Any,
    dense: Callable[[str], Tensor],
    sets: Sequence[Sequence[str]],
    windows: Tensor,
    *,
    dense_perplexity: float,
    max_ratio: float,
    progress: ProgressCallback = no_progress,
) -> list[str]:
    """The linears to restore, of `sets` of names that engines run as one layer, none of which may be split.

    `model` is the pruned causal LM, `dense` gives a linear's dense fp32 weight by name, `windows` (W, T) int64 are what
    perplexity is measured on. The model is left with these linears restored. Raises SettingsError when even all of them
    are not enough, or all of them are needed.
    """
    limit = max_ratio * dense_perplexity
    pruned = {name: model.get_submodule(name).weight for names in sets for name in names}
    gains = _first_order_gains(model, dense, pruned, windows[:GRADIENT_WINDOWS])
    rated = sorted(
        sets, key=lambda names: sum(gains[name] for name in names) / sum(pruned[name].numel() for name in names)
    )
    before = {name: weight.detach().clone() for name, weight in pruned.items()}
    rounds = math.ceil(math.log2(len(rated) + 1)) + 1
    done = 0

    def restore(count: int) -> None:
        restored = {name for names in rated[:count] for name in names}
        for name, weight in pruned.items():
            weight.data.copy_(dense(name) if name in restored else before[name])

    def measure(count: int) -> float:
        nonlocal done
        restore(count)
        value = perplexity(model, windows)
        done += 1
        progress(STAGE, done, max(done, rounds))
        return value

    low, high = 0, len(rated)  # fewer than `low` are too few, `high` are enough
    if not (lowest := measure(high)) <= limit:
        raise SettingsError(
            f"--max-perplexity-ratio {max_ratio:g}: with every linear dense perplexity still is "
            f"{lowest / dense_perplexity:.3f} times the dense model's"
        )
    while low < high:
        middle = (low + high) // 2
        if measure(middle) <= limit:
            high = middle
        else:
            low = middle + 1
    if high == len(rated):
        raise SettingsError(
            f"--max-perplexity-ratio {max_ratio:g}: only with every linear dense is perplexity within it, so nothing "
            "would be pruned; give a higher ratio, or a better method or --quality"
        )
    restore(high)
    return [name for names in rated[:high] for name in names]


def _first_order_gains(
    model: Any, dense: Callable[[str], Tensor], pruned: Mapping[str, nn.Parameter], windows: Tensor
) -> dict[str, float]:
    """By name, <dL/dV, D - V>: the lower, the more perplexity falls when the layer is restored."""
    model.requires_grad_(False)
    for weight in pruned.values():
        weight.requires_grad_(True)
    for window in windows:
        logits = model(input_ids=window[None].to(model.device), use_cache=False).logits[0, :-1].float()
        F.cross_entropy(logits, window[1:].to(model.device)).backward()  # type: ignore[no-untyped-call]
    gains = {}
    with torch.no_grad():
        for name, weight in pruned.items():
            assert weight.grad is not None
            gains[name] = float((weight.grad * (dense(name).to(weight.device) - weight)).sum())
            weight.requires_grad_(False).grad = None
    return gains
