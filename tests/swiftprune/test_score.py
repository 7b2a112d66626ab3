"""Each score against its published formula, computed naively in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.methods.scores import DAMPING, METHODS, find_method
from swiftprune.methods.statistics import InputStats

N, K, TOKENS, GROUP = 24, 64, 50, 4


def magnitude(w: Tensor, x: Tensor, n: int, k: int) -> float:
    return float(w[n, k].abs())


def wanda(w: Tensor, x: Tensor, n: int, k: int) -> float:
    return float(w[n, k].abs() * x[:, k].norm())


def ria(w: Tensor, x: Tensor, n: int, k: int) -> float:
    relative = w[n, k].abs() / w[n].abs().sum() + w[n, k].abs() / w[:, k].abs().sum()
    return float(relative * x[:, k].norm() ** 0.5)


def numerator(w: Tensor, x: Tensor, n: int, k: int) -> float:
    return float(w[n, k] ** 2 / 2 * (1 - x[:, k].square().sum() / x.square().sum()))


def inverse_hessian_diagonal(energy: Tensor, total: Tensor, k: int) -> float:
    """[H^-1]_kk by inverting H = x x^T + lambda I outright, x = sqrt(energy) of the channels that `total` sums."""
    lam = DAMPING * total
    x = energy.sqrt()
    return float(torch.linalg.inv(torch.outer(x, x) + lam * torch.eye(len(x), dtype=x.dtype))[k, k])


def obs(w: Tensor, x: Tensor, n: int, k: int) -> float:
    energy = x.square().sum(0)
    return float(w[n, k] ** 2 / 2 / inverse_hessian_diagonal(energy, energy.sum(), k) / energy.sum())


def obs_group(w: Tensor, x: Tensor, n: int, k: int) -> float:
    first = k // GROUP * GROUP
    energy = x[:, first : first + GROUP].square().sum(0)
    return float(w[n, k] ** 2 / 2 / inverse_hessian_diagonal(energy, energy.sum(), k - first) / energy.sum())


def share(w: Tensor, x: Tensor, n: int, k: int) -> float:
    first = k // GROUP * GROUP
    energy = x[:, first : first + GROUP].square().sum(0)
    return float(w[n, k] ** 2 * (energy[k - first] / energy.sum()) ** 0.5)


def data_free(w: Tensor, x: Tensor, n: int, k: int) -> float:
    return float(w[n, k] ** 2 / 2 * (1 - w[n, k] ** 2 / w[n].square().sum()))


FORMULAS: dict[str, Callable[[Tensor, Tensor, int, int], float]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "ria": ria,
    "swiftprune-numerator": numerator,
    "swiftprune-obs": obs,
    "swiftprune-group": obs_group,
    "swiftprune": share,
    "swiftprune-data-free": data_free,
}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.factors])
def test_score_orders_every_group_as_its_formula_does(name: str) -> None:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(N, K, generator=generator)
    # Channels of very different energy, one dominant: the forms must differ where it matters.
    inputs = torch.randn(TOKENS, K, generator=generator) * torch.rand(K, generator=generator) ** 3
    inputs[:, 9] *= 30
    weight[3, 8:12] = torch.tensor([0.2, 7.0, 0.1, 0.3])

    factors = METHODS[name].factors
    assert factors is not None
    scores = factors(weight, InputStats(TOKENS, input_sq_sum=inputs.square().sum(0)), GROUP).scores(weight)
    w, x = weight.double(), inputs.double()
    expected = torch.tensor([[FORMULAS[name](w, x, n, k) for k in range(K)] for n in range(N)])
    assert torch.equal(scores.view(N, -1, GROUP).argsort(-1), expected.view(N, -1, GROUP).argsort(-1))


def test_the_forms_are_not_all_one() -> None:
    """Guards the test above: with these inputs each form but the data-free one differs from magnitude."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(200, K, generator=generator)
    energy = torch.rand(K, generator=generator) ** 6
    energy[9] = 5
    stats = InputStats(TOKENS, input_sq_sum=energy)
    orders = {
        name: method.factors(weight, stats, GROUP).scores(weight).view(200, -1, GROUP).argsort(-1)
        for name, method in METHODS.items()
        if method.factors
    }
    same = {name for name, order in orders.items() if torch.equal(order, orders["magnitude"])}
    assert same == {"magnitude", "swiftprune-data-free"}


def test_a_channel_that_is_never_active_costs_nothing() -> None:
    energy = torch.ones(8)
    energy[2] = 0
    for name in ("wanda", "ria", "swiftprune"):
        factors = METHODS[name].factors
        assert factors is not None
        scores = factors(torch.ones(3, 8), InputStats(1, input_sq_sum=energy), GROUP).scores(torch.ones(3, 8))
        assert torch.isfinite(scores).all()
        assert (scores[:, 2] == 0).all()


def test_all_inputs_zero_is_not_a_division_by_zero() -> None:
    for method in METHODS.values():
        if method.factors:
            stats = InputStats(1, input_sq_sum=torch.zeros(8))
            assert torch.isfinite(method.factors(torch.zeros(3, 8), stats, GROUP).scores(torch.zeros(3, 8))).all()


def test_an_unknown_method_is_answered_with_the_list() -> None:
    with pytest.raises(SettingsError, match=r"(?s)unknown method 'wnada'.*wanda.*sparsegpt"):
        find_method("wnada")
