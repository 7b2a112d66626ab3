"""Selection against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swiftprune.errors import SettingsError
from swiftprune.methods.mask import Pattern, ewma, n_of_m, select


@given(st.data())
def test_n_of_m_is_a_stable_sort_of_each_group(data: st.DataObject) -> None:
    group = data.draw(st.integers(2, 9))
    kept = data.draw(st.integers(1, group - 1))
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, 4), min_size=group, max_size=group)  # few values: many ties
    scores = [[data.draw(numbers) for _ in range(groups)] for _ in range(rows)]
    expected = [
        [k in sorted(range(group), key=lambda i: (-four[i], i))[:kept] for four in row for k in range(group)]
        for row in scores
    ]
    got = n_of_m(torch.tensor(scores).float().view(rows, -1), kept, group)
    assert got.tolist() == expected


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("skew", [1, 4])
def test_ewma_meets_its_target_on_skewed_scores(sparsity: float, skew: int) -> None:
    score = torch.randn(200, 333, generator=torch.Generator().manual_seed(3)).abs() ** skew
    keep = ewma(score, sparsity)
    assert keep.dtype == torch.bool
    assert abs(1 - float(keep.float().mean()) - sparsity) < 0.005


def test_ewma_by_hand() -> None:
    """One row, all numbers worked out with the recurrence: m0 = 4, d0 = 2; a = 1/8, b = 1/4."""
    # L       8      0        4       4
    # m       4      4.5      3.9375  3.9453   (before each)
    # d       2      2.5      3       2.2656
    # (L-m)/d 2     -1.8      0.0208  0.0241
    keep = ewma(torch.tensor([[8.0, 0.0, 4.0, 4.0]]), 0.5)
    assert keep.tolist() == [[True, False, False, True]]


def test_ewma_prefers_weights_that_stand_out_locally() -> None:
    """The same score is kept on a low stretch and pruned on a high one: the threshold follows the row."""
    score = torch.cat((torch.full((1, 64), 1.0), torch.full((1, 64), 10.0)), dim=1)
    score[0, 32] = score[0, 96] = 5.0
    keep = ewma(score, 0.3)
    assert keep[0, 32]
    assert not keep[0, 96]


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:5"])
def test_patterns_parse(text: str) -> None:
    pattern = Pattern.parse(text)
    assert f"{pattern.kept}:{pattern.group}" == text
    keep = select(torch.rand(6, 40), pattern)
    assert keep.view(6, -1, pattern.group).sum(-1).eq(pattern.kept).all()


@pytest.mark.parametrize(
    "text", ["4:2", "0:4", "2:2", "2/4", "unstructured", "unstructured:1.5", "unstructured:1", "", "2:64"]
)
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--format"):
        Pattern.parse(text)
