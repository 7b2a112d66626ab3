"""From scores to a keep_mask: N of M, or unstructured by EWMA. Nothing here sorts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.kernels import dispatch
from swiftprune.kernels.score_factors import EwmaGains

# Gains of RFC 6298 (TCP round-trip estimation): alpha for the mean, beta for the deviation.
EWMA_MEAN_GAIN = 1 / 8
EWMA_DEVIATION_GAIN = 1 / 4


@dataclass(frozen=True)
class Pattern:
    """What stays: `kept` of every `group` consecutive inputs, or, unstructured, all but `sparsity` of a weight."""

    name: str
    kept: int = 0
    group: int = 1
    sparsity: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads `N:M` (N kept of M) or `unstructured:SPARSITY`. Raises SettingsError."""
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            kept, group = int(match[1]), int(match[2])
            if not 0 < kept < group <= 32:
                raise SettingsError(f"--format {text}: N:M keeps N of M weights, with 0 < N < M <= 32")
            return cls(text, kept, group, 1 - kept / group)
        if match := re.fullmatch(r"unstructured:(0?\.\d+|0)", text):
            return cls(text, sparsity=float(match[1]))
        raise SettingsError(f"--format {text!r}: give N:M (2:4, 4:8, 1:4, ...) or unstructured:SPARSITY (0.5)")

    @property
    def structured(self) -> bool:
        return self.kept > 0


def select(score: Tensor, pattern: Pattern) -> Tensor:
    """The bool (N, K) keep_mask (True = kept) of the fp32 `score` (N, K) under `pattern`."""
    if pattern.structured:
        return n_of_m(score, pattern.kept, pattern.group)
    return ewma(score, pattern.sparsity)


def n_of_m(score: Tensor, kept: int, group: int) -> Tensor:
    """Keeps the `kept` highest of every `group` scores; of equal scores the lower position wins.

    A weight stays when it beats at least `group - kept` of the others: a comparison network, group^2 compares a group.
    """
    groups = score.reshape(score.shape[0], -1, group)
    position = torch.arange(group, device=score.device)
    wins = torch.zeros(groups.shape, dtype=torch.int8, device=score.device)
    for other in range(group):
        rival = groups[..., other, None]
        wins += (groups > rival) | ((groups == rival) & (position < other))
    return (wins >= group - kept).view(score.shape)


def first_violation(rows: Tensor, kept: int, group: int) -> tuple[int, int, int] | None:
    """(row, group, non-zeros) of the first group of `group` in `rows` (N, K) with more than `kept` non-zeros."""
    count = (rows != 0).view(rows.shape[0], -1, group).sum(dim=-1, dtype=torch.uint8)
    over = count > kept
    if not over.any():
        return None
    row, index = over.nonzero()[0].tolist()
    return row, index, int(count[row, index])


def violation(rows: Tensor, pattern: Pattern) -> str | None:
    """How `rows` (N, K), a weight or a keep_mask, has more non-zeros than `pattern` allows, or None."""
    if not pattern.structured:
        zeros = rows.numel() - int(torch.count_nonzero(rows))
        if zeros >= int(pattern.sparsity * rows.numel()):
            return None
        return f"{zeros / rows.numel():.1%} of it is zero"
    if (found := first_violation(rows, pattern.kept, pattern.group)) is None:
        return None
    row, group, count = found
    return f"row {row}, group {group} has {count} non-zeros"


def ewma(score: Tensor, sparsity: float) -> Tensor:
    """Prunes scores below a running threshold m + k d, in the form of RFC 6298 (TCP's round-trip estimator).

    Along each row, with L the score:  prune if L < m + k d;  d <- (1-b) d + b |L - m|;  m <- (1-a) m + a L.
    m starts from the row's mean and d from half of it. Neither depends on what was pruned, so (L - m) / d is known for
    every weight before k is, and k is where `sparsity` of these fall below: found by counting. O(n), no sort, no top-k.
    """
    mean = score.mean(1)
    floor = float(mean.mean()) * 1e-3 + torch.finfo(torch.float32).tiny
    kernels = dispatch.kernels(score.device)
    ewma_zscore = kernels.ewma_zscore(score, mean, mean / 2, EwmaGains(EWMA_MEAN_GAIN, EWMA_DEVIATION_GAIN, floor))
    return ewma_zscore >= kernels.kth_value(ewma_zscore, int(sparsity * ewma_zscore.numel()))
