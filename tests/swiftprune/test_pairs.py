"""Masks by pairs against trying out all six pairs and solving for what the others could make up."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swiftprune.methods.pairs import DAMPING, keep_pairs


def losses(weight: Tensor, gram: Tensor) -> dict[tuple[int, int], float]:
    """By pair that goes: the lowest error of the output that the other two weights of four can reach, in float64."""
    damped = gram.double() + DAMPING * gram.double().trace() * torch.eye(4, dtype=torch.float64)
    root = torch.linalg.cholesky(damped).T  # so that ||root v||^2 is v^T G v
    out = {}
    for pair in itertools.combinations(range(4), 2):
        left = [position for position in range(4) if position not in pair]
        gone = root[:, pair] @ weight[list(pair)].double()
        made_up = root[:, left] @ torch.linalg.lstsq(root[:, left], gone[:, None]).solution.flatten()
        out[pair] = float((gone - made_up).square().sum())
    return out


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 6), groups=st.integers(1, 6))
def test_the_cheapest_pair_goes(seed: int, n: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, 4 * groups, generator=generator)
    inputs = torch.randn(50, groups, 4, generator=generator) @ torch.randn(groups, 4, 4, generator=generator)[:1]
    gram = torch.einsum("tgi,tgj->gij", inputs, inputs)
    keep = keep_pairs(weight, gram)
    assert (keep.view(n, groups, 4).sum(-1) == 2).all()
    for row in range(n):
        for group in range(groups):
            cost = losses(weight[row, 4 * group : 4 * group + 4], gram[group])
            gone = tuple((~keep[row, 4 * group : 4 * group + 4]).nonzero().flatten().tolist())
            assert cost[gone] <= min(cost.values()) * 1.001 + 1e-6


def test_of_two_inputs_that_are_the_same_one_is_enough() -> None:
    """Wanda would keep the two large weights; but their inputs are one, so what one loses the other can make up for."""
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    inputs = x[:, [0, 0, 1, 2]]
    keep = keep_pairs(torch.tensor([[3.0, 2.9, 1.0, 0.5]]), (inputs.T @ inputs)[None])
    assert keep.tolist() == [[True, False, True, False]] or keep.tolist() == [[False, True, True, False]]


def test_inputs_that_never_were_active() -> None:
    assert keep_pairs(torch.ones(2, 4), torch.zeros(1, 4, 4)).sum() == 4
