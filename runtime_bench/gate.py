"""Did the last change make it worse? `swiftprune-bench gate`, for continuous integration.

What is compared is the speedup of the sparse side over the dense one, of the same machine, engine and workload: the
dense side, measured in the same rounds, takes out what the machine was like on the day. For each case and metric the
rounds of both files give one of three verdicts, by one-sided Mann-Whitney tests at the error rate 1 - `confidence`:

- `pass`: a slowdown of the limit or more can be ruled out. A true slowdown beyond the limit is passed at most at the
  error rate, whatever the distribution of the noise, provided it is the same in both files.
- `regression`: a slowdown of the limit or less can be ruled out, at the error rate over all comparisons together
  (Hochberg, Biometrika 1988: of n that are slower, the least certain one is held to the error rate itself, the most
  certain one to an n-th of it).
- `unclear`: the rounds allow both. More rounds, or a quieter machine, decide it.

What is printed is what was tested: `at most` is the bound that a pass has below the limit, and `at least` the one that
a regression has above it.

All must pass for exit code 0. Any regression is exit code 1. Otherwise it is 2: unclear, void, or nothing to compare.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runtime_bench.engines import UNITS
from runtime_bench.layers import LayersResult
from runtime_bench.results import RunResult
from runtime_bench.statistics import CONFIDENCE, Shift, least_p
from swiftprune.errors import SettingsError

Verdict = Literal["pass", "regression", "unclear", "void", "missing"]
MIN_ROUNDS = 10
"""What is advised, and the default of `run`: with fewer, noise that machines have decides too often."""
_HOPELESS = 20  # times as many rounds
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "regression": 1, "unclear": 2, "void": 2, "missing": 2}


@dataclass(frozen=True)
class Comparison:
    """One case and metric of the new result."""

    what: str
    verdict: Verdict
    detail: str
    slowdown: float | None = None
    at_least: float = -1.0
    """One-sided, at the error rate that this comparison is held to among all."""
    at_most: float = math.inf
    """One-sided, at the error rate."""


@dataclass(frozen=True)
class Series:
    """The speedups of all rounds of one case and metric, or why there are none."""

    speedups: list[float]
    void: str | None = None


def judge(
    new: Any,
    baselines: Sequence[Any],
    *,
    max_regression: float = 0.05,
    confidence: float = CONFIDENCE,
    metrics: Sequence[str] = (),
) -> list[Comparison]:
    """Compares `new` with those of `baselines` that are like it; their rounds are taken together.

    `max_regression` is the limit, 0.05 say: the sparse side may become 5% slower against the dense one. `metrics` are
    the names of those to judge; by default the one that tells most of decoding, since others, as `ttft`, vary more.
    """
    if not 0.5 <= confidence < 1:
        raise SettingsError(f"--confidence {confidence:.0%}: verdicts of less than even odds say nothing; 95% is usual")
    if unknown := [name for name in metrics if name not in UNITS]:
        raise SettingsError(f"--metric {unknown[0]}: no such metric; there are: {', '.join(UNITS)}")
    fresh = dict(_series(new, metrics))
    if not fresh:
        return [
            Comparison(new.kind, "missing", f"nothing to judge in it{': no ' if metrics else ''}{', '.join(metrics)}")
        ]
    alike = [base for base in baselines if _setting(base) == _setting(new)]
    if not alike:
        return [Comparison("machine and engine", "missing", _unlike(new, baselines))]
    known: dict[str, list[float]] = {}
    for base in alike:
        for what, series in _series(base, metrics):
            known.setdefault(what, []).extend(series.speedups)
    rows: dict[str, Comparison | Shift] = {
        what: _compared(series, known.get(what, []), what, 1 - confidence) for what, series in fresh.items()
    }
    for what in sorted(known.keys() - fresh.keys()):
        if known[what] and what.partition(", ")[2] not in fresh:  # void cases are in these under their label alone
            rows[what] = Comparison(what, "missing", "the baseline has it, the new result does not")
    shifts = {what: row for what, row in rows.items() if isinstance(row, Shift)}
    shares = _shares({what: found.p_beyond(max_regression) for what, found in shifts.items()}, 1 - confidence)
    return [
        _judged(what, row, max_regression, 1 - confidence, shares[what]) if isinstance(row, Shift) else row
        for what, row in rows.items()
    ]


def exit_code(comparisons: Sequence[Comparison]) -> int:
    """1 if any regressed, else 2 if any is not a pass, else 0."""
    codes = {EXIT_CODES[comparison.verdict] for comparison in comparisons}
    return 1 if 1 in codes else max(codes, default=2)


def _compared(new: Series, old: list[float], what: str, error: float) -> Comparison | Shift:
    """How the two differ, or why that cannot be said."""
    if new.void:
        return Comparison(what, "void", new.void)
    if not old:
        return Comparison(what, "missing", "the baseline has no such case, or it is void there")
    count = len(new.speedups)
    if least_p(len(old), count) >= error:
        enough = next(rounds for rounds in itertools.count(count) if least_p(max(len(old), rounds), rounds) < error)
        return Comparison(
            what,
            "unclear",
            f"{count} rounds against {len(old)} are too few for any verdict; take {max(enough, MIN_ROUNDS)} or more",
        )
    return Shift(old, new.speedups)


def _shares(p: dict[str, float], error: float) -> dict[str, float]:
    """The error rate that each comparison is held to, by Hochberg's procedure over all values of p.

    From the largest p on, the k-th is held to error / k. The first one that is below that takes all smaller ones along.
    """
    shares: dict[str, float] = {}
    reached: float | None = None
    for rank, what in enumerate(sorted(p, key=p.__getitem__, reverse=True), start=1):
        share = reached or error / rank
        if p[what] < share:
            reached = share
        shares[what] = share
    return shares


def _judged(what: str, found: Shift, limit: float, error: float, share: float) -> Comparison:
    at_least, at_most = found.low(share), found.high(error)
    if at_least > limit:
        verdict: Verdict = "regression"
        detail = f"slower by more than {limit:.1%} (p = {found.p_beyond(limit):.2g})"
    elif at_most < limit:
        verdict = "pass"
        detail = f"not slower by {limit:.1%} (p = {found.p_within(limit):.2g})"
    else:
        verdict, detail = "unclear", _advice(found.slowdown, at_least, at_most, limit)
    return Comparison(what, verdict, detail, found.slowdown, at_least, at_most)


def _advice(slowdown: float, at_least: float, at_most: float, limit: float) -> str:
    """How many rounds would do, if the noise stays: an interval shrinks with the root of their number."""
    distance = abs(limit - slowdown)
    half = max(slowdown - at_least, at_most - slowdown)
    if not math.isfinite(half) or at_least <= -1:
        return f"too few rounds to tell; take {MIN_ROUNDS} or more"
    if distance < limit / 10:
        return f"right at the limit of {limit:.1%}; take many more rounds, or another limit"
    times = max((half / distance) ** 2, 1.5)
    if times > _HOPELESS:
        return f"much too noisy to tell, so this machine was busy; about {times:,.0f} times as many rounds would do"
    return f"too noisy to tell; about {times:.1f} times as many rounds would do"


def _setting(result: Any) -> tuple[str, ...]:
    """What two results must share to be compared at all."""
    if isinstance(result, RunResult):
        return (
            "run",
            result.machine.key,
            result.engine,
            result.model,
            result.dtype,
            str(result.threads),
            result.dense_linears,
        )
    return (result.kind, result.machine.key)


def _unlike(new: Any, baselines: Sequence[Any]) -> str:
    """Why no baseline is like `new`."""
    if not baselines:
        return "no baseline was given"
    differences = [
        ", ".join(
            f"{theirs} (here: {ours})"
            for ours, theirs in zip(_setting(new), _setting(base), strict=False)
            if ours != theirs
        )
        for base in baselines
    ]
    return "no baseline is comparable: " + "; ".join(f"one is of {difference}" for difference in differences)


def _series(result: Any, metrics: Sequence[str]) -> Iterator[tuple[str, Series]]:
    """Of everything in `result` that can be judged, by what it is."""
    if isinstance(result, RunResult):
        for case in result.cases:
            wrong = result.check is not None and not result.check.passed
            if void := case.void or ("its answers were wrong" if wrong else None):
                yield case.label, Series([], void)
                continue
            named = [case.metric(name) for name in metrics] if metrics else [case.decoding]
            for metric in named:
                if metric:
                    yield f"{metric.name}, {case.label}", Series(metric.speedups)
    if isinstance(result, LayersResult):
        for cell in result.cells:
            yield cell.label, Series(cell.speedups)
    # Results of kind `gpu` are not judged: nothing has been measured yet to learn their noise from.


def markdown(comparisons: Sequence[Comparison]) -> str:
    lines = ["| what | verdict | slowdown | at least | at most | why |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in comparisons:
        change = f"{row.slowdown:+.1%}" if row.slowdown is not None else ""
        at_least = f"{row.at_least:+.1%}" if row.at_least > -1 else ""
        at_most = f"{row.at_most:+.1%}" if math.isfinite(row.at_most) else ""
        lines.append(f"| {row.what} | {row.verdict} | {change} | {at_least} | {at_most} | {row.detail} |")
    return "\n".join(lines)
