"""Quality against time: what each stage of the pipeline gives, alone and together, on the demo model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from exporters import export
from runtime_bench import results
from runtime_bench.demo_data import DemoData
from runtime_bench.machine import Machine, this_machine
from swiftprune.errors import ResultError, SettingsError
from swiftprune.pruning.calibration_text import load_tokenizer, read_text, token_windows
from swiftprune.pruning.compute import autocast, faster_type
from swiftprune.pruning.distill import Validation
from swiftprune.pruning.evaluate import perplexity
from swiftprune.pruning.pipeline import DTYPES, PruneSettings
from swiftprune.pruning.progress import Progress, silent
from swiftprune.pruning.quality import QualityName, make_settings

SEQLEN = 2048
WINDOWS = 15  # of each text
DENSE = "dense"
# Stages of an export that are not pruning: what is reported as its time leaves them out.
_NOT_PRUNING = {"hash source", "calibration text", "write", "output error"}

RECIPES: dict[str, tuple[QualityName | None, dict[str, Any]]] = {
    "magnitude": (None, {"method": "magnitude"}),
    "wanda": (None, {"method": "wanda"}),
    "wanda, one pass": (None, {"method": "wanda", "one_pass": True}),
    "pairs, one pass": (None, {"method": "swiftprune-pairs", "one_pass": True}),
    "fast": ("fast", {}),
    "wanda + permute": (None, {"method": "wanda", "permute": True}),
    "wanda + weights": (None, {"method": "wanda", "refine": ("weights",)}),
    "wanda + blocks": (None, {"method": "wanda", "refine": ("blocks",)}),
    "wanda + distill": (None, {"method": "wanda", "refine": ("distill",), "minutes": 10.0}),
    "sparsegpt": (None, {"method": "sparsegpt"}),
    "sparsegpt + weights": (None, {"method": "sparsegpt", "refine": ("weights",)}),
    "admm, one pass": (None, {"method": "admm", "one_pass": True}),
    "admm": (None, {"method": "admm"}),
    "admm, less text": (None, {"method": "admm", "samples": 24, "seqlen": 256}),
    "admm + permute": (None, {"method": "admm", "permute": True}),
    "admm + blocks": (None, {"method": "admm", "refine": ("blocks",)}),
    "balanced": ("balanced", {}),
    "best": ("best", {}),
}


class Row(BaseModel):
    """One recipe."""

    recipe: str
    settings: PruneSettings | None
    seconds: dict[str, float]
    """By stage, without writing and without measuring."""
    perplexity: dict[str, float]
    """By text."""
    validations: list[Validation]

    @property
    def minutes(self) -> float:
        return sum(self.seconds.values()) / 60


class TradeOff(BaseModel):
    machine: Machine
    model: str
    tokens: dict[str, int]
    """Evaluated, by text."""
    rows: list[Row]

    def row(self, recipe: str) -> Row | None:
        return next((row for row in self.rows if row.recipe == recipe), None)


def measure(
    data: DemoData, recipes: Sequence[str], out: Path, *, keep: Path | None = None, progress: Progress = silent
) -> TradeOff:
    """Runs the recipes that `out` does not hold yet, writing it after each, and returns all it holds then.

    Perplexity is measured in bfloat16 arithmetic where the machine is faster in it, else in float32, for all alike.
    Raises SettingsError for an unknown recipe, ResultError when `out` is of another machine.
    """
    if unknown := [name for name in recipes if name not in RECIPES]:
        raise SettingsError(f"no recipe {unknown[0]!r}; known: {', '.join(RECIPES)}")
    tokenizer = load_tokenizer(data.model)
    windows = {
        path.stem: token_windows(read_text(path), tokenizer, SEQLEN, str(path))[:WINDOWS]
        for path in (data.held_out, data.news)
    }
    result = _load(out, data, windows)
    for name in (DENSE, *recipes):
        if result.row(name) is None:
            result.rows.append(_run(data, name, windows, keep, progress))
            results.save(result, out)
    return result


def _load(out: Path, data: DemoData, windows: dict[str, torch.Tensor]) -> TradeOff:
    machine = this_machine()
    if not out.exists():
        tokens = {name: taken.numel() for name, taken in windows.items()}
        return TradeOff(machine=machine, model=data.model.name, tokens=tokens, rows=[])
    stored = TradeOff.model_validate_json(out.read_text())
    if stored.machine.cpu != machine.cpu:
        raise ResultError(f"{out}: was measured on {stored.machine.cpu}, this is {machine.cpu}; give another --out")
    return stored


def _run(data: DemoData, name: str, windows: dict[str, torch.Tensor], keep: Path | None, progress: Progress) -> Row:
    def staged(stage: str, done: float, total: float) -> None:
        progress(f"{name}: {stage}", done, total)

    if name == DENSE:
        return Row(
            recipe=name, settings=None, seconds={}, validations=[],
            perplexity=_perplexities(data.model, windows, staged),
        )  # fmt: skip
    quality, given = RECIPES[name]
    settings = make_settings(quality, {"calibration": str(data.calibration), "compute": faster_type()} | given)
    with tempfile.TemporaryDirectory(dir=data.model.parent) as temporary:
        folder = (keep or Path(temporary)) / name.replace(" ", "")
        start = time.perf_counter()
        report = export(data.model, folder, settings, target="dense", overwrite=True, progress=staged)
        elapsed = time.perf_counter() - start
        seconds = {stage: value for stage, value in report.seconds.items() if stage not in _NOT_PRUNING}
        seconds["other"] = max(0.0, elapsed - sum(report.seconds.values()))
        return Row(
            recipe=name, settings=report.settings, seconds=seconds, validations=report.distillation,
            perplexity=_perplexities(folder, windows, staged),
        )  # fmt: skip


def _perplexities(folder: Path, windows: dict[str, torch.Tensor], progress: Progress) -> dict[str, float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with autocast(DTYPES[faster_type()]):
        return {
            name: perplexity(model, taken, stage=f"evaluate on {name}", progress=progress)
            for name, taken in windows.items()
        }


def markdown(result: TradeOff) -> str:
    """A row a recipe: minutes, and perplexity on each text with its ratio to the dense model's."""
    dense = result.row(DENSE)
    assert dense is not None
    lines = [
        "| recipe | minutes | " + " | ".join(f"{text} | x dense" for text in result.tokens) + " |",
        "| --- | ---: |" + " ---: | ---: |" * len(result.tokens),
    ]
    for row in result.rows:
        cells = [
            f"{row.perplexity[text]:.1f} | {row.perplexity[text] / dense.perplexity[text]:.2f}"
            for text in result.tokens
        ]
        lines.append(f"| {row.recipe} | {row.minutes:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
