"""Ratios of paired rounds, and how sure one may be of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

CONFIDENCE = 0.95
LEAST_CONFIDENCE = 0.8
"""What any interval that is asked for has at least; those of fewer rounds say what they have."""
_RESAMPLES = 4000


class Interval(BaseModel):
    """An estimate between two bounds that enclose the truth in a share `confidence` of experiments.

    With so few rounds that even their range falls short of CONFIDENCE it says what the range gives; of one, nothing.
    """

    value: float
    low: float
    high: float
    confidence: float

    def __format__(self, spec: str) -> str:
        """With the spec of a float: `1.71 (1.55-2.14)`, of few rounds `1.71 (1.55-2.14, 75% sure)`.

        An `x` after the spec stands behind the estimate: `1.71x (1.55-2.14)`.
        """
        times, spec = ("x", spec[:-1]) if spec.endswith("x") else ("", spec)
        value = f"{self.value:{spec}}{times}"
        if not self.confidence:
            return f"{value} (one round)"
        sure = f", {self.confidence:.0%} sure" if self.confidence < LEAST_CONFIDENCE else ""
        return f"{value} ({self.low:{spec}}-{self.high:{spec}}{sure})"


class Shift:
    """How two samples of speedups differ: the slowdown from `old` to `new`, less 1; above 0 is slower.

    The estimate is Hodges and Lehmann's, the median of all quotients of an old and a new value. Tests and bounds are
    those of Mann and Whitney, one-sided and exact for samples whose distributions differ only by a factor, whatever the
    distribution; a tie counts against what is to be shown. A bound at some error is on the same side of a limit as the
    test at that error says, since both ask how many of the quotients are beyond.
    """

    def __init__(self, old: Sequence[float], new: Sequence[float]) -> None:
        log_old, log_new = np.log(np.asarray(old, dtype=float)), np.log(np.asarray(new, dtype=float))
        self._quotients = np.sort((log_old[:, None] - log_new[None, :]).ravel())
        self._chance = _chance_of_fewer(len(log_old), len(log_new))
        self.slowdown = math.expm1(float(np.median(self._quotients)))

    def p_within(self, limit: float) -> float:
        """The probability of data as good as these if the true slowdown were `limit` or more."""
        return float(self._chance[np.count_nonzero(self._quotients >= math.log1p(limit))])

    def p_beyond(self, limit: float) -> float:
        """The probability of data as bad as these if the true slowdown were `limit` or less."""
        return float(self._chance[np.count_nonzero(self._quotients <= math.log1p(limit))])

    def high(self, error: float) -> float:
        """The slowdown is less than this, but for `error`; infinite when so few values show nothing."""
        count = int(np.count_nonzero(self._chance < error))
        return math.expm1(float(self._quotients[-count])) if count else math.inf

    def low(self, error: float) -> float:
        """The slowdown is more than this, but for `error`; -1 when so few values show nothing."""
        count = int(np.count_nonzero(self._chance < error))
        return math.expm1(float(self._quotients[count - 1])) if count else -1.0


def _chance_of_fewer(m: int, n: int) -> np.ndarray:
    """For k = 0 to m n, the probability that k or fewer of the m n quotients of two like samples are above 1.

    That of Mann and Whitney's U: the number of ways is the coefficient of q^k in the Gaussian binomial (m + n over n).
    """
    ways = np.zeros(m * n + 1)
    ways[0] = 1
    for factor in range(1, n + 1):
        # Times (1 - q^(m + factor)), then divided by (1 - q^factor): both shift and add.
        shifted = ways.copy()
        shifted[m + factor :] -= ways[: len(ways) - m - factor]
        for start in range(factor):
            shifted[start::factor] = np.cumsum(shifted[start::factor])
        ways = shifted * (factor / (m + factor))  # so that numbers stay of a size: in the end they sum up to 1
    return np.minimum(np.cumsum(ways), 1.0)


def ratios(dense: Sequence[float], sparse: Sequence[float], *, lower_is_better: bool) -> list[float]:
    """How many times better sparse was, pair by pair."""
    pairs = zip(dense, sparse, strict=True)
    return [d / s if lower_is_better else s / d for d, s in pairs]


def ratio_interval(values: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """The median of `values` with its percentile bootstrap interval, which with few rounds spans nearly all of them.

    The range of n values encloses the median with a probability of 1 - 2^(1-n). Where that is less than `confidence`
    the interval is the range, and its `confidence` that.
    """
    samples = np.asarray(values, dtype=float)
    middle = statistics.median(values)
    if (sure := 1 - 0.5 ** (len(samples) - 1)) < confidence:
        return Interval(value=middle, low=min(values), high=max(values), confidence=sure)
    picks = np.random.default_rng(seed).integers(0, len(samples), (_RESAMPLES, len(samples)))
    medians = np.median(samples[picks], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Interval(value=middle, low=float(low), high=float(high), confidence=confidence)


def least_p(old: int, new: int) -> float:
    """The smallest p that a one-sided Mann-Whitney test of so many values against so many can give."""
    return 1 / math.comb(old + new, new)


def quantile(values: Sequence[float], share: float) -> float:
    """What a share of `values` stays below, interpolated."""
    return float(np.quantile(values, share))


def spread(values: Sequence[float]) -> float:
    """Half of the interquartile range over the median."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float((high - low) / 2 / middle)
