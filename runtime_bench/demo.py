"""The demo: one command from nothing to a pruned, packed and compared model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from exporters import ExportReport, export
from exporters.cli import print_report
from runtime_bench import conditions, demo_data, onednn
from runtime_bench.engines import Options, transformers_engine
from runtime_bench.measure import interleaved
from runtime_bench.trade_off import RECIPES
from swiftprune.compute import ComputeName, faster_type
from swiftprune.config import PruneSettings
from swiftprune.models.load import load_whole_model
from swiftprune.progress import ProgressCallback, no_progress

PROMPTS = ["The capital of France is", "Water boils when", "In the year 1969, astronauts"]
NEW_TOKENS = 24
# Of the held-out text: four windows, so that measuring does not take longer than pruning.
_HELD_OUT_CHARACTERS = 40_000
# Speed: rounds in which each side generates once, so many tokens for a prompt of so many.
_ROUNDS, _PROMPT_TOKENS, _TIMED_TOKENS = 5, 32, 32
DENSE, PREPACKED, PACKED = "dense", "dense, prepacked by oneDNN", "packed 2:4"


class DemoResult(BaseModel):
    model: Path
    report: ExportReport
    dtype: str
    """In which all sides of `tokens_per_second` compute."""
    tokens_per_second: dict[str, list[float]]
    """One sequence at a time in transformers, prompt included: by side, one figure a round, all sides in turn."""
    texts: list[tuple[str, str, str]]
    """Prompt, continuation by the dense model, continuation by the pruned one; greedy."""
    warnings: list[str]
    """Why the tokens per second deserve less trust."""


def run(folder: Path, method: str, progress: ProgressCallback = no_progress) -> DemoResult:
    data = demo_data.fetch(folder, progress)
    out = folder / f"{demo_data.MODEL_NAME}-2of4-{method}"
    held_out = folder / "held-out-beginning.txt"
    held_out.write_text(data.held_out.read_text()[:_HELD_OUT_CHARACTERS])
    _, less_text = RECIPES["admm, less text"]  # nearly all of ADMM's quality, in half of the time
    settings = PruneSettings(**less_text | {"method": method, "calibration": str(data.calibration)})
    report = export(data.model, out, settings, evaluate=held_out, overwrite=True, progress=progress)
    dtype = faster_type()
    with conditions.watch() as seen:
        speed = _speed(data.model, out, dtype, progress)
    assert seen.result
    before, after = _continue(data.model), _continue(out)
    (folder / "report.json").write_text(json.dumps(report.model_dump(), indent=1) + "\n")
    return DemoResult(
        model=data.model,
        report=report,
        dtype=dtype,
        tokens_per_second=speed,
        texts=list(zip(PROMPTS, before, after, strict=True)),
        warnings=conditions.judged(seen.result).warnings,
    )


def _speed(model: Path, packed: Path, dtype: ComputeName, progress: ProgressCallback) -> dict[str, list[float]]:
    options = Options(dtype=dtype, threads=torch.get_num_threads())
    sides = {DENSE: transformers_engine.load(model, options), PACKED: transformers_engine.load(packed, options)}
    if onednn.takes(getattr(torch, dtype)):
        sides[PREPACKED] = transformers_engine.load(model, dataclasses.replace(options, dense_linears="onednn"))
    prompt = [list(range(100, 100 + _PROMPT_TOKENS))]
    progress("time tokens", 0, 1)
    generate = {name: partial(side.generate, prompt, _TIMED_TOKENS, lambda: None) for name, side in sides.items()}
    times = interleaved(generate, rounds=_ROUNDS)
    progress("time tokens", 1, 1)
    return {name: [_TIMED_TOKENS / seconds for seconds in timing.seconds] for name, timing in times.items()}


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
    speed = Table(title=f"tokens a second, one sequence at a time, {result.dtype}", title_justify="left")
    for heading in ("", "median", "range", "x dense"):
        speed.add_column(heading, justify="right" if heading else "left")
    median = {name: statistics.median(found) for name, found in result.tokens_per_second.items()}
    for name, found in result.tokens_per_second.items():
        times = median[name] / median[DENSE]
        speed.add_row(name, f"{median[name]:.1f}", f"{min(found):.1f}-{max(found):.1f}", f"{times:.2f}")
    console.print(speed)
    for warning in result.warnings:
        console.print(f"[yellow]these figures are of a busy machine:[/] {warning}", highlight=False)
    table = Table(title="greedy continuations", title_justify="left", show_lines=True)
    for heading in ("prompt", "dense", "pruned"):
        table.add_column(heading)
    for row in result.texts:
        table.add_row(*row)
    console.print(table)
    console.print(_verdict(result.report, median), highlight=False)
    console.print(
        f"To save time the demo calibrated on {result.report.settings.samples} sequences of text; swiftprune-export "
        f"takes {PruneSettings().samples} and loses less.",
        highlight=False,
    )
    console.print(
        f"Ten minutes, some of them training, give better text:\n  {_command('swiftprune-export')} {result.model} "
        f"--quality balanced --calibration {result.report.settings.calibration}",
        soft_wrap=True,
    )


def _verdict(report: ExportReport, speed: Mapping[str, float]) -> str:
    """Smaller, faster, worse, in a sentence; `speed` is the median of each side."""
    best = f" and {speed[PACKED] / speed[PREPACKED]:.2f} times as fast as {PREPACKED}" if PREPACKED in speed else ""
    return (
        f"In all: {report.bytes_before / report.bytes_after:.2f} times smaller, "
        f"{speed[PACKED] / speed[DENSE]:.2f} times as fast as dense{best}, with {report.perplexity_ratio:.2f} times "
        "its perplexity on other articles than it was calibrated on. A model of 135 million parameters writes like "
        "this; larger ones lose less."
    )


def _command(name: str) -> str:
    """How to call a command of ours from here: by its name, or by its path where no environment is active."""
    beside = Path(sys.executable).with_name(name)
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)
