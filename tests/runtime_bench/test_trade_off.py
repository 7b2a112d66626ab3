"""The trade-off benchmark on a tiny model: what it holds, continues and draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime_bench import plots, report, results, trade_off
from runtime_bench.demo_data import DemoData
from runtime_bench.trade_off import measure
from swiftprune.calibration.text import load_tokenizer, token_windows
from swiftprune.errors import ResultError, SettingsError
from swiftprune.models.perplexity import perplexity
from tests import models
from tests.runtime_bench.sample_results import layers_result, trade_off_result


@pytest.fixture
def data(tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoData:
    monkeypatch.setattr(trade_off, "SEQLEN", 64)
    monkeypatch.setattr(trade_off, "WINDOWS", 3)
    monkeypatch.setattr(
        trade_off,
        "RECIPES",
        {
            "wanda": (None, {"method": "wanda", "samples": 2, "seqlen": 32}),
            "int4": (None, {"method": "wanda", "samples": 2, "seqlen": 32, "values": "int4"}),
            "balanced": ("balanced", {"steps": 2, "samples": 2, "seqlen": 32, "compute": "float32"}),
        },
    )
    data = DemoData(tmp_path / "demo")
    shutil.copytree(tiny_models("llama-gqa-tied"), data.model)
    for path in (data.calibration, data.held_out, data.news):
        path.write_text(models.TEXT)
    return data


def test_recipes_are_measured_once_and_drawn(data: DemoData, tmp_path: Path) -> None:
    out, keep = tmp_path / "result.json", tmp_path / "kept"
    first = measure(data, ["wanda"], out, keep=keep)
    assert [row.recipe for row in first.rows] == ["dense", "wanda"]
    both = measure(data, ["wanda", "balanced"], out, keep=keep)
    assert both.rows[:2] == first.rows
    trained = both.row("balanced")
    assert trained is not None
    assert [point.step for point in trained.validations] == [0, 2]
    assert {"calibrate", "mask", "distill"} <= trained.seconds.keys()
    assert not {"write", "output error", "calibration text"} & trained.seconds.keys()
    assert trained.minutes == pytest.approx(sum(trained.seconds.values()) / 60)

    windows = token_windows(models.TEXT, load_tokenizer(data.model), 64, "text")[:3]
    for name, folder in (("dense", data.model), ("wanda", keep / "wanda")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        row = both.row(name)
        assert row is not None
        assert row.perplexity["news"] == pytest.approx(perplexity(model, windows), rel=0.02)  # in either arithmetic
    lines = report.markdown([both]).splitlines()
    assert lines[2].startswith("| dense | 0.0 |")
    assert lines[2].endswith(" 1.00 |")
    plots.trade_off(both, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_any_method_with_several_seeds_and_quantized_recipes(data: DemoData, tmp_path: Path) -> None:
    result = measure(data, ["magnitude", "wanda", "int4"], tmp_path / "result.json", seeds=2)
    rows = {row.recipe: row for row in result.rows}
    assert list(rows) == [
        "dense",
        *(f"{name}{seed}" for name in ("magnitude", "wanda", "int4") for seed in ("", ", seed 1")),
    ]
    assert rows["magnitude"].perplexity == rows["magnitude, seed 1"].perplexity  # no calibration, no seed
    assert rows["wanda"].perplexity != rows["wanda, seed 1"].perplexity
    assert rows["int4"].perplexity != rows["wanda"].perplexity


def test_what_cannot_be_measured_together_is_refused(data: DemoData, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    with pytest.raises(SettingsError, match=r"no recipe 'wnada'; known: .*, wanda, .*, balanced"):
        measure(data, ["wnada"], out)
    results.save(layers_result(), out)
    with pytest.raises(ResultError, match=r"kind: Input should be 'trade-off' .*; give another --out"):
        measure(data, ["wanda"], out)
    out.unlink()
    measure(data, [], out)
    stored = json.loads(out.read_text())
    stored["machine"]["cpu"] = "another"
    out.write_text(json.dumps(stored))
    with pytest.raises(ResultError, match="was measured on another"):
        measure(data, ["wanda"], out)


def test_the_front_is_what_no_faster_recipe_is_as_good_as() -> None:
    found = trade_off_result()
    assert [row.recipe for row in found.pruned] == ["fast", "wanda", "sparsegpt", "admm", "best"]
    assert [row.recipe for row in found.front("wikipedia")] == ["fast", "admm", "best"]
    assert [row.recipe for row in found.front("news")] == ["fast", "wanda", "sparsegpt", "admm", "best"]
    best = found.row("best")
    assert best is not None
    assert found.ratio(best, "wikipedia") == 1.5
