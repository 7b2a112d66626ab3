"""Kept weights and masks that are solved for, against dense solvers in float64 and against every mask there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swiftprune.errors import CheckpointError
from swiftprune.methods import least_squares
from swiftprune.methods.admm import admm
from swiftprune.methods.least_squares import DAMPING, DRIFT_SHARE, NormalEquations, refine_weights
from swiftprune.methods.mask import Pattern, n_of_m
from swiftprune.methods.sparsegpt import sparsegpt


def problem(seed: int, n: int, k: int, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (N, K), correlated inputs (T, K) of unequal size, and what the dense model gives there (T, N)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator).add(0.1).pow(2)
    inputs = torch.randn(tokens, k, generator=generator) @ mix
    weight = torch.randn(n, k, generator=generator)
    dense = (inputs + 0.2 * inputs.std() * torch.randn(tokens, k, generator=generator)) @ weight.T
    return weight, inputs, dense


def objective(weight: Tensor, dense_weight: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
    """Per row: ||X v - y||^2 + DAMPING sum_k ||X_k||^2 (v_k - w_k)^2, what all of this minimises; in float64."""
    x = inputs.double()
    error = (x @ weight.double().T - target.double()).square().sum(0)
    return error + DAMPING * ((weight - dense_weight).double().square() * x.square().sum(0)).sum(1)


def best_values(weight: Tensor, mask: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
    """Row by row, the least-squares problem with its ridge as extra rows, by LAPACK in float64."""
    x, w = inputs.double(), weight.double()
    ridge = (DAMPING * x.square().sum(0)).sqrt()
    out = torch.zeros_like(w)
    for row in range(len(w)):
        kept = mask[row].nonzero().flatten()
        left = torch.cat((x[:, kept], torch.diag(ridge)[:, kept]))
        right = torch.cat((target[:, row].double(), ridge * torch.where(mask[row], w[row], 0)))
        out[row, kept] = torch.linalg.lstsq(left, right[:, None]).solution.flatten()
    return out


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5), groups=st.integers(1, 8), drifting=st.booleans())
def test_kept_weights_are_those_of_a_dense_solver(seed: int, n: int, groups: int, drifting: bool) -> None:
    weight, inputs, dense = problem(seed, n, 4 * groups)
    mask = n_of_m(torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)), 2, 4)
    drift = (dense - inputs @ weight.T).T @ inputs if drifting else None
    normal = NormalEquations.of(weight, inputs.T @ inputs, drift)
    got = normal.solve(mask, normal.start, iterations=4 * weight.shape[1]) / normal.scale
    own = inputs @ weight.T
    target = own + DRIFT_SHARE * (dense - own) if drifting else own
    want = best_values(weight, mask, inputs, target)
    assert not got[~mask].any()
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))


def test_a_few_steps_come_close() -> None:
    weight, inputs, _ = problem(1, 32, 128, tokens=1000)
    mask = n_of_m(weight.abs() * inputs.norm(dim=0), 2, 4)
    target = inputs @ weight.T
    got = refine_weights(weight, mask, inputs.T @ inputs, None)
    start = objective(torch.where(mask, weight, 0), weight, inputs, target).sum()
    lowest = objective(best_values(weight, mask, inputs, target).float(), weight, inputs, target).sum()
    assert objective(got, weight, inputs, target).sum() - lowest < 0.03 * (start - lowest)


def test_admm_comes_close_to_the_best_of_all_masks() -> None:
    """K = 8 has 36 masks a row, so the best is known."""
    pattern = Pattern.parse("2:4")
    pairs = list(itertools.combinations(range(4), 2))
    total = dict.fromkeys(("best", "admm", "wanda", "sparsegpt"), 0.0)
    for seed in range(20):
        weight, inputs, dense = problem(seed, 8, 8)
        own = inputs @ weight.T
        target = own + DRIFT_SHARE * (dense - own)
        gram, drift = inputs.T @ inputs, (dense - own).T @ inputs

        def cost(pruned: Tensor, w: Tensor = weight, x: Tensor = inputs, y: Tensor = target) -> Tensor:
            return objective(pruned, w, x, y)

        rows = []
        for first, second in itertools.product(pairs, pairs):
            mask = torch.zeros(8, dtype=torch.bool)
            mask[[*first, *(4 + position for position in second)]] = True
            rows.append(cost(best_values(weight, mask.expand(8, 8), inputs, target).float()))
        total["best"] += float(torch.stack(rows).min(0).values.sum())
        wanda = n_of_m(weight.abs() * inputs.norm(dim=0), 2, 4)
        total["wanda"] += float(cost(best_values(weight, wanda, inputs, target).float()).sum())
        total["sparsegpt"] += float(cost(sparsegpt(weight, gram, pattern)).sum())
        total["admm"] += float(cost(admm(weight, gram, drift, pattern)).sum())
    assert total["best"] <= total["admm"] < 1.1 * total["best"]
    assert total["admm"] < 0.95 * total["wanda"]
    assert total["admm"] < 0.8 * total["sparsegpt"]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5", "unstructured:0.5"])
def test_admm_meets_every_pattern(pattern: str) -> None:
    weight, inputs, _ = problem(3, 8, 160)
    inputs[:, 7] = 0  # a dead channel
    parsed = Pattern.parse(pattern)
    pruned = admm(weight, inputs.T @ inputs, None, parsed)
    assert torch.isfinite(pruned).all()
    keep = pruned != 0
    assert not keep[:, 7].any()
    if parsed.structured:
        counts = keep.view(8, -1, parsed.group).sum(-1)
        assert (counts <= parsed.kept).all()
        assert float(counts.float().mean()) > parsed.kept - 0.1
    else:
        assert abs(1 - float(keep.float().mean()) - 0.5) < 0.02


def test_a_linear_without_inputs_and_one_with_bad_ones() -> None:
    weight = torch.ones(3, 8)
    assert not admm(weight, torch.zeros(8, 8), None, Pattern.parse("2:4")).any()
    with pytest.raises(CheckpointError, match=r"down_proj: the Gram matrix of its inputs is not positive definite"):
        admm(
            weight,
            torch.ones(8, 8) - 2 * torch.eye(8) + 8 * torch.rand(8, 8).round(),
            None,
            Pattern.parse("2:4"),
            "down_proj",
        )


def test_drift_moves_targets_by_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole share, nothing pruned and no ridge, the solution is the regression on the dense outputs."""
    monkeypatch.setattr(least_squares, "DAMPING", 0.0)
    monkeypatch.setattr(least_squares, "DRIFT_SHARE", 1.0)
    weight, inputs, dense = problem(4, 6, 12)
    normal = NormalEquations.of(weight, inputs.T @ inputs, (dense - inputs @ weight.T).T @ inputs)
    got = normal.solve(torch.ones(6, 12, dtype=torch.bool), normal.start, iterations=100) / normal.scale
    want = torch.linalg.lstsq(inputs.double(), dense.double()).solution.T
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)
