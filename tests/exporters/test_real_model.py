"""SmolLM2-135M-Instruct, real weights and real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters import export
from runtime_bench import demo_data
from swiftprune.calibration.text import load_tokenizer, token_windows
from swiftprune.calibration.text_files import read_text
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.kernels.native import NativeKernels, supported_isas
from swiftprune.kernels.reference import ReferenceKernels
from swiftprune.kernels.score_factors import ScoreFactors
from swiftprune.models.perplexity import perplexity

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def data() -> demo_data.DemoData:
    """Shared with `make demo`; downloaded once."""
    return demo_data.fetch(ROOT / "build" / "demo")


@pytest.fixture(scope="module")
def windows(data: demo_data.DemoData) -> torch.Tensor:
    return token_windows(read_text(data.held_out), load_tokenizer(data.model), 2048, "held out")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_texts_are_prose_and_apart(data: demo_data.DemoData, windows: torch.Tensor) -> None:
    calibration, held_out = data.calibration.read_text(), data.held_out.read_text()
    assert len(calibration) > 1_000_000
    assert len(windows) >= 15
    for text in (calibration, held_out):
        assert not any(markup in text for markup in ("[[", "{{", "<ref", "'''", "{|"))
    paragraphs = {line for line in held_out.split("\n") if len(line) > 100}
    assert len(paragraphs) > 100
    assert not paragraphs & set(calibration.split("\n"))


def test_dense_perplexity_is_what_this_model_has(data: demo_data.DemoData, windows: torch.Tensor) -> None:
    assert 15 < perplexity(load(data.model), windows[::16]) < 24  # about 19 on all windows


def test_packed_equals_masked_dense_and_calibration_pays(
    data: demo_data.DemoData, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PruneSettings(method="swiftprune", calibration=str(data.calibration), samples=4, seqlen=256)
    report = export(data.model, tmp_path / "packed", settings)
    export(data.model, tmp_path / "dense", settings, target="dense")
    assert report.linear_bytes_before / report.linear_bytes_after == pytest.approx(16 / 9)
    assert len(report.layers) == 210

    packed, dense = load(tmp_path / "packed"), load(tmp_path / "dense")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "packed")("The capital of France is", return_tensors="pt")
    tokens = [
        model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0).tolist()
        for model in (packed, dense)
    ]
    assert tokens[0] == tokens[1]
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")
    unpacked = load(tmp_path / "packed")
    with torch.no_grad():
        logits = dense(windows[:1, :128]).logits
        assert torch.equal(unpacked(windows[:1, :128]).logits, logits)
        torch.testing.assert_close(packed(windows[:1, :128]).logits, logits, rtol=1e-3, atol=1e-3)

    export(data.model, tmp_path / "data-free", PruneSettings(calibration="none"), target="dense")
    few = windows[:1]
    assert 30 < perplexity(packed, few) < 0.5 * perplexity(load(tmp_path / "data-free"), few)


def test_exact_ties_of_real_weights_fall_alike_everywhere(data: demo_data.DemoData) -> None:
    name = "model.layers.7.mlp.up_proj.weight"
    weight = Checkpoint(data.model).read([name])[name]
    ordered = weight.abs().view(-1, 4).sort(dim=-1).values
    assert (ordered[:, 1] == ordered[:, 2]).float().mean() > 0.01  # Q4_1: the second and third often tie
    factors = ScoreFactors.of_magnitude(weight.shape[1])
    expected = ReferenceKernels().prune_pack(weight, factors, name)
    for isa in supported_isas():
        for got, want in zip(NativeKernels(isa).prune_pack(weight, factors, name), expected, strict=True):
            assert torch.equal(got, want)
