"""Ratios of paired rounds, and how sure one may be of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

CONFIDENCE = 0.95
_RESAMPLES = 4000


class Interval(BaseModel):
    """An estimate between two bounds that enclose the truth in a share `confidence` of experiments."""

    value: float
    low: float
    high: float
    confidence: float

    def __format__(self, spec: str) -> str:
        """With the spec of a float: `1.71 (1.55-2.14)`."""
        return f"{self.value:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


class Shift(BaseModel):
    """How two samples of ratios differ: `new` over `old`, less 1; above 0 is slower.

    `p_within` is the probability of data as good as these if the true slowdown were the limit or more, and `p_beyond`
    of data as bad as these if it were the limit or less. Both are exact for samples without ties whose distributions
    differ only by a factor (one-sided Mann-Whitney tests), whatever the distribution.
    """

    slowdown: float
    low: float
    high: float
    confidence: float
    p_within: float
    p_beyond: float


def ratios(dense: Sequence[float], sparse: Sequence[float], *, lower_is_better: bool) -> list[float]:
    """How many times better sparse was, pair by pair."""
    pairs = zip(dense, sparse, strict=True)
    return [d / s if lower_is_better else s / d for d, s in pairs]


def ratio_interval(values: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """The median of `values` with its percentile bootstrap interval; of one value, the value itself.

    The percentile interval of a median is about the one of the sign test: with few rounds it spans nearly all of them.
    """
    samples = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(samples), (_RESAMPLES, len(samples)))
    medians = np.median(samples[picks], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Interval(value=statistics.median(values), low=float(low), high=float(high), confidence=confidence)


def shift(old: Sequence[float], new: Sequence[float], limit: float, confidence: float = CONFIDENCE) -> Shift:
    """Whether speedups fell from `old` to `new` by more than the factor 1 + `limit`.

    The estimate is Hodges and Lehmann's, the median of all quotients of an old and a new value; its interval is the one
    that the Mann-Whitney test would not reject.
    """
    from scipy.stats import mannwhitneyu  # takes a second

    log_old, log_new = np.log(np.asarray(old, dtype=float)), np.log(np.asarray(new, dtype=float))
    quotients = np.sort((log_old[:, None] - log_new[None, :]).ravel())
    threshold = math.log1p(limit)
    return Shift(
        slowdown=math.expm1(float(np.median(quotients))),
        **dict(zip(("low", "high"), _walsh_bounds(quotients, len(old), len(new), confidence), strict=True)),
        confidence=confidence,
        p_within=float(mannwhitneyu(log_new, log_old - threshold, alternative="greater").pvalue),
        p_beyond=float(mannwhitneyu(log_new, log_old - threshold, alternative="less").pvalue),
    )


def _walsh_bounds(quotients: np.ndarray, m: int, n: int, confidence: float) -> tuple[float, float]:
    """Slowdowns at the ends of the interval: the k-th quotient from either end, k by the normal approximation of U."""
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    k = math.floor(m * n / 2 - z * math.sqrt(m * n * (m + n + 1) / 12))
    k = min(max(k, 0), len(quotients) - 1)
    return math.expm1(float(quotients[k])), math.expm1(float(quotients[-1 - k]))


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
