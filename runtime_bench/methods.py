"""The quality table: held-out perplexity and seconds of each pruning method on the demo model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from runtime_bench.demo_data import DemoData
from runtime_bench.machine import Machine, this_machine
from swiftprune.calibration.text import load_tokenizer, token_windows
from swiftprune.calibration.text_files import read_text
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.formats.spec import Packed24
from swiftprune.kernels import packing
from swiftprune.models.load import load_whole_model
from swiftprune.models.perplexity import perplexity
from swiftprune.progress import ProgressCallback, no_progress
from swiftprune.stages.context import Run
from swiftprune.stages.run import stream_blocks

SEQLEN = 2048


class MethodResult(BaseModel):
    method: str
    seed: int
    perplexity: float
    mask_seconds: float
    calibrate_seconds: float
    """Forwards of dense and pruned blocks, with the statistics the method needs."""


class MethodTable(BaseModel):
    machine: Machine
    model: str
    pattern: str
    samples: int
    seqlen: int
    tokens_evaluated: int
    dense_perplexity: float
    rows: list[MethodResult]


def compare(
    data: DemoData,
    methods: list[str],
    seeds: list[int],
    *,
    samples: int,
    seqlen: int,
    pattern: str = "2:4",
    progress: ProgressCallback = no_progress,
) -> MethodTable:
    """Prunes the demo model with each method and seed and evaluates it on the held-out text, in fp32."""
    checkpoint = Checkpoint.open(data.model)
    windows = token_windows(read_text(data.held_out), load_tokenizer(data.model), SEQLEN, str(data.held_out))
    model = load_whole_model(data.model, dtype=torch.float32)
    dense = perplexity(model, windows, stage="dense: evaluate", progress=progress)
    rows = []
    for method in methods:
        for seed in seeds:
            rows.append(
                _run(checkpoint, model, windows, data.calibration, method, seed, samples, seqlen, pattern, progress)
            )
    return MethodTable(
        machine=this_machine(),
        model=data.model.name,
        pattern=pattern,
        samples=samples,
        seqlen=seqlen,
        tokens_evaluated=windows.numel(),
        dense_perplexity=dense,
        rows=rows,
    )


def _run(
    checkpoint: Checkpoint,
    model: Any,
    windows: torch.Tensor,
    calibration: Path,
    method: str,
    seed: int,
    samples: int,
    seqlen: int,
    pattern: str,
    progress: ProgressCallback,
) -> MethodResult:
    def staged(stage: str, done: float, total: float) -> None:
        progress(f"{method}: {stage}", done, total)

    settings = PruneSettings(
        method=method, calibration=str(calibration), samples=samples, seqlen=seqlen, seed=seed, pattern=pattern
    )
    run = Run(checkpoint, settings, progress=staged)
    parameters = dict(model.named_parameters())
    dense = {}
    for done in stream_blocks(run):
        for name, weight in done.weights.items():
            dense[name] = parameters[name].detach().clone()
            parameters[name].data.copy_(packing.unpack(weight) if isinstance(weight, Packed24) else weight)
    value = perplexity(model, windows, stage="evaluate", progress=staged)
    for name, weight in dense.items():
        parameters[name].data.copy_(weight)
    seconds = run.clock.seconds
    return MethodResult(
        method=method, seed=seed, perplexity=value, mask_seconds=seconds["mask"], calibrate_seconds=seconds["calibrate"]
    )


def markdown(table: MethodTable) -> str:
    """The table as it stands in the README: a row a method, the mean over seeds and their range."""
    lines = [
        f"| method | held-out perplexity at {table.pattern} | mask seconds | calibration seconds |",
        "| --- | ---: | ---: | ---: |",
        f"| dense | {table.dense_perplexity:.1f} | | |",
    ]
    for method in dict.fromkeys(row.method for row in table.rows):
        rows = [row for row in table.rows if row.method == method]
        values = sorted(row.perplexity for row in rows)
        spread = f" ({values[0]:.0f} to {values[-1]:.0f})" if len(rows) > 1 else ""
        lines.append(
            f"| {method} | {sum(values) / len(values):.0f}{spread} | {_mean([r.mask_seconds for r in rows]):.2f} "
            f"| {_mean([r.calibrate_seconds for r in rows]):.1f} |"
        )
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
