"""What results look like to people: one page that needs no network, a table for pull requests, a picture.

jinja2, plotly and matplotlib come with the extra `report` and are imported when they are needed. Names, reasons and
commands in results are anybody's text, so each is escaped for the place where it is shown.
"""

from __future__ import annotations

import base64
import hashlib
import html as html_text
import importlib
import json
import math
import statistics
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime_bench import layers, rivals
from runtime_bench.layers import BYTE_BOUND, LayersResult
from runtime_bench.results import SIDES, Case, Check, Metric, RunResult
from runtime_bench.rivals import Contestant, RivalsResult
from runtime_bench.statistics import Interval, quantile, ratio_interval, ratios, spread
from runtime_bench.stored import in_table
from swiftprune.errors import SettingsError

if TYPE_CHECKING:
    from runtime_bench.gpu import GpuResult
    from runtime_bench.trade_off import Row, TradeOff

TEMPLATES = Path(__file__).parent / "templates"
TABLE_METRICS = ("tpot", "ttft", "latency", "tokens_per_s")
METRIC_NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl_p50": "inter-token latency, median",
    "itl_p95": "inter-token latency, p95",
    "itl_p99": "inter-token latency, p99",
    "tokens_per_s": "tokens per second",
    "latency": "time of the whole request",
    "load": "time to load",
    "peak_memory": "peak memory",
    "disk": "size on disk",
}
SHORT_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "tokens_per_s": "tokens/s"}
KIND_NAMES = {"layers": "linear layers", "gpu": "GPU kernels", "trade-off": "quality over time", "rivals": "rivals"}
SIDE_COLOURS: dict[Literal["dense", "sparse"], str] = {"dense": "#7d8590", "sparse": "#2178c9"}
LINE_COLOURS = (SIDE_COLOURS["sparse"], "#cf5a1d", "#15906c", "#9159cf", "#c8417b", "#857b10", "#108a9c", "#a0674b")
"""Their contrast is at least 3 to the backgrounds of both themes, so figures need no second set."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "star")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_ECDF_STEPS = 200
_NOT_RECORDED = "the state of the machine was not recorded"
_FACTS: tuple[Callable[[Any], str], ...] = (
    lambda result: getattr(result, "dtype", ""),
    lambda result: f"{result.machine.threads} threads",
    lambda result: f"dense by {getattr(result, 'dense_linears', '')}",
    lambda result: result.machine.key,
    lambda result: result.machine.revision,
    lambda result: result.machine.date,
)
"""What may tell results of one model and engine apart."""


@dataclass(frozen=True)
class Headline:
    """What a run comes down to: one metric of one case and its speedup, or else why there is none."""

    case: Case | None = None
    metric: Metric | None = None
    speedup: Interval | None = None
    void: str | None = None


@dataclass(frozen=True)
class View:
    """A result as it is shown."""

    result: Any
    label: str
    source: str

    @property
    def headline(self) -> Headline:
        return headline(self.result)

    @property
    def layers_headline(self) -> tuple[list[layers.Cell], Interval]:
        """The cells of the fewest tokens on the most threads; the median of their speedups, and their whole range."""
        result: LayersResult = self.result
        chosen = min((cell.tokens, -cell.threads, cell.dtype) for cell in result.cells)
        cells = [cell for cell in result.cells if (cell.tokens, -cell.threads, cell.dtype) == chosen]
        speedups = [cell.speedup for cell in cells]
        return cells, Interval(value=statistics.median(speedups), low=min(speedups), high=max(speedups), confidence=1)

    @property
    def best_recipe(self) -> Row | None:
        """The one of the lowest perplexity on the first text."""
        result: TradeOff = self.result
        return min(result.pruned, key=lambda row: row.perplexity[next(iter(result.tokens))], default=None)

    @property
    def rivals_headline(self) -> tuple[Contestant, Contestant, Interval] | None:
        """Our fastest, the fastest rival, and how many times faster ours is per token."""
        result: RivalsResult = self.result
        ours, rival = (next((each for each in result.measured if each.ours == is_ours), None) for is_ours in (1, 0))
        if not ours or not rival:
            return None
        return ours, rival, ratio_interval(ratios(rival.tpot_ms, ours.tpot_ms, lower_is_better=True))

    @property
    def warnings(self) -> list[str]:
        return warnings(self.result)


@dataclass
class Chart:
    """A place on the page for one of several figures, each with its name; the reader chooses."""

    name: str
    title: str
    about: str
    choices: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """Of speedups; `low` and `high` are empty when nothing is known of their uncertainty."""

    name: str
    x: list[float]
    y: list[float]
    hover: list[str]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    rest: str = ""
    """What is the same along the line."""


def html(results: Sequence[Any], sources: Sequence[str]) -> str:
    """One page that shows all of `results`, which were read from the files `sources`, and loads nothing.

    Raises SettingsError when there are no results, or without the extra `report`.
    """
    _some(results)
    jinja2, plotly = _needed("jinja2"), _needed("plotly.offline")
    views = [View(*each) for each in zip(results, labels(results), sources, strict=True)]
    runs, layer_views, gpu_views, trade_offs, rival_views = (
        [view for view in views if view.result.kind == kind] for kind in ("run", "layers", "gpu", "trade-off", "rivals")
    )
    charts = {
        chart.name: chart
        for chart in (
            _speedup_chart(runs, "concurrency"),
            _speedup_chart(runs, "prompt_tokens"),
            _latency_chart(runs),
            _bound_chart(runs),
            _layers_chart(layer_views),
            _gpu_chart(gpu_views),
            _trade_off_chart(trade_offs),
            _rivals_chart(rival_views),
        )
        if chart.choices
    }
    machines: dict[str, list[View]] = defaultdict(list)
    for view in views:
        machines[view.result.machine.model_dump_json()].append(view)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "quantity": quantity,
        "factor": lambda value: f"{value:.2f}×",
        "range": lambda i: f"{i.low:.2f}–{i.high:.2f}",
        "percent": lambda share: "–" if share is None else f"{share:.0%}",
        "metric_name": metric_name,
        "median": statistics.median,
        "spread": spread,
        "share": share_of_bound,
        "check": check_line,
        "verdict": verdict,
        "gigabytes": lambda count: f"{count / 1e9:,.3g} GB",
        "csp_hash": _csp_hash,
    }
    page = environment.get_template("report.html.j2").render(
        views=views,
        runs=runs,
        layers=layer_views,
        gpus=gpu_views,
        trade_offs=trade_offs,
        rivals=rival_views,
        charts=charts,
        machines=list(machines.values()),
        figures={f"{c.name}-{i}": figure for c in charts.values() for i, (_, figure) in enumerate(c.choices)},
        plotly_js=_script(plotly.get_plotlyjs()),
        byte_bound=BYTE_BOUND,
        sides=SIDES,
    )
    return str(page)


def markdown(results: Sequence[Any]) -> str:
    """A table of every case for a comment on GitHub; below it what weakens the figures, and quality.

    Raises SettingsError when there are no results.
    """
    _some(results)
    views = [View(result, label, "") for result, label in zip(results, labels(results), strict=True)]
    runs = [view for view in views if view.result.kind == "run"]
    parts = [_runs_table([view.result for view in runs])] if runs else []
    parts += [layers.at_a_glance(view.result) for view in views if view.result.kind == "layers"]
    parts += [_gpu_table(view.result) for view in views if view.result.kind == "gpu"]
    parts += [_trade_off_table(view.result) for view in views if view.result.kind == "trade-off"]
    parts += [rivals.markdown(view.result) for view in views if view.result.kind == "rivals"]
    notes = [f"- **{in_table(view.label)}**: {in_table(warning)}" for view in views for warning in view.warnings]
    for view in runs:
        if view.result.check:
            notes.append(f"- {in_table(view.label)}: {check_line(view.result.check)}")
        quality = "; ".join(
            f"{in_table(row.name)} {quantity(row.dense)} -> {quantity(row.sparse)} ({in_table(row.source)})"
            for row in view.result.quality
        )
        if quality:
            notes.append(f"- {in_table(view.label)}: {quality}")
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])]) + "\n"


def picture(results: Sequence[Any], path: Path) -> None:
    """Bars of the speedup of TTFT and TPOT, with intervals, for every case of every run; a PNG.

    Raises SettingsError when no result is a run, or without the extra `report`.
    """
    runs = [result for result in results if result.kind == "run"]
    if not runs:
        raise SettingsError("no result of `swiftprune-bench run` to draw")
    figure_class = _needed("matplotlib.figure").Figure
    rows = [
        ("\n".join([*textwrap.wrap(label, 36), _brief(case)]), case)
        for run, label in zip(runs, labels(runs), strict=True)
        for case in run.cases
    ]
    figure = figure_class(figsize=(9, 1.3 + 0.72 * len(rows)), layout="constrained")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes = figure.subplots()
    legend: dict[str, Any] = {}
    for row, (_, case) in enumerate(rows):
        if case.void:
            axes.text(0.02, row, "void: no figures", va="center", color="#57606a", fontsize=10, bbox=behind)
            continue
        for name, offset, colour in (("ttft", -0.19, "#93bce6"), ("tpot", 0.19, SIDE_COLOURS["sparse"])):
            if metric := case.metric(name):
                speedup = metric.speedup()
                bars = axes.barh(row + offset, speedup.value, 0.36, color=colour)
                legend.setdefault(f"{SHORT_NAMES[name]}, {metric_name(name)}", bars)
                axes.plot([speedup.low, speedup.high], [row + offset] * 2, color="#1c2128", linewidth=1.2)
                axes.annotate(
                    f"{speedup.value:.2f}x",
                    (max(speedup.high, speedup.value), row + offset),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=10,
                    bbox=behind,
                )
    axes.axvline(1, color="#1c2128", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [label.replace("$", r"\$") for label, _ in rows], fontsize=10)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(1.25, 1.15 * axes.get_xlim()[1]))
    figure.supxlabel("speedup of 2:4 sparse over dense: median of paired rounds, 95% interval", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside upper right", ncols=2, frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def labels(results: Sequence[Any]) -> list[str]:
    """Model and engine of each result, or its kind, and whatever else it takes to tell it from the others."""
    found = [
        ", ".join(filter(None, (getattr(r, "model", ""), getattr(r, "engine", ""), KIND_NAMES.get(r.kind))))
        for r in results
    ]
    for fact in _FACTS:
        for same in _alike(found):
            values = {index: fact(results[index]) for index in same}
            if len(set(values.values())) > 1:
                for index, value in values.items():
                    found[index] += f", {value}"
    for same in _alike(found):
        for number, index in enumerate(same[1:], start=2):
            found[index] += f" ({number})"
    return found


def headline(run: RunResult) -> Headline:
    """Nobody picks: decoding in the case with the fewest sequences at once and, of those, the shortest prompt."""
    fewest = min((case.concurrency for case in run.cases), default=0)
    cases = sorted((case for case in run.cases if case.concurrency == fewest), key=lambda case: case.prompt_tokens)
    for case in cases:
        if case.decoding and not case.void:
            return Headline(case, case.decoding, case.decoding.speedup())
    return Headline(void="; ".join(dict.fromkeys(case.void for case in cases if case.void)) or "nothing was measured")


def warnings(result: Any) -> list[str]:
    """All that weakens the figures of a result of any kind, in words."""
    if result.kind == "trade-off":
        return _trade_off_warnings(result)
    found = list(result.conditions.warnings) if result.conditions else [_NOT_RECORDED]
    if result.kind == "run":
        if result.check is None:
            found.append("the tokens of the sparse side were not checked")
        elif not result.check.passed:
            found.append(f"the sparse side wrote wrong tokens: {check_line(result.check)}")
        voids = defaultdict(list)
        for case in result.cases:
            if case.void:
                voids[case.void].append(case.label)
        found += [
            f"void: {reason}: {'all cases' if len(cases) == len(result.cases) else '; '.join(cases)}"
            for reason, cases in voids.items()
        ]
    if result.kind == "rivals":
        found += [f"{each.name} was not measured: {each.void}" for each in result.contestants if each.void]
    if result.kind == "gpu":
        found += [f"check failed: {check.name}: {check.detail}" for check in result.checks if not check.passed]
        reasons = Counter(
            f"{time.status}: {time.backend}: {time.reason}"
            for cell in result.cells
            for time in cell.times
            if time.status != "ok"
        )
        found += [f"{reason} ({count} of {len(result.cells)} cells)" for reason, count in reasons.items()]
        if result.left_out:
            found.append(f"{result.left_out} cells were left out: {result.stopped or 'no reason given'}")
        if not result.graph_capture:
            found.append("not every time is of a CUDA graph: of small products, some measure the host")
    return found


def _trade_off_warnings(result: TradeOff) -> list[str]:
    found = defaultdict(list)
    for row in result.rows:
        for warning in row.conditions.warnings if row.conditions else [_NOT_RECORDED]:
            found[warning].append(row.recipe)
    return [f"{warning}: {', '.join(recipes)}" for warning, recipes in found.items()]


def verdict(speedup: Interval) -> str:
    """What may be claimed of it: of one round, nothing."""
    if not speedup.confidence:
        return "no certain difference"
    if speedup.low > 1:
        return "faster"
    return "slower" if speedup.high < 1 else "no certain difference"


def check_line(check: Check) -> str:
    """What the comparison of tokens with the reference came to."""
    sign = "<=" if check.largest_gap <= check.tolerance else ">"
    gap = f"largest gap {check.largest_gap:.3g} {sign} {check.tolerance:g}"
    return f"the kernels give {check.equal} of {check.tokens} greedy tokens as the same weights unpacked, {gap}"


def share_of_bound(metric: Metric, side: Literal["dense", "sparse"]) -> float | None:
    """How near a side's median comes to the best that this machine allows; None without a bound."""
    bound, median = metric.bound.get(side), statistics.median(getattr(metric, side))
    if not bound or not median:
        return None
    return float(bound / median if metric.lower_is_better else median / bound)


def metric_name(name: str) -> str:
    """In words, where there are any."""
    return METRIC_NAMES.get(name, name)


def quantity(value: float) -> str:
    """With about three digits."""
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def _some(results: Sequence[Any]) -> None:
    if not results:
        raise SettingsError("no results to report")


def _needed(module: str) -> Any:
    """A module of the extra `report`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise SettingsError(f"reports need {package}: pip install 'swiftprune[report]'") from None


def _alike(found: Sequence[str]) -> list[list[int]]:
    """The places of labels that occur more than once."""
    places: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(found):
        places[label].append(index)
    return [same for same in places.values() if len(same) > 1]


def _brief(case: Case) -> str:
    """Its label without `batch`, which most cases are."""
    return case.label.removeprefix("batch, ")


def _script(code: str) -> Any:
    """Code that cannot end its own element, for the page to hold as it is."""
    return _needed("markupsafe").Markup(code.replace("\r\n", "\n").replace("</script", "<\\/script"))


def _csp_hash(code: object) -> str:
    """By which the page's policy knows its own scripts and runs no other."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(str(code).encode()).digest()).decode() + "'"


# Tables for GitHub


def _runs_table(runs: Sequence[RunResult]) -> str:
    measured = {metric.name for run in runs for case in run.cases if not case.void for metric in case.metrics}
    names = [name for name in METRIC_NAMES if name in TABLE_METRICS and name in measured] or ["tpot"]
    lines = [
        f"| model | engine | case |{''.join(f' {SHORT_NAMES.get(name, name)} |' for name in names)}",
        f"| --- | --- | --- |{' ---: |' * len(names)}",
    ]
    for run in runs:
        for case in run.cases:
            cells = [in_table(_change(case.metric(name))) for name in names]
            if case.void:
                cells = [f"void: {in_table(case.void)}", *["-"] * (len(names) - 1)]
            lines.append(f"| {' | '.join([in_table(run.model), in_table(run.engine), case.label, *cells])} |")
    return "\n".join(lines)


def _change(metric: Metric | None) -> str:
    if metric is None:
        return "-"
    dense, sparse = (quantity(statistics.median(values)) for values in (metric.dense, metric.sparse))
    return f"{dense} -> {sparse} {metric.unit}, {metric.speedup():.2fx}"


def _gpu_table(result: GpuResult) -> str:
    """Kernels across: the time of the dense product, and the speedups of the others over it."""
    backends = list(dict.fromkeys(time.backend for cell in result.cells for time in cell.times))
    lines = [f"| weight | dtype | M |{''.join(f' {in_table(name)} |' for name in backends)}"]
    lines.append(f"| --- | --- | ---: |{' ---: |' * len(backends)}")
    for cell in result.cells:
        found = {
            time.backend: f"{quantity(statistics.median(time.us))} us" if time.us else time.status
            for time in cell.times
        }
        found |= {name: f"{interval.value:.2f}x" for name, interval in cell.speedups.items()}
        row = (found.get(name, "-") for name in backends)
        lines.append(f"| {cell.rows}x{cell.cols} | {in_table(cell.dtype)} | {cell.tokens} | {' | '.join(row)} |")
    return "\n".join(lines)


def _trade_off_table(result: TradeOff) -> str:
    """A row a recipe: minutes, and perplexity on each text with its ratio to the dense model's."""
    lines = [
        f"| {in_table(result.model)} | minutes |{''.join(f' {in_table(text)} | x dense |' for text in result.tokens)}",
        f"| --- | ---: |{' ---: | ---: |' * len(result.tokens)}",
    ]
    for row in result.rows:
        cells = [f"{quantity(row.perplexity[text])} | {result.ratio(row, text):.2f}" for text in result.tokens]
        lines.append(f"| {in_table(row.recipe)} | {row.minutes:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Charts


def _speedup_chart(runs: Sequence[View], over: Literal["concurrency", "prompt_tokens"]) -> Chart:
    title, axis, what = {
        "concurrency": ("Speedup over batch size", "sequences at once", "batch"),
        "prompt_tokens": ("Speedup over prompt length", "tokens of the prompt", "length"),
    }[over]
    chart = Chart(
        f"speedup-{what}",
        title,
        "How many times better the sparse model is. Bars are 95% intervals; below the dashed line it is slower. "
        "Void cases are left out.",
    )
    for name in TABLE_METRICS:
        lines = [line for view in runs if (line := _case_line(view, name, over))]
        if len({x for line in lines for x in line.x}) > 1:
            rests = {line.rest for line in lines}
            if len(rests) > 1:
                lines = [replace(line, name=f"{line.name} ({line.rest})") for line in lines]
            figure = _line_figure(lines, axis if len(rests) > 1 else f"{axis}<br>({lines[0].rest})")
            chart.choices.append((metric_name(name), figure))
    return chart


def _case_line(view: View, name: str, over: Literal["concurrency", "prompt_tokens"]) -> Line | None:
    """A run's speedups along one quantity; of the cases that differ in nothing else, the largest family."""
    other: Literal["concurrency", "prompt_tokens"] = "prompt_tokens" if over == "concurrency" else "concurrency"
    families: dict[tuple[str, int, int], dict[int, Case]] = defaultdict(dict)
    for case in view.result.cases:
        if case.metric(name) and not case.void:
            families[case.workload, getattr(case, other), case.new_tokens].setdefault(getattr(case, over), case)
    if not families:
        return None
    (workload, fixed, new_tokens), family = max(families.items(), key=lambda item: (len(item[1]), -item[0][1]))
    cases = [family[x] for x in sorted(family)]
    metrics = [metric for case in cases if (metric := case.metric(name))]
    speedups = [metric.speedup() for metric in metrics]
    constant = f"{fixed} in" if other == "prompt_tokens" else f"{fixed} at once"
    return Line(
        name=view.label,
        rest=f"{workload}, {constant}, {new_tokens} out",
        x=[float(x) for x in sorted(family)],
        y=[speedup.value for speedup in speedups],
        low=[speedup.low for speedup in speedups],
        high=[speedup.high for speedup in speedups],
        hover=[f"{case.label}\n{_change(metric)}" for case, metric in zip(cases, metrics, strict=True)],
    )


def _layers_chart(views: Sequence[View]) -> Chart:
    chart = Chart(
        "layers",
        "Single layers over tokens",
        "Packed 2:4 against the better of torch and oneDNN, both at their 20th percentile. The dotted line is what the "
        "bytes allow; above it, the dense kernel reads more slowly than memory could.",
    )
    for view in views:
        result: LayersResult = view.result
        for dtype, threads in dict.fromkeys((cell.dtype, cell.threads) for cell in result.cells):
            cells = [cell for cell in result.cells if (cell.dtype, cell.threads) == (dtype, threads)]
            shapes: dict[str, list[layers.Cell]] = defaultdict(list)
            for cell in sorted(cells, key=lambda cell: cell.tokens):
                shapes[f"{cell.rows} × {cell.cols}"].append(cell)
            lines = [
                Line(
                    name=shape,
                    x=[float(cell.tokens) for cell in row],
                    y=[cell.speedup for cell in row],
                    hover=[
                        f"{shape}, M = {cell.tokens}\n{cell.speedup:.2f}×, {cell.backend} over {cell.better_dense}"
                        for cell in row
                    ],
                )
                for shape, row in shapes.items()
            ]
            name = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
            figure = _line_figure(lines, "tokens (M)", bound=BYTE_BOUND.get(dtype))
            chart.choices.append((_choice(view, name, views), figure))
    return chart


def _gpu_chart(views: Sequence[View]) -> Chart:
    chart = Chart(
        "gpu",
        "GPU kernels over tokens",
        "Each kernel against the dense product of cuBLAS, with 95% intervals. What did not run is in the table.",
    )
    for view in views:
        result: GpuResult = view.result
        for rows, cols, dtype in dict.fromkeys((cell.rows, cell.cols, cell.dtype) for cell in result.cells):
            points: dict[str, list[tuple[int, Interval]]] = defaultdict(list)
            for cell in sorted(result.cells, key=lambda cell: cell.tokens):
                if (cell.rows, cell.cols, cell.dtype) == (rows, cols, dtype):
                    for backend, speedup in cell.speedups.items():
                        points[backend].append((cell.tokens, speedup))
            lines = [
                Line(
                    name=backend,
                    x=[float(tokens) for tokens, _ in row],
                    y=[speedup.value for _, speedup in row],
                    low=[speedup.low for _, speedup in row],
                    high=[speedup.high for _, speedup in row],
                    hover=[f"{backend}, M = {tokens}\n{speedup:.2f}" for tokens, speedup in row],
                )
                for backend, row in points.items()
            ]
            if lines:
                name = f"{rows} × {cols}, {dtype}"
                figure = _line_figure(lines, "tokens (M)")
                chart.choices.append((_choice(view, name, views), figure))
    return chart


def _latency_chart(runs: Sequence[View]) -> Chart:
    """Shares of tokens over latency. On a logarithmic axis a speedup is the same distance everywhere."""
    chart = Chart(
        "latency",
        "Inter-token latency",
        "The share of tokens that came within a time of the token before. The farther left, the faster; the distance "
        "between the curves is the speedup.",
    )
    for view in runs:
        for case in view.result.cases:
            if case.void or not all(case.itl_ms.get(side) for side in SIDES):
                continue
            traces: list[dict[str, Any]] = []
            for side, colour in SIDE_COLOURS.items():
                shares = [step / _ECDF_STEPS for step in range(_ECDF_STEPS + 1)]
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": side,
                        "line": {"color": colour, "width": 2.5},
                        "x": [quantile(case.itl_ms[side], share) for share in shares],
                        "y": [100 * share for share in shares],
                        "hovertemplate": f"{side}: %{{y:.0f}}% of tokens within %{{x:.1f}} ms<extra></extra>",
                    }
                )
            low, high = min(trace["x"][0] for trace in traces), max(trace["x"][-1] for trace in traces)
            figure = _figure(
                traces,
                xaxis={"title": "milliseconds", **_log_axis(low, high, _round_numbers(low, high))},
                yaxis={"title": "share of tokens", "ticksuffix": "%", "range": [0, 102]},
            )
            chart.choices.append((f"{view.label}: {_brief(case)}", figure))
    return chart


def _bound_chart(runs: Sequence[View]) -> Chart:
    chart = Chart(
        "bound",
        "Share of what this machine allows",
        "The least time in which the memory bandwidth and the arithmetic measured in the same run could do the work, "
        "over the time it took. At 100% nothing is left to gain but by moving fewer bytes. Attention is not counted.",
    )
    for view in runs:
        bounded = {
            name: [
                (case, metric)
                for case in view.result.cases
                if not case.void and (metric := case.metric(name)) and metric.bound
            ]
            for name in TABLE_METRICS
        }
        # Tokens per second say the same as the time of each, so they stand in only where that is missing.
        names = [name for name in ("tpot", "ttft") if bounded[name]] or [n for n in TABLE_METRICS if bounded[n]]
        rows = [(f"{SHORT_NAMES.get(name, name)}, {_brief(case)}", m) for name in names for case, m in bounded[name]]
        if rows:
            chart.choices.append((view.label, _bars_figure(rows)))
    return chart


def _choice(view: View, name: str, views: Sequence[View]) -> str:
    """What the reader chooses by: the name, after its result's label where there are several results."""
    return f"{view.label}: {name}" if len(views) > 1 else name


def _trade_off_chart(views: Sequence[View]) -> Chart:
    chart = Chart(
        "trade-off",
        "Quality over time",
        "Perplexity on text that no stage has seen, over the minutes that pruning took, both on logarithmic axes. The "
        "line joins the recipes that no faster one is as good as; dashed: the dense model.",
    )
    for view in views:
        result: TradeOff = view.result
        for text in result.tokens if result.pruned else ():
            name = f"{text}, {result.tokens[text]:,} tokens"
            chart.choices.append((_choice(view, name, views), _trade_off_figure(result, text)))
    return chart


def _trade_off_figure(result: TradeOff, text: str) -> dict[str, Any]:
    front = result.front(text)
    points = [
        Point(
            row.recipe,
            row.minutes,
            row.perplexity[text],
            f"{row.minutes:.1f} minutes<br>perplexity {quantity(row.perplexity[text])}, "
            f"{result.ratio(row, text):.2f}× dense",
            row in front,
        )
        for row in result.pruned
    ]
    dense = result.rows[0].perplexity[text]
    return _points_figure(points, "best for its time", "others", "minutes", rule=dense)


def _rivals_chart(views: Sequence[View]) -> Chart:
    chart = Chart(
        "rivals",
        "Quality over speed",
        "Perplexity over the time of a token, one sequence at a time, on logarithmic axes: left and low is better.",
    )
    for view in views:
        result: RivalsResult = view.result
        for text in result.tokens if result.measured else ():
            points = [
                Point(
                    each.name,
                    each.token_ms,
                    each.perplexity[text],
                    f"{each.token_ms:.2f} ms a token<br>perplexity {quantity(each.perplexity[text])}",
                    each.ours,
                )
                for each in result.measured
            ]
            name = f"{text}, {result.tokens[text]:,} tokens"
            figure = _points_figure(points, "ours", "rivals", "ms a token", joined=False)
            chart.choices.append((_choice(view, name, views), figure))
    return chart


@dataclass(frozen=True)
class Point:
    """Of perplexity over something."""

    name: str
    x: float
    perplexity: float
    hover: str
    marked: bool


def _points_figure(
    points: Sequence[Point], marked: str, others: str, title: str, *, rule: float | None = None, joined: bool = True
) -> dict[str, Any]:
    """Logarithmic on both axes; `marked` and `others` name the points that are and are not. `rule`: a dashed line."""
    traces = [
        {
            "type": "scatter",
            "mode": f"{lines}markers+text",
            "name": name,
            "textposition": "top right",
            "line": {"color": colour, "width": 2},
            "marker": {"color": colour, "size": 8},
            "x": [point.x for point in chosen],
            "y": [point.perplexity for point in chosen],
            "text": [html_text.escape(point.name) for point in chosen],
            "hoverinfo": "text",
            "hovertext": [f"{html_text.escape(point.name)}<br>{point.hover}" for point in chosen],
        }
        for name, lines, colour, chosen in (
            (marked, "lines+" if joined else "", SIDE_COLOURS["sparse"], [point for point in points if point.marked]),
            (others, "", SIDE_COLOURS["dense"], [point for point in points if not point.marked]),
        )
        if chosen
    ]
    xs = [point.x for point in points]
    perplexities = [*(point.perplexity for point in points), *([rule] if rule else [])]
    spans = {title: (min(xs), 2 * max(xs)), "perplexity": (min(perplexities), max(perplexities))}
    axes = {name: {"title": name, **_log_axis(*span, _round_numbers(*span))} for name, span in spans.items()}
    shapes = [_rule(y=rule)] if rule else []
    return _figure(traces, height=440, shapes=shapes, xaxis=axes[title], yaxis=axes["perplexity"])


def _bars_figure(rows: Sequence[tuple[str, Metric]]) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for side, colour in SIDE_COLOURS.items():
        shares = [share_of_bound(metric, side) or 0.0 for _, metric in rows]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": side,
                "marker": {"color": colour},
                "x": [100 * share for share in shares],
                "y": [_narrow(label) for label, _ in rows],
                "text": [f"{share:.0%}" for share in shares],
                "textposition": "outside",
                "cliponaxis": False,
                "hovertemplate": f"{side}: %{{x:.0f}}%<extra></extra>",
            }
        )
    longest = max(x for trace in traces for x in trace["x"])
    return _figure(
        traces,
        height=90 + 58 * len(rows),
        barmode="group",
        bargap=0.3,
        shapes=[_rule(x=100)],
        xaxis={"ticksuffix": "%", "range": [0, 1.1 * max(100, longest)]},
        yaxis={"autorange": "reversed", "showgrid": False},
    )


def _narrow(label: str) -> str:
    """In two lines, for narrow screens."""
    head, _, tail = label.partition(" at once, ")
    return f"{html_text.escape(head)} at once<br>{html_text.escape(tail)}"


def _wrapped(text: str) -> str:
    """For legends, which cut off what does not fit."""
    return "<br>".join(html_text.escape(line) for line in textwrap.wrap(text, 28))


def _line_figure(lines: Sequence[Line], x_title: str, bound: float | None = None) -> dict[str, Any]:
    """Speedups on a logarithmic axis. Lines stand slightly aside of each other, so that their intervals can be seen."""
    ticks = sorted({x for line in lines for x in line.x})
    traces: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        aside = 1.0 + 0.025 * (index - (len(lines) - 1) / 2) * bool(line.low)
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": _wrapped(line.name),
            "x": [x * aside for x in line.x],
            "y": line.y,
            "hoverinfo": "text",
            "text": [html_text.escape(hover).replace("\n", "<br>") for hover in line.hover],
            "line": {"color": colour, "width": 2},
            "marker": {"color": colour, "size": 8, "symbol": _SYMBOLS[index % len(_SYMBOLS)]},
        }
        if line.low:
            trace["error_y"] = {
                "type": "data",
                "symmetric": False,
                "thickness": 1.5,
                "width": 4,
                "array": [high - y for high, y in zip(line.high, line.y, strict=True)],
                "arrayminus": [y - low for low, y in zip(line.low, line.y, strict=True)],
            }
        traces.append(trace)
    return _figure(
        traces,
        height=310 + 17 * sum(1 + trace["name"].count("<br>") for trace in traces),
        shapes=[_rule(y=1), *([_rule(y=bound, dash="dot")] if bound else [])],
        xaxis={"title": x_title, **_log_axis(ticks[0], ticks[-1], ticks)},
        yaxis={"title": "speedup", "ticksuffix": "×", "rangemode": "tozero"},
    )


def _figure(traces: Sequence[dict[str, Any]], *, height: int = 360, **layout: Any) -> dict[str, Any]:
    """Checked by plotly; the page adds the colours of its theme."""
    figure = _needed("plotly.graph_objects").Figure(
        data=traces,
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
            "dragmode": False,
            "hovermode": "closest",
            "showlegend": True,
            "font": {"family": _FONT, "size": 13},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "itemclick": False,
                "itemdoubleclick": False,
            },
            **layout,
        },
    )
    figure.update_xaxes(automargin=True, zeroline=False, title_font_size=13)
    figure.update_yaxes(automargin=True, zeroline=False, title_font_size=13)
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def _rule(*, x: float | None = None, y: float | None = None, dash: str = "dash") -> dict[str, Any]:
    """A line right across."""
    line = {"type": "line", "layer": "above", "line": {"color": SIDE_COLOURS["dense"], "width": 1.5, "dash": dash}}
    if x is None:
        return {**line, "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    return {**line, "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x}


def _log_axis(low: float, high: float, ticks: Iterable[float]) -> dict[str, Any]:
    marks = list(ticks)
    room = 0.06 * max(math.log10(high / low), 0.1)
    return {
        "type": "log",
        "range": [math.log10(low) - room, math.log10(high) + room],
        "tickvals": marks,
        "ticktext": [f"{mark:g}" for mark in marks],
    }


def _round_numbers(low: float, high: float) -> list[float]:
    """About five to nine of them between the two, for a logarithmic axis."""
    found: list[float] = []
    halves, tenths = [n / 2 for n in range(2, 20)], [n / 10 for n in range(10, 100)]
    for digits in ([1.0], [1.0, 2.0, 5.0], [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0], halves, tenths):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
        if len(found) >= 5:
            break
    return found or [low, high]
