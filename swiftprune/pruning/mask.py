"""From scores to a keep_mask: N of M, or unstructured by EWMA. Nothing here sorts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftprune.errors import SettingsError

# Gains of RFC 6298 (TCP round-trip estimation): alpha for the mean, beta for the deviation.
EWMA_MEAN_GAIN = 1 / 8
EWMA_DEVIATION_GAIN = 1 / 4
_HISTOGRAM_BINS = 1 << 16


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


def ewma(score: Tensor, sparsity: float) -> Tensor:
    """Prunes scores below a running threshold m + k d, in the form of RFC 6298 (TCP's round-trip estimator).

    Along each row, with L the score:  prune if L < m + k d;  d <- (1-b) d + b |L - m|;  m <- (1-a) m + a L,
    starting from the row's mean and mean deviation. m and d do not depend on what was pruned, so (L - m) / d is known
    for every weight before k is, and k is read off its histogram where `sparsity` is met. O(n), no sort, no top-k.
    """
    rows, columns = score.shape
    mean = score.mean(1)
    deviation = (score - mean[:, None]).abs().mean(1)
    floor = deviation.mean() * 1e-3 + torch.finfo(torch.float32).tiny
    surprise = torch.empty(columns, rows)
    for k, now in enumerate(score.T.contiguous()):
        surprise[k] = (now - mean) / (deviation + floor)
        deviation = torch.lerp(deviation, (now - mean).abs(), EWMA_DEVIATION_GAIN)
        mean = torch.lerp(mean, now, EWMA_MEAN_GAIN)
    return (surprise >= _histogram_quantile(surprise, sparsity)).T.contiguous()


def _histogram_quantile(values: Tensor, fraction: float) -> float:
    """The value with about `fraction` of `values` below it, by two rounds of counting in equal bins."""
    low, high = float(values.min()), float(values.max())
    remaining = fraction * values.numel()
    edge = low
    for _ in range(2):
        if high <= low:
            break
        counts = torch.histc(values, _HISTOGRAM_BINS, low, high)
        below = counts.double().cumsum(0)
        bin_index = int((below <= remaining).sum().clamp(max=_HISTOGRAM_BINS - 1))
        remaining -= float(below[bin_index - 1]) if bin_index else 0.0
        width = (high - low) / _HISTOGRAM_BINS
        edge = low + bin_index * width
        inside = values[(values >= edge) & (values < edge + width)]
        if inside.numel() == 0:
            break
        values, low, high = inside, edge, edge + width
    return edge
