"""What the sparse side loses: perplexity on a text, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from runtime_bench.results import SIDES, Quality
from swiftprune.calibration.text import load_tokenizer, token_windows
from swiftprune.calibration.text_files import read_text
from swiftprune.errors import SettingsError
from swiftprune.models import perplexity as evaluate
from swiftprune.models.load import load_whole_model
from swiftprune.progress import ProgressCallback, no_progress


def perplexity(
    sides: dict[str, Path],
    text: Path,
    *,
    seqlen: int = 2048,
    windows: int | None = None,
    dtype: str = "float32",
    progress: ProgressCallback = no_progress,
) -> Quality:
    """Of both sides on the UTF-8 `text`, in windows of `seqlen` tokens of the dense side's tokenizer.

    `windows` takes so many of them from all over the text. fp32 is also faster than bf16 on most CPUs. Raises
    TextError when the text is missing or shorter than a window.
    """
    taken = windows_of(text, sides["dense"], seqlen, windows)
    values = {
        side: evaluate.perplexity(load_model(sides[side], dtype), taken, stage=f"perplexity, {side}", progress=progress)
        for side in SIDES
    }
    return Quality(
        name="perplexity",
        source=f"{text.name}, windows of {seqlen} tokens, {dtype}",
        lower_is_better=True,
        tokens=taken.numel(),
        **values,
    )


def windows_of(text: Path, model: Path, seqlen: int, count: int | None = None) -> Tensor:
    """(W, seqlen) tokens of `text`, by the tokenizer of `model`: all windows, or `count` from all over the text."""
    taken = token_windows(read_text(text), load_tokenizer(model), seqlen, str(text))
    if count and count < len(taken):
        taken = taken[torch.linspace(0, len(taken) - 1, count).round().long()]
    return taken


def tasks(
    sides: dict[str, Path],
    names: Sequence[str],
    *,
    limit: int | None = None,
    include: Path | None = None,
    dtype: str = "bfloat16",
    progress: ProgressCallback = no_progress,
) -> list[Quality]:
    """lm-evaluation-harness `names` on both sides, through its Python API: a Quality for each task and metric.

    `include` is a folder with task definitions of one's own; `limit` evaluates only so many documents of each task.
    Raises SettingsError when the harness is not installed or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise SettingsError("--task needs lm-evaluation-harness: pip install 'swiftprune[evaluation]'") from None
    manager = TaskManager(include_path=str(include) if include else None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise SettingsError(f"lm-evaluation-harness has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    scores: dict[str, dict[str, dict[str, float]]] = {}
    better: dict[str, dict[str, bool]] = {}
    for index, side in enumerate(SIDES):
        progress("tasks", index, len(SIDES))
        model = HFLM(pretrained=load_model(sides[side], dtype), tokenizer=AutoTokenizer.from_pretrained(sides["dense"]))
        answer: Any = lm_eval.simple_evaluate(
            model=model, tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0
        )
        scores[side], better = answer["results"], answer["higher_is_better"]
    progress("tasks", len(SIDES), len(SIDES))
    return [
        Quality(
            name=f"{task} {key.partition(',')[0]}",
            source="lm-evaluation-harness",
            dense=value,
            sparse=scores["sparse"][task][key],
            lower_is_better=not better[task].get(key.partition(",")[0], True),
        )
        for task, metrics in scores["dense"].items()
        for key, value in metrics.items()
        if isinstance(value, float) and "stderr" not in key
    ]


def load_model(folder: Path, dtype: str) -> Any:
    """A model in transformers, packed or not."""
    return load_whole_model(folder, dtype=getattr(torch, dtype))
