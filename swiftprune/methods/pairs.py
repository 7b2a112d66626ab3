"""2:4 masks that judge the two weights to go together, with how their inputs go together.

Derivation, from optimal brain surgeon (Hassibi & Stork, 1993) within one group of four. Let G (4, 4) be the Gram
matrix of the group's inputs, P the pair that goes and Q the pair that stays. If the weights of Q may make up for those
of P, the output error of the best they can do is

    w_P^T S_P w_P,    S_P = G_PP - G_PQ G_QQ^-1 G_QP    (the Schur complement of G_QQ)

Six pairs are possible and the cheapest goes. The kept weights stay as they were: making up within the group alone gains
nothing (docs/lab-notes.md), but what could be made up for is the right thing to drop.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from swiftprune.formats.spec import GROUP, KEPT

# Relative to the trace of a group's Gram matrix: inverses exist where inputs repeat each other or never were active.
DAMPING = 0.01


def keep_pairs(weight: Tensor, group_gram: Tensor) -> Tensor:
    """The bool (N, K) keep_mask of `weight` (N, K); `group_gram` (K/4, 4, 4) fp32 as in `InputStats.group_gram`."""
    groups = weight.float().view(weight.shape[0], -1, GROUP)
    trace = group_gram.diagonal(dim1=1, dim2=2).sum(1)
    damping = DAMPING * trace.clamp_min(torch.finfo(torch.float32).tiny)
    gram = group_gram + damping[:, None, None] * torch.eye(GROUP, device=weight.device)
    lowest = torch.full(groups.shape[:2], torch.inf, device=weight.device)
    gone = torch.zeros(groups.shape[:2], dtype=torch.int8, device=weight.device)
    pairs = list(combinations(range(GROUP), GROUP - KEPT))
    columns = [groups[..., position].contiguous() for position in range(GROUP)]
    for index, pair in enumerate(pairs):
        (first, second), left = pair, [position for position in range(GROUP) if position not in pair]
        cross = gram[:, pair][:, :, left]
        schur = gram[:, pair][:, :, pair] - cross @ torch.linalg.solve(gram[:, left][:, :, left], cross.mT)
        loss = columns[first] * (schur[:, 0, 0] * columns[first] + 2 * schur[:, 0, 1] * columns[second])
        loss += schur[:, 1, 1] * columns[second].square()
        better = loss < lowest
        lowest = torch.where(better, loss, lowest)
        gone.masked_fill_(better, index)
    stays = [[position not in pair for position in range(GROUP)] for pair in pairs]
    kept = torch.tensor(stays, device=weight.device)
    return kept[gone.int()].view(weight.shape)
