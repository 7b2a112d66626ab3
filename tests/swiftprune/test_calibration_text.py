"""Calibration tokens from files, data sets and the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swiftprune.calibration import sampling
from swiftprune.calibration.data import CalibrationData, calibration_data
from swiftprune.calibration.text import CalibrationText, load_tokenizer
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.compute import Compute
from swiftprune.errors import TextError
from swiftprune.models.load import load_whole_model
from swiftprune.progress import no_progress
from tests import models


@pytest.fixture
def model(tiny_models: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint(tiny_models("llama-gqa-tied"))


def test_windows_of_a_text(model: Checkpoint, text_file: Path) -> None:
    tokens = calibration_data(str(text_file), model, samples=8, seqlen=32, seed=1, progress=no_progress).tokens
    ids = load_tokenizer(model.folder)(text_file.read_text()).input_ids
    windows = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    assert tokens.shape == (8, 32)
    drawn = [windows.index(row) for row in tokens.tolist()]
    assert len(set(drawn)) == 8
    again = calibration_data(str(text_file), model, samples=8, seqlen=32, seed=1, progress=no_progress).tokens
    other = calibration_data(str(text_file), model, samples=8, seqlen=32, seed=2, progress=no_progress).tokens
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)


def test_a_short_text_gives_what_it_has(model: Checkpoint, text_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = text_file.parent / "short.txt"
    short.write_text(text_file.read_text()[:1000])
    tokens = calibration_data(str(short), model, samples=1000, seqlen=32, seed=0, progress=no_progress).tokens
    assert 1 <= len(tokens) < 1000
    assert f"gives {len(tokens)} windows of 32 tokens, not the 1000 asked for" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"Two words.", "fewer than one window of 64"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_unusable_texts(content: bytes, message: str, model: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        calibration_data(str(path), model, samples=1, seqlen=64, seed=0, progress=no_progress)


def test_a_data_set(model: Checkpoint, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    paragraphs = [{"text": line} for line in text_file.read_text().split(". ")]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, paragraphs)))
    tokens = calibration_data(str(tmp_path / "set"), model, samples=4, seqlen=64, seed=0, progress=no_progress).tokens
    assert tokens.shape == (4, 64)
    (tmp_path / "set" / "train.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(TextError, match="no column `text`"):
        calibration_data(str(tmp_path / "set"), model, samples=4, seqlen=64, seed=0, progress=no_progress)


def test_a_source_that_does_not_exist(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match="no such file, nor a readable data set"):
        calibration_data("./missing.txt", model, samples=1, seqlen=8, seed=0, progress=no_progress)


def test_the_model_samples_its_own(model: Checkpoint) -> None:
    steps: list[float] = []

    def sample(seed: int) -> CalibrationData:
        def note(stage: str, done: float, total: float) -> None:
            steps.append(done / total)

        return calibration_data("self", model, samples=40, seqlen=24, seed=seed, progress=note)

    data = sample(3)
    assert steps == sorted(steps)
    assert steps[-1] == 1
    assert data.tokens.shape == (40, 24)
    assert data.held_back.shape == (5, 24)
    rows = torch.cat([data.tokens, data.held_back])
    assert (rows[:, 0] == 0).all()  # the start token
    assert len({tuple(row) for row in rows.tolist()}) == 45
    assert torch.equal(data.tokens, sample(3).tokens)
    assert not torch.equal(data.tokens, sample(4).tokens)


def test_samples_follow_the_models_own_distribution(tiny_models: Callable[[str], Path]) -> None:
    """Of every second token, over many sequences: how often it came against the probability that the model gives it."""
    for name in ("llama-gqa-tied", "gpt-neox"):  # heads that share keys and values, and heads that do not
        checkpoint = Checkpoint(tiny_models(name))
        tokens = calibration_data("self", checkpoint, samples=2000, seqlen=3, seed=0, progress=no_progress).tokens
        logits = load_whole_model(checkpoint.folder, checkpoint.parameter_count)(tokens[:, :2]).logits.detach().float()
        for position in (0, 1):
            expected = logits[:, position].softmax(-1).sum(0)
            seen = torch.bincount(tokens[:, position + 1], minlength=len(expected))
            # 5 standard deviations of a count, which none of some hundreds of tokens should exceed
            assert ((seen - expected).abs() < 5 * (expected + 1).sqrt()).all()


def test_cached_attention_gives_what_the_model_gives_without_a_cache(tiny_models: Callable[[str], Path]) -> None:
    """Drawn at a temperature near zero, samples are the greedy answer of a model that keeps nothing."""
    for name in ("llama-gqa-tied", "gpt-neox", "mistral-sliding"):
        checkpoint = Checkpoint(tiny_models(name))
        plain = load_whole_model(checkpoint.folder, checkpoint.parameter_count)
        start = torch.tensor([[7]])
        greedy = start
        for _ in range(20):
            greedy = torch.cat([greedy, plain(greedy, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        model = sampling._load(checkpoint, Compute())
        assert torch.equal(sampling._sample(model, start[0], 1, 21, 0, 1e-6, "", no_progress), greedy)


@pytest.mark.parametrize(("seqlen", "other"), [(64, 64), (64, 48), (32, 100)])
def test_what_is_held_back_is_in_no_other_window(seqlen: int, other: int, model: Checkpoint, tmp_path: Path) -> None:
    words = " ".join(f"{a}{b}" for a in models.TEXT.split()[:60] for b in range(100))
    path = tmp_path / "long.txt"
    path.write_text(words)
    text = CalibrationText(str(path), model, seqlen=seqlen, needed=4)
    ids = load_tokenizer(model.folder)(words).input_ids
    starts = {tuple(ids[i : i + seqlen]): i for i in range(0, len(ids) - seqlen + 1, seqlen)}
    held = [starts[tuple(row)] for row in text.held_back.tolist()]
    assert len(held) == 8
    assert held[1] - held[0] > 2 * seqlen  # not side by side
    apart = held[1] - held[0]
    assert held == [index * apart for index in range(8)]
    everywhere = {tuple(ids[i : i + other]): i for i in range(0, len(ids) - other + 1, other)}
    used = {everywhere[tuple(row)] for row in text.windows(other, 0).tolist()}
    # Nothing from the first of them to as far beyond the last as they are apart, nor what follows for validation.
    unseen = text.unseen(other)
    assert torch.equal(unseen.flatten(), torch.tensor(ids)[8 * apart :][: unseen.numel()])
    assert len(ids) // 16 - other < unseen.numel() <= len(ids) // 16
    assert used == {begin for begin in everywhere.values() if begin >= 8 * apart + len(ids) // 16}
