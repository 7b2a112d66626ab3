"""Benchmarks: that they measure what they say and report all of it. No test asserts a time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from runtime_bench import cli, demo_data, layers, plots, pruning, result_files, synthetic
from runtime_bench.demo_data import DemoData
from runtime_bench.machine import this_machine
from runtime_bench.measure import Timing, interleaved
from swiftprune.calibration.text import load_tokenizer, token_windows
from swiftprune.calibration.text_files import read_text
from swiftprune.formats.spec import QUANT_METHOD
from swiftprune.kernels import native
from swiftprune.models.perplexity import perplexity
from swiftprune.progress import ProgressCallback
from tests import models


@pytest.fixture
def tiny_data(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DemoData:
    """The tiny Llama and text in the place of the demo model."""
    data = DemoData(tmp_path)
    shutil.copytree(tiny_models("llama-gqa-tied"), data.model)
    data.calibration.write_text(read_text(text_file))
    data.held_out.write_text(read_text(text_file)[:6000])
    return data


def test_several_who_want_the_demo_data_get_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def slowly(path: Path) -> Path:
        time.sleep(0.2)
        path.write_text("whole")
        written.append(path.name)
        return path

    def download(wheel: str, member: str, destination: Path) -> Path:
        return slowly(destination)

    def write_model(folder: Path, temporary: Path, progress: ProgressCallback) -> None:
        (temporary / "model").mkdir()
        slowly(temporary / "model" / "config.json")
        (temporary / "model").rename(folder)

    def write_texts(data: DemoData, temporary: Path, progress: ProgressCallback) -> None:
        slowly(data.calibration)
        slowly(data.held_out)

    monkeypatch.setattr(demo_data, "_member", download)
    monkeypatch.setattr(demo_data, "_write_model", write_model)
    monkeypatch.setattr(demo_data, "_write_texts", write_texts)
    with ThreadPoolExecutor(3) as pool:
        for data in pool.map(demo_data.fetch, [tmp_path] * 3):
            assert data.news.read_text() == (data.model / "config.json").read_text() == "whole"
    assert sorted(written) == ["config.json", "news", "wikipedia-calibration.txt", "wikipedia-held-out.txt"]
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", *(p.name for p in vars(data).values())}

    (tmp_path / ".lock").unlink()
    demo_data.fetch(tmp_path)
    assert not (tmp_path / ".lock").exists()  # a complete folder may be one that cannot be written to


def test_demo_shows_what_was_gained_and_lost(tiny_data: DemoData) -> None:
    tiny_data.news.write_text("not read")
    tiny_data.held_out.write_text(tiny_data.calibration.read_text()[:20_000])
    folder = tiny_data.model.parent
    run = CliRunner().invoke(cli.app, ["demo", "--folder", str(folder), "--method", "wanda"])
    assert run.exit_code == 0, run.output
    (out,) = folder.glob("*-2of4-wanda")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == QUANT_METHOD
    assert json.loads((folder / "report.json").read_text())["perplexity_after"] > 1
    for said in (
        "2:4 by wanda",
        "fewer bytes",
        "tokens a second",
        "packed 2:4",
        "x dense",
        "greedy continuations",
        "Water boils",
        "--quality balanced",
    ):
        assert said in run.output
    typo = CliRunner().invoke(cli.app, ["demo", "--folder", str(folder), "--method", "wnada"])
    assert "unknown method 'wnada'" in str(typo.exception)


def test_contestants_take_turns() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert [len(timing.seconds) for timing in times.values()] == [3, 3]


def test_timing_statistics() -> None:
    timing = Timing(seconds=[4.0, 1.0, 2.0, 3.0, 100.0])
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4 - 2) / 2 / 3)
    assert [timing.quantile(share) for share in (0, 0.1, 0.25, 1)] == pytest.approx([1, 1.4, 2, 100])


def test_ratio_is_slow_over_fast() -> None:
    row = pruning.Comparison(
        name="x",
        shape=None,
        slow_name="s",
        slow=Timing(seconds=[6.0]),
        fast_name="f",
        fast=Timing(seconds=[2.0]),
        target=5,
    )
    assert row.ratio == 3.0


def test_machine_facts() -> None:
    machine = this_machine()
    assert machine.packages["torch"] == torch.__version__
    assert machine.threads == torch.get_num_threads()
    assert "generic" in machine.isas


def test_perplexity_against_transformers_own_loss(tiny_data: DemoData) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_data.model, dtype=torch.float32).eval()
    windows = token_windows(read_text(tiny_data.held_out), load_tokenizer(tiny_data.model), 128, "text")[:3]
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    assert perplexity(model, windows) == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


def test_bench_commands_write_json(tiny_data: DemoData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pruning, "SHAPE", (64, 128))
    monkeypatch.setattr(pruning, "ROUNDS", 4)
    out = tmp_path / "results" / "prune.json"
    run = CliRunner().invoke(cli.app, ["prune", "--folder", str(tmp_path), "--out", str(out)])
    assert run.exit_code == 0, run.output
    result = pruning.PruningBench.model_validate_json(out.read_text())
    assert [row.target for row in result.comparisons] == [0.25, 0.25, 0.25, 5, 5, 12.29]
    assert result.comparisons[-1].slow_name == "sparsegpt"
    assert "memcpy" in run.output


def test_synthetic_checkpoints_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = models.SUPPORTED["llama-gqa-tied"].__class__(
        **models.SUPPORTED["llama-gqa-tied"].to_dict() | {"vocab_size": 1000}
    )
    monkeypatch.setitem(synthetic.SHAPES, "tiny", config)
    monkeypatch.setattr(synthetic, "_POOL", 1000)  # smaller than the tensors: the pool is walked round and round
    folder = synthetic.write("tiny", tmp_path / "model", shard_bytes=50_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert "lm_head.weight" not in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert float(model.get_submodule("model.layers.1.mlp.up_proj").weight.float().std()) == pytest.approx(0.02, rel=0.1)
    other = synthetic.write("tiny", tmp_path / "again", shard_bytes=50_000)
    assert all((other / path.name).read_bytes() == path.read_bytes() for path in folder.glob("*.safetensors"))


def call_time(milliseconds: float) -> layers.CallTime:
    return layers.CallTime(p20_ms=milliseconds, median_ms=2 * milliseconds, spread=0.1, rounds=5)


def test_layers_are_compared_with_the_better_dense_kernel() -> None:
    cell = layers.Cell(
        rows=100,
        cols=1000,
        dtype="bf16",
        tokens=1,
        threads=1,
        backend="generic",
        sparse=call_time(0.5),
        dense={"slow": call_time(3), "good": call_time(1)},
        packed_bytes=112_500,
        read_gb_per_s=0.5,
    )
    assert (cell.better_dense, cell.speedup, cell.median_speedup) == ("good", 2, 2)
    assert cell.packed_gb_per_s == pytest.approx(0.225)
    assert cell.dense_gb_per_s == pytest.approx(0.2)
    assert cell.bandwidth_share == pytest.approx(0.45)
    assert layers.BYTE_BOUND["bf16"] == pytest.approx(200_000 / 112_500)


def test_a_turn_takes_the_next_copies() -> None:
    copies = [torch.tensor(float(index)) for index in range(3)]
    seen: list[float] = []

    def run(weight: torch.Tensor) -> torch.Tensor:
        seen.append(float(weight))
        return weight

    turn = layers._turn(run, copies, 2)
    assert [float(turn()) for _ in range(3)] == [1, 0, 2]
    assert seen == [0, 1, 2, 0, 1, 2]


@pytest.fixture
def small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(layers, "TURN_BYTES", 1 << 14)
    monkeypatch.setattr(layers, "SHAPES", {"tiny": [(16, 64), (24, 132)]})


@pytest.mark.usefixtures("small_sweep")
def test_layer_sweep(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out, plot = tmp_path / "layers.json", tmp_path / "plots" / "layers.png"
    command = ["layers", "--m", "1,9", "--threads", "1,2", "--dtype", "bf16,fp32", "--seconds", "0"]
    run = CliRunner().invoke(cli.app, [*command, "--out", str(out), "--plot", str(plot)])
    assert run.exit_code == 0, run.output
    assert torch.get_num_threads() == threads
    bench = result_files.load(out)
    assert len(bench.cells) == 2 * 2 * 2 * 2
    assert run.stdout.count("\n| ") >= 16
    assert all("reference" not in cell.backend and "torch F.linear" in cell.dense for cell in bench.cells)
    assert bench.cells[-1].packed_bytes == 3 * 3 * 1088
    assert bench.overhead.linear24_us > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_sweep")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-9"], "unknown: 'llama-9'; known: tiny"),
        (["--m", "1,x"], "--m takes positive numbers"),
        (["--threads", "0"], "--threads takes positive numbers"),
        (["--dtype", "int3"], "known: bf16, fp16, fp32"),
        (["--backend", "reference"], "'reference' multiplies dense weights and is not worth measuring"),
        (["--backend", "sse9"], "unknown backend 'sse9'"),
    ],
)
def test_the_layer_sweep_answers_mistakes(arguments: list[str], message: str) -> None:
    run = CliRunner().invoke(cli.app, ["layers", *arguments])
    assert run.exit_code != 0
    assert message in str(run.exception)


@pytest.mark.usefixtures("small_sweep")
def test_a_wrong_product_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "linear24", lambda isa, x, tiled, bias, rows: x.new_zeros(len(x), rows))
    with pytest.raises(RuntimeError, match="sparse computes something else"):
        layers.measure([(16, 64)], tokens=[1], threads=[1], seconds=0)


def test_layers_plot_has_a_panel_for_each_dtype_and_thread_count(tmp_path: Path) -> None:
    cells = [
        layers.Cell(
            rows=64,
            cols=64,
            dtype=dtype,
            tokens=m,
            threads=threads,
            backend="generic",
            sparse=call_time(1),
            dense={"d": call_time(2)},
            packed_bytes=1,
            read_gb_per_s=1,
        )
        for dtype in ("bf16", "fp32")
        for threads in (1, 2, 4)
        for m in (1, 8)
    ]
    overhead = layers.CallOverhead(linear24_us=1, operator_us=1, nn_linear_us=1)
    bench = layers.LayersResult(
        machine=this_machine(), shares_torch_threads=True, rotated_mb=1, overhead=overhead, cells=cells
    )
    plots.layers(bench, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    text = layers.markdown(bench)
    assert text.count("| 2.00x | 2.00x | 1.") == 12
    assert text.count("| 64x64 | 2.00x | 2.00x | 0% |") == 6
    assert "| fp32, 4 threads | M=1 | M=8 | bandwidth, M=1 |" in text
