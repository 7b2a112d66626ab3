"""Quality against time: what each method and stage gives, alone and together, on the demo model."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, TypeAdapter, model_validator

from exporters import export
from exporters.checkpoint import Target
from runtime_bench import results
from runtime_bench.conditions import Conditions, judged, watch
from runtime_bench.demo_data import DemoData
from runtime_bench.machine import this_machine
from runtime_bench.stored import Stored
from swiftprune.calibration.text import load_tokenizer, token_windows
from swiftprune.calibration.text_files import read_text
from swiftprune.compute import Compute, faster_type
from swiftprune.config import DTYPES, PruneSettings, QualityName, make_settings
from swiftprune.errors import ResultError, SettingsError
from swiftprune.methods.scores import KEEP, METHODS
from swiftprune.models.load import load_whole_model
from swiftprune.models.perplexity import perplexity
from swiftprune.progress import ProgressCallback, no_progress
from swiftprune.stages.distill import Validation

SEQLEN = 2048
WINDOWS = 15  # of each text
DENSE = "dense"
PRUNING_METHODS = tuple(name for name in METHODS if name != KEEP)
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
    "admm, int8": (None, {"method": "admm", "values": "int8"}),
    "admm, int4": (None, {"method": "admm", "values": "int4"}),
    "balanced": ("balanced", {}),
    "balanced, int8": ("balanced", {"values": "int8"}),
    "balanced, int4": ("balanced", {"values": "int4"}),
    "best": ("best", {}),
    "best, int4": ("best", {"values": "int4"}),
}


class Row(Stored):
    """One recipe."""

    recipe: str
    settings: PruneSettings | None
    seconds: dict[str, float]
    """By stage, without writing and without measuring."""
    perplexity: dict[str, float]
    """By text."""
    validations: list[Validation]
    conditions: Conditions | None = None
    """While it was made and measured."""

    @property
    def minutes(self) -> float:
        return sum(self.seconds.values()) / 60


class TradeOff(results.Result):
    """`swiftprune-bench trade-off`: perplexity of one model after each recipe, and the time that each took."""

    kind: Literal["trade-off"] = "trade-off"
    model: str
    tokens: dict[str, int] = Field(min_length=1)
    """Evaluated, by text."""
    rows: list[Row]
    """The dense model's first."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.rows and self.rows[0].recipe != DENSE:
            raise ValueError(f"the first row is of {self.rows[0].recipe!r}, not of the dense model")
        for row in self.rows:
            if missing := self.tokens.keys() - row.perplexity.keys():
                raise ValueError(f"{row.recipe}: no perplexity on {min(missing)}")
            if not all(1 <= value < math.inf for value in row.perplexity.values()):
                raise ValueError(f"{row.recipe}: a perplexity must be finite and at least 1")
        return self

    @property
    def pruned(self) -> list[Row]:
        """By time."""
        return sorted(self.rows[1:], key=lambda row: row.minutes)

    def row(self, recipe: str) -> Row | None:
        return next((row for row in self.rows if row.recipe == recipe), None)

    def ratio(self, row: Row, text: str) -> float:
        """Its perplexity over the dense model's."""
        return row.perplexity[text] / self.rows[0].perplexity[text]

    def front(self, text: str) -> list[Row]:
        """The recipes that no faster one is as good as, by time."""
        found: list[Row] = []
        for row in self.pruned:
            if not found or row.perplexity[text] < found[-1].perplexity[text]:
                found.append(row)
        return found


def measure(
    data: DemoData,
    recipes: Sequence[str],
    out: Path,
    *,
    seeds: int = 1,
    keep: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> TradeOff:
    """Runs the recipes that `out` does not hold yet, writing it after each, and returns all it holds then.

    A recipe is a name of RECIPES or of METHODS, and is run once for each of `seeds` calibration seeds. Perplexity is
    measured in bfloat16 arithmetic where the machine is faster in it, else in float32, for all alike. Raises
    SettingsError for an unknown recipe, ResultError when `out` is of another machine.
    """
    known = recipes_and_methods()
    if unknown := [name for name in recipes if name not in known]:
        raise SettingsError(f"no recipe {unknown[0]!r}; known: {', '.join(known)}")
    tokenizer = load_tokenizer(data.model)
    windows = {
        path.stem: token_windows(read_text(path), tokenizer, SEQLEN, str(path))[:WINDOWS]
        for path in (data.held_out, data.news)
    }
    result = _load(out, data, windows)
    load = round(os.getloadavg()[0], 2)  # later it is that of the recipe before
    for name, seed in ((DENSE, 0), *((name, seed) for name in recipes for seed in range(seeds))):
        if result.row(_seeded(name, seed)) is None:
            with watch() as seen:
                row = _run(data, name, seed, windows, keep, progress)
            assert seen.result
            conditions = judged(seen.result.model_copy(update={"load_before": load}))
            result.rows.append(row.model_copy(update={"conditions": conditions}))
            results.save(result, out)
    return result


def recipes_and_methods() -> dict[str, tuple[QualityName | None, dict[str, Any]]]:
    """RECIPES, and each method that prunes by itself."""
    return {name: (None, {"method": name}) for name in PRUNING_METHODS} | RECIPES


def _seeded(name: str, seed: int) -> str:
    return f"{name}, seed {seed}" if seed else name


def _load(out: Path, data: DemoData, windows: dict[str, torch.Tensor]) -> TradeOff:
    machine = this_machine()
    if not out.exists():
        tokens = {name: taken.numel() for name, taken in windows.items()}
        return TradeOff(machine=machine, model=data.model.name, tokens=tokens, rows=[])
    try:
        stored = results.read(out, TypeAdapter(TradeOff))
    except ResultError as error:
        raise ResultError(f"{error}; give another --out") from None
    if stored.machine.cpu != machine.cpu:
        raise ResultError(f"{out}: was measured on {stored.machine.cpu}, this is {machine.cpu}; give another --out")
    return stored


def _run(
    data: DemoData,
    recipe: str,
    seed: int,
    windows: dict[str, torch.Tensor],
    keep: Path | None,
    progress: ProgressCallback,
) -> Row:
    name = _seeded(recipe, seed)

    def staged(stage: str, done: float, total: float) -> None:
        progress(f"{name}: {stage}", done, total)

    if name == DENSE:
        return Row(
            recipe=name,
            settings=None,
            seconds={},
            validations=[],
            perplexity=_perplexities(data.model, windows, staged),
        )
    quality, given = recipes_and_methods()[recipe]
    settings = make_settings(quality, {"calibration": str(data.calibration), "seed": seed} | given)
    target: Target = "packed" if settings.values else "dense"
    with tempfile.TemporaryDirectory(dir=data.model.parent) as temporary:
        folder = (keep or Path(temporary)) / name.replace(" ", "")
        start = time.perf_counter()
        report = export(data.model, folder, settings, target=target, overwrite=True, progress=staged)
        elapsed = time.perf_counter() - start
        seconds = {stage: value for stage, value in report.seconds.items() if stage not in _NOT_PRUNING}
        seconds["other"] = max(0.0, elapsed - sum(report.seconds.values()))
        return Row(
            recipe=name,
            settings=report.settings,
            seconds=seconds,
            validations=report.distillation,
            perplexity=_perplexities(folder, windows, staged),
        )


def _perplexities(folder: Path, windows: dict[str, torch.Tensor], progress: ProgressCallback) -> dict[str, float]:
    model = load_whole_model(folder, dtype=torch.float32)
    with Compute(dtype=DTYPES[faster_type()]).autocast():
        return {
            name: perplexity(model, taken, stage=f"evaluate on {name}", progress=progress)
            for name, taken in windows.items()
        }
