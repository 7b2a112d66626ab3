"""Calibration tokens from files, data sets and the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swiftprune.errors import TextError
from swiftprune.pruning.calibration_text import calibration_tokens, load_tokenizer
from swiftprune.pruning.checkpoint import Checkpoint
from swiftprune.pruning.progress import silent


@pytest.fixture
def model(tiny_models: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint(tiny_models("llama-gqa-tied"))


def test_windows_of_a_text(model: Checkpoint, text_file: Path) -> None:
    tokens = calibration_tokens(str(text_file), model, samples=8, seqlen=32, seed=1, progress=silent)
    ids = load_tokenizer(model.folder)(text_file.read_text()).input_ids
    windows = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    assert tokens.shape == (8, 32)
    drawn = [windows.index(row) for row in tokens.tolist()]
    assert len(set(drawn)) == 8
    again = calibration_tokens(str(text_file), model, samples=8, seqlen=32, seed=1, progress=silent)
    other = calibration_tokens(str(text_file), model, samples=8, seqlen=32, seed=2, progress=silent)
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)


def test_a_short_text_gives_what_it_has(model: Checkpoint, text_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = text_file.parent / "short.txt"
    short.write_text(text_file.read_text()[:1000])
    tokens = calibration_tokens(str(short), model, samples=1000, seqlen=32, seed=0, progress=silent)
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
        calibration_tokens(str(path), model, samples=1, seqlen=64, seed=0, progress=silent)


def test_a_data_set(model: Checkpoint, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    paragraphs = [{"text": line} for line in text_file.read_text().split(". ")]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, paragraphs)))
    tokens = calibration_tokens(str(tmp_path / "set"), model, samples=4, seqlen=64, seed=0, progress=silent)
    assert tokens.shape == (4, 64)
    (tmp_path / "set" / "train.jsonl").write_text('{"content": "x"}\n')
    with pytest.raises(TextError, match="no column `text`"):
        calibration_tokens(str(tmp_path / "set"), model, samples=4, seqlen=64, seed=0, progress=silent)


def test_a_source_that_does_not_exist(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match="no such file, nor a readable data set"):
        calibration_tokens("./missing.txt", model, samples=1, seqlen=8, seed=0, progress=silent)


def test_the_model_samples_its_own(model: Checkpoint) -> None:
    steps: list[float] = []
    tokens = calibration_tokens(
        "self", model, samples=40, seqlen=24, seed=3, progress=lambda stage, done, total: steps.append(done / total)
    )
    assert tokens.shape == (40, 24)
    assert (tokens[:, 0] == 0).all()  # the start token
    assert len({tuple(row) for row in tokens.tolist()}) == 40
    assert steps == sorted(steps)
    assert steps[-1] == 1
    assert torch.equal(tokens, calibration_tokens("self", model, samples=40, seqlen=24, seed=3, progress=silent))
    assert not torch.equal(tokens, calibration_tokens("self", model, samples=40, seqlen=24, seed=4, progress=silent))
