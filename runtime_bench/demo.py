"""The demo: one command from nothing to a pruned, packed and compared model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import swiftprune.serve.transformers  # noqa: F401 - registers the packed format
from exporters import ExportReport, export
from exporters.cli import print_report
from runtime_bench import demo_data
from runtime_bench.trade_off import RECIPES
from swiftprune.pruning.pipeline import PruneSettings
from swiftprune.pruning.progress import Progress, silent
from swiftprune.pruning.whole_model import load_whole_model

PROMPTS = ["The capital of France is", "Water boils when", "In the year 1969, astronauts"]
NEW_TOKENS = 24


class DemoResult(BaseModel):
    model: Path
    report: ExportReport
    texts: list[tuple[str, str, str]]
    """Prompt, continuation by the dense model, continuation by the pruned one; greedy."""


def run(folder: Path, method: str, progress: Progress = silent) -> DemoResult:
    data = demo_data.fetch(folder, progress)
    out = folder / f"{demo_data.MODEL_NAME}-2of4-{method}"
    _, less_text = RECIPES["admm, less text"]  # nearly all of ADMM's quality, in half of the time
    settings = PruneSettings(**less_text | {"method": method, "calibration": str(data.calibration)})
    report = export(data.model, out, settings, evaluate=data.held_out, overwrite=True, progress=progress)
    before, after = _continue(data.model), _continue(out)
    (folder / "report.json").write_text(json.dumps(report.model_dump(), indent=1) + "\n")
    return DemoResult(model=data.model, report=report, texts=list(zip(PROMPTS, before, after, strict=True)))


def _continue(folder: Path) -> list[str]:
    model = load_whole_model(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def show(result: DemoResult, console: Console) -> None:
    print_report(result.report, console)
    table = Table(title="greedy continuations", title_justify="left", show_lines=True)
    for heading in ("prompt", "dense", "pruned"):
        table.add_column(heading)
    for row in result.texts:
        table.add_row(*row)
    console.print(table)
    console.print(
        f"Ten minutes, some of them training, give better text:\n  swiftprune-export {result.model} "
        f"--quality balanced --calibration {result.report.settings.calibration}", soft_wrap=True,
    )  # fmt: skip
