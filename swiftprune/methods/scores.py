"""How much each weight matters: every one-shot method, most in the separable form the kernels take.

A score only has to order the weights that compete, so each function returns factors of an equivalent order
(square roots, dropped constants); its docstring gives the published formula. Notation: W (N, K); x_k the input of
channel k; `input_sq_sum[k]` = sum of x_k^2 over all calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.formats.spec import FORMAT
from swiftprune.kernels.score_factors import ScoreFactors
from swiftprune.methods.admm import admm
from swiftprune.methods.mask import Pattern
from swiftprune.methods.pairs import keep_pairs
from swiftprune.methods.sparsegpt import sparsegpt
from swiftprune.methods.statistics import InputStats, Needs

KEEP = "keep"
"""The method that leaves weights as they are: see `keep`."""

# Keeps the denominator form finite where one channel carries all the energy of its group; relative to S.
DAMPING = 1e-2


def magnitude(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """|w| (Han et al., 2015)."""
    return ScoreFactors.of_magnitude(weight.shape[1], weight.device)


def wanda(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """|w| * ||x_k||_2 (Sun et al., arXiv 2306.11695, eq. 1)."""
    return ScoreFactors(stats.channel_energy.sqrt())


def ria(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """(|w| / sum of its row + |w| / sum of its column) * ||x_k||^0.5 (Zhang et al., ICLR 2024, eq. 3, a = 0.5)."""
    absolute = weight.float().abs()
    activation = stats.channel_energy.sqrt().sqrt()
    tiny = torch.finfo(torch.float32).tiny
    row = 1 / absolute.sum(1).clamp_min(tiny)
    column = 1 / absolute.sum(0).clamp_min(tiny)
    return ScoreFactors(column * activation, row=row, cross=activation)


def contribution(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """L = 1/2 w^2 (1 - x_k^2 / S), S over all inputs: SwiftPrune (arXiv 2501.16376) as its reviews state it."""
    energy = stats.channel_energy
    share = energy / energy.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return ScoreFactors((1 - share).clamp_min(0).sqrt())


def contribution_obs(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """L = 1/2 w^2 / (1 - x_k^2 / (lambda + S)), S over all inputs.

    Our derivation: the OBS saliency is 1/2 w^2 / [H^-1]_kk, and for H = x x^T + lambda I Sherman-Morrison gives
    [H^-1]_kk = (1 - x_k^2 / (lambda + S)) / lambda. lambda = DAMPING * S.
    """
    energy = stats.channel_energy
    return ScoreFactors(_obs_factor(energy, energy.sum()).sqrt())


def contribution_group(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """The OBS form with S over the weights that compete with each other, the group of M.

    Only the weights of one group are compared, so what counts is how the channel stands among those: over all K
    inputs x_k^2 / S is about 1/K and the factor is nearly constant, which leaves little but magnitude.
    """
    energy = stats.channel_energy
    competing = energy.view(-1, group).sum(1, keepdim=True).expand(-1, group).flatten()
    return ScoreFactors(_obs_factor(energy, competing).sqrt())


def contribution_share(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """L = w^2 (x_k^2 / S)^(1/2), S over the group: the channel's share of its group's input energy.

    Not in the paper. The exponent 1/2 is that of RIA, whose activation factor this is; with exponent 1 it is Wanda,
    with 0 magnitude. S is the same for all that compete, so the order is that of |w| ||x_k||^0.5. It is the default
    because none of the forms here that change no weights measured better; Wanda comes close (docs/lab-notes.md).
    """
    return ScoreFactors(stats.channel_energy.sqrt().sqrt())


def contribution_data_free(weight: Tensor, stats: InputStats, group: int) -> ScoreFactors:
    """L = 1/2 w^2 (1 - w^2 / S_n), S_n = sum of squares of row n: the contribution form without inputs.

    Within a row this is the order of magnitude: L rises with w^2 up to S_n / 2, and a weight beyond that still scores
    no less than any other, since those are at most S_n - w^2 and L(S_n - w^2) = L(w^2).
    """
    row_energy = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    return ScoreFactors(
        torch.ones(weight.shape[1], device=weight.device),
        curvature=1 / row_energy.clamp_min(torch.finfo(torch.float32).tiny),
    )


def _obs_factor(energy: Tensor, total: Tensor) -> Tensor:
    damped = (1 + DAMPING) * total
    return damped.clamp_min(torch.finfo(torch.float32).tiny) / (damped - energy).clamp_min(
        torch.finfo(torch.float32).tiny
    )


@dataclass(frozen=True)
class Method:
    """A pruning method: what calibration must collect for it, and its score (None: it also changes weights)."""

    summary: str
    needs: Needs
    factors: Callable[[Tensor, InputStats, int], ScoreFactors] | None
    prune: Callable[[Tensor, InputStats, Pattern, str], Tensor] | None = None
    """Of what has no separable score: (weight (N, K), statistics, pattern, name) -> pruned fp32 weight (N, K)."""
    only: str | None = None
    """The one pattern that it makes; None: any."""
    ablation: bool = False
    """A form of the paper's metric that is there to compare with."""


def _by_pairs(weight: Tensor, stats: InputStats, pattern: Pattern, name: str) -> Tensor:
    return torch.where(keep_pairs(weight, stats.gram_of_groups), weight, 0)


def _by_sparsegpt(weight: Tensor, stats: InputStats, pattern: Pattern, name: str) -> Tensor:
    assert stats.gram is not None
    return sparsegpt(weight, stats.gram, pattern, name)


def _by_admm(weight: Tensor, stats: InputStats, pattern: Pattern, name: str) -> Tensor:
    assert stats.gram is not None
    return admm(weight, stats.gram, stats.drift(weight), pattern, name)


def _kept(weight: Tensor, stats: InputStats, pattern: Pattern, name: str) -> Tensor:
    return weight


METHODS: dict[str, Method] = {
    "admm": Method("mask and kept weights in turn, against the dense model's outputs", "drift", None, _by_admm),
    "swiftprune": Method(
        "the paper's contribution metric, by share of input energy", "input_sq_sum", contribution_share
    ),
    "swiftprune-group": Method(
        "contribution metric, OBS form, S over the group", "input_sq_sum", contribution_group, ablation=True
    ),
    "swiftprune-obs": Method(
        "contribution metric, OBS form, S over all inputs", "input_sq_sum", contribution_obs, ablation=True
    ),
    "swiftprune-numerator": Method(
        "contribution metric as the paper's reviews state it", "input_sq_sum", contribution, ablation=True
    ),
    "swiftprune-data-free": Method(
        "contribution metric from the weights alone", "nothing", contribution_data_free, ablation=True
    ),
    "magnitude": Method("absolute value", "nothing", magnitude),
    "wanda": Method("weight times input norm", "input_sq_sum", wanda),
    "ria": Method("relative importance times input norm", "input_sq_sum", ria),
    "swiftprune-pairs": Method(
        "both weights of a group that go, judged together", "group_gram", None, _by_pairs, only=FORMAT
    ),
    "sparsegpt": Method("second-order mask with an update of the kept weights", "gram", None, _by_sparsegpt),
    KEEP: Method("changes nothing: for weights that are sparse already, or with --mask", "nothing", None, _kept),
}


def find_method(name: str) -> Method:
    """The method of that name; raises SettingsError that lists all when there is none."""
    if name not in METHODS:
        known = "\n".join(f"  {key:22} {method.summary}" for key, method in METHODS.items())
        raise SettingsError(f"unknown method {name!r}; known methods:\n{known}")
    return METHODS[name]
