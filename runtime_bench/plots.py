"""Pictures of results, drawn with matplotlib (the extra `report`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime_bench.layers import BYTE_BOUND, LayersResult
from runtime_bench.rivals import RivalsResult
from runtime_bench.trade_off import TradeOff


def layers(bench: LayersResult, path: Path) -> None:
    """Speedup over the number of tokens: a panel for each dtype and thread count, a line for each weight."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(cell.dtype for cell in bench.cells))
    threads = sorted({cell.threads for cell in bench.cells})
    shapes = sorted({(cell.rows, cell.cols) for cell in bench.cells}, key=lambda shape: shape[0] * shape[1])
    figure = Figure(figsize=(5.5 * len(threads) + 1.5, 4 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(threads), squeeze=False, sharex=True, sharey=True)
    for dtype, row in zip(dtypes, panels, strict=True):
        for count, panel in zip(threads, row, strict=True):
            for index, (rows, cols) in enumerate(shapes):
                cells = [
                    cell
                    for cell in bench.cells
                    if (cell.dtype, cell.threads, cell.rows, cell.cols) == (dtype, count, rows, cols)
                ]
                panel.plot(
                    [cell.tokens for cell in cells],
                    [cell.speedup for cell in cells],
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                    label=f"{rows} x {cols}",
                    color=f"C{index}",
                    alpha=0.85,
                )
            panel.axhline(1, color="black", linewidth=1)
            panel.axhline(BYTE_BOUND[dtype], color="gray", linestyle="--", linewidth=1)
            panel.annotate(
                f"what the bytes allow: {BYTE_BOUND[dtype]:.2f}x",
                (1, BYTE_BOUND[dtype]),
                xytext=(1, 1),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color="gray",
                fontsize=8,
            )
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted({cell.tokens for cell in bench.cells}))
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.grid(alpha=0.25)
            panel.set_title(f"{dtype}, {count} thread{'s' * (count > 1)}", fontsize=10)
    panels[0][0].set_ylim(bottom=0)  # all share it, so only now that all is drawn
    for row in panels:
        row[0].set_ylabel("speedup over the better dense kernel")
    for panel in panels[-1]:
        panel.set_xlabel("tokens (M)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="outputs x inputs", fontsize=8, title_fontsize=8)
    figure.suptitle(f"2:4 linear layers on {bench.machine.cpu}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def trade_off(result: TradeOff, path: Path) -> None:
    """Perplexity over minutes, a panel a text, both on logarithmic scales; the line joins the best for its time."""
    from matplotlib.figure import Figure

    dense = result.rows[0]
    figure = Figure(figsize=(6.5 * len(result.tokens), 5), layout="constrained")
    for panel, text in zip(figure.subplots(1, len(result.tokens), squeeze=False)[0], result.tokens, strict=True):
        front = result.front(text)
        panel.plot([row.minutes for row in front], [row.perplexity[text] for row in front], color="C0", linewidth=1)
        for row in result.pruned:
            chosen = row in front
            panel.plot(row.minutes, row.perplexity[text], "o", color="C0" if chosen else "gray", markersize=5)
            panel.annotate(
                row.recipe,
                (row.minutes, row.perplexity[text]),
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=8,
                color="black" if chosen else "gray",
            )
        panel.axhline(dense.perplexity[text], color="black", linestyle="--", linewidth=1)
        panel.annotate(
            "dense",
            (1, dense.perplexity[text]),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        _logarithmic(panel, (1, 2, 5))
        panel.set_xlim(right=2 * panel.get_xlim()[1])  # for the last name
        panel.set_xlabel("minutes")
        panel.set_title(f"{text}, {result.tokens[text]:,} tokens", fontsize=10)
        panel.grid(alpha=0.25, which="both")
    figure.axes[0].set_ylabel("perplexity")
    figure.suptitle(f"{result.model} at 2:4 on {result.machine.cpu}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def rivals(result: RivalsResult, path: Path) -> None:
    """Perplexity over milliseconds per token, a panel a text, both on logarithmic scales; the line joins what is best.

    Where no text was read, the time of a token alone, in bars.
    """
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{result.model} on {result.machine.cpu}, {result.threads} threads, one sequence at a time"
    if not result.tokens:
        figure = Figure(figsize=(9, 1 + 0.4 * len(result.measured)), layout="constrained")
        panel = figure.subplots()
        shown = result.measured[::-1]
        colours = ["C0" if each.ours else "gray" for each in shown]
        bars = panel.barh([each.name for each in shown], [each.token_ms for each in shown], color=colours)
        panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.set_xlabel("ms a token")
    else:
        figure = Figure(figsize=(5.5 * len(result.tokens) + 3, 5), layout="constrained")
        for panel, text in zip(figure.subplots(1, len(result.tokens), squeeze=False)[0], result.tokens, strict=True):
            front = result.front(text)
            panel.plot([each.token_ms for each in front], [each.perplexity[text] for each in front], "--", color="gray")
            for index, each in enumerate(result.measured, start=1):  # names would overlap
                colour = "C0" if each.ours else "black"
                label = f"{index}  {each.name}, {each.token_ms:.1f} ms"
                panel.plot(each.token_ms, each.perplexity[text], "o", color=colour, markersize=5, label=label)
                panel.annotate(
                    str(index),
                    (each.token_ms, each.perplexity[text]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=9,
                    color=colour,
                )
            _logarithmic(panel, (1, 2, 3, 5, 7))
            panel.set_xlabel("ms a token")
            panel.set_title(f"{text}, {result.tokens[text]:,} tokens", fontsize=10)
            panel.grid(alpha=0.25, which="both")
        figure.axes[0].set_ylabel("perplexity")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _logarithmic(panel: Any, subs: tuple[int, ...]) -> None:
    """Both axes, with plain numbers at `subs` times powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
