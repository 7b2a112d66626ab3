"""Makes inputs more alike before weights are rounded to 4 bits: what an input is divided by, its weights take over.

The largest inputs of a layer are hundreds of times the smallest, while the weights that they meet share scales and so
an error. After AWQ (Lin et al., arXiv 2306.00978), inputs are divided by a power of their size, by the norm that gives
them, which costs nothing at run time. Whether a norm gives them, and nothing else is fed by it, is seen by running the
block: where what comes out changes, all stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftprune.calibration.runner import BlockRunner
from swiftprune.config import PruneSettings
from swiftprune.methods.statistics import InputStats
from swiftprune.models.plan import Block

if TYPE_CHECKING:
    from swiftprune.stages.context import Run

# Of how much larger than others an input is: docs/lab-notes.md has what others gave.
EXPONENT = 0.3
_FARTHEST = 10.0


def equalizes(settings: PruneSettings) -> bool:
    """Whether it is of use: not beside linears that are to be made dense again, which fit the norms as they were."""
    return settings.values == "int4" and settings.max_perplexity_ratio is None


def equalize(
    run: Run, block: Block, runner: BlockRunner, stats: Mapping[str, InputStats]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Norms of the loaded `block` as they are to be stored, by tensor, and what weights are to be multiplied by.

    That is (K,) fp32 for the tensor of each linear behind one of them. `stats` have the Gram matrices.
    """
    linears = {linear.name: linear.tensor for linear in block.linears}
    tensors, places = run.parameters(block), Counter(run.targets.tensor_of.values())
    norms: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    fed_by_norms, output = runner.fed_by_norms(block)
    for norm, fed in fed_by_norms.items():
        seen = [stats.get(name) for name in fed]
        if seen[0] is None or seen[0].gram is None or any(each is not seen[0] for each in seen):
            continue
        wanted, own = wanted_scale(seen[0].gram), runner.norm_parameters(norm)
        if f"{norm}.weight" not in own or any(each.shape != wanted.shape for each in own.values()):
            continue  # an activation with a weight, for one
        if run.checkpoint.made.keys() & own or any(places[tensors.get(name, "")] != 1 for name in own):
            continue  # stored in another way, or once for several
        for offset in (0.0, 1.0):  # some norms multiply by one more than their weight
            stored, scale = _divided(run, tensors, own, f"{norm}.weight", wanted, offset)
            if (scale != 1).any() and runner.gives(block, output, stored, dict.fromkeys(fed, scale)):
                norms |= {tensors[name]: parameter for name, parameter in stored.items()}
                scales |= {linears[name]: scale for name in fed}
                break
    return norms, scales


def _divided(
    run: Run, tensors: Mapping[str, str], own: Mapping[str, Tensor], weight: str, wanted: Tensor, offset: float
) -> tuple[dict[str, Tensor], Tensor]:
    """A norm's `own` parameters, by name, for outputs over about `wanted` (K,), and what these are over exactly.

    They are of the type that they are stored in, as `tensors`.
    """

    def stored(name: str, value: Tensor) -> Tensor:
        parameter = run.to_store(tensors[name], value, False)
        assert isinstance(parameter, Tensor)
        return parameter

    before = own[weight] + offset
    divided, as_it_was = stored(weight, before / wanted - offset), stored(weight, own[weight])
    changed = {weight: torch.where(divided.float() == -offset, as_it_was, divided)}  # so that none becomes zero
    after = changed[weight].float() + offset
    scale = torch.where((before != 0) & (after != 0), before / after, 1)
    return changed | {name: stored(name, own[name] / scale) for name in own if name != weight}, scale


def wanted_scale(gram: Tensor) -> Tensor:
    """(K,) fp32 of `gram` = X^T X (K, K): by how much each input is to shrink, one by the geometric mean."""
    size = gram.diagonal().clamp_min(0).sqrt()
    size = size.clamp_min(size.mean() * 1e-4).clamp_min(torch.finfo(torch.float32).tiny)
    return (size / size.log().mean().exp()).pow(EXPONENT).clamp(1 / _FARTHEST, _FARTHEST)


def scaled(stats: InputStats, scale: Tensor) -> InputStats:
    """Those of inputs that were divided by `scale` (K,), as far as rounding and the report need them."""
    gram = None if stats.gram is None else stats.gram / (scale[:, None] * scale)
    sample = None if stats.sample is None else stats.sample / scale
    return InputStats(stats.token_count, stats.on_all_tokens, gram=gram, sample=sample)
