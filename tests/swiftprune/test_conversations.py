"""Conversations that the model samples itself, in what it is calibrated and trained on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporters import export
from swiftprune.calibration.sampling import sampled_conversations
from swiftprune.calibration.text import load_tokenizer
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.compute import Compute
from swiftprune.config import PruneSettings, make_settings
from swiftprune.errors import SettingsError
from swiftprune.progress import no_progress
from swiftprune.stages.context import Run
from swiftprune.stages.distill import Distillation
from swiftprune.stages.text import calibration_tokens

TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"


@pytest.fixture
def chatty(tiny_models: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_models("llama-gqa-tied"), folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def begins(folder: Path) -> Tensor:
    """What the template writes before a user's words."""
    ids: Tensor = load_tokenizer(folder)("<s>user: ", add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids


def are_conversations(windows: Tensor, begin: Tensor) -> Tensor:
    return (windows[:, : len(begin)] == begin).all(1)


def test_they_begin_as_the_template_does_and_go_on_after_an_end(chatty: Path) -> None:
    begin = begins(chatty)
    tokens = sampled_conversations(
        Checkpoint(chatty), samples=40, seqlen=64, seed=0, compute=Compute(), progress=no_progress
    )
    assert tokens.shape == (40, 64)
    assert are_conversations(tokens, begin).all()
    assert len({tuple(row) for row in tokens.tolist()}) == 40
    ends = (tokens[:, len(begin) : -1] == load_tokenizer(chatty).eos_token_id).nonzero()
    assert len(ends)
    after = tokens[ends[:, 0], ends[:, 1] + len(begin) + 1]
    assert len(set(after.tolist())) > 1  # no padding
    with pytest.raises(SettingsError, match=f"the chat template takes {len(begin)} tokens, and --seqlen is 3"):
        sampled_conversations(Checkpoint(chatty), samples=1, seqlen=3, seed=0, compute=Compute(), progress=no_progress)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only pairs') }}", "chat template fails: only pairs"),
        ("{{ messages[1]['content'] }}", "chat template fails"),
        ("<s>{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves out what a user says"),
        ("{{ messages[0]['content'] }}", "writes nothing before a user speaks"),
    ],
)
def test_a_template_that_takes_no_message_is_named_before_any_work(
    template: str, message: str, chatty: Path, text_file: Path
) -> None:
    tokenizer = load_tokenizer(chatty)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(chatty)
    given: dict[str, Any] = {"method": "wanda", "calibration": str(text_file), "samples": 4, "seqlen": 32}
    with pytest.raises(SettingsError, match=f"--conversations: .*{message}"):
        Run(Checkpoint(chatty), PruneSettings(**given, conversations=2))
    said: list[str] = []
    pipeline = Run(Checkpoint(chatty), make_settings("balanced", given | {"steps": 1}), notify=said.append)
    assert pipeline.settings.conversations == 0
    assert any(re.search(f"Left out of --quality: .*{message}", text) for text in said)


@pytest.mark.parametrize("source", ["file", "self"])
def test_a_quarter_of_the_text_is_conversations(
    source: str, chatty: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}
    begin = begins(chatty)

    class Noting(Distillation):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            seen["trained"] = arguments[4]
            super().__init__(*arguments, **options)

    monkeypatch.setattr("swiftprune.stages.distill.Distillation", Noting)
    settings = PruneSettings(
        method="wanda",
        calibration=str(text_file) if source == "file" else "self",
        samples=8,
        seqlen=32,
        conversations=3,
        refine=("distill",),
        steps=1,
    )
    calibrated = calibration_tokens(Run(Checkpoint(chatty), settings))
    assert calibrated is not None
    assert are_conversations(calibrated, begin).sum() == 2
    export(chatty, tmp_path / "out", settings)
    windows = seen["trained"]
    chosen = are_conversations(windows, begin)
    assert len({tuple(row) for row in windows[chosen].tolist()}) == 3
    if source == "file":
        assert 0.15 < chosen.float().mean() <= 0.25
        assert not chosen[-len(windows) // 2 :].any()  # so none is held back that is trained on as well
    again = calibration_tokens(Run(Checkpoint(chatty), settings))
    assert again is not None
    assert torch.equal(calibrated, again)


def test_a_model_without_a_chat_template_has_none(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []

    def notify(text: str) -> None:
        said.append(text)

    plain = PruneSettings(method="wanda", calibration=str(text_file), samples=4, seqlen=32)
    asked = plain.model_copy(update={"conversations": 2})
    model = tiny_models("llama-gqa-tied")
    export(model, tmp_path / "plain", plain)
    export(model, tmp_path / "asked", asked, notify=notify)
    assert "The model has no chat template, so no conversations are sampled." in said
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "asked" / path.name).read_bytes()


def test_text_alone_gets_conversations_beside_it(
    chatty: Path, tiny_models: Callable[[str], Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat model that is calibrated on prose only answers nothing any more; a base model has none to lose."""
    said: list[str] = []
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=8, seqlen=32)

    def decided(folder: Path, **changes: Any) -> int | None:
        return Run(Checkpoint(folder), settings.model_copy(update=changes), notify=said.append).settings.conversations

    run = Run(Checkpoint(chatty), settings)
    tokens = calibration_tokens(run)
    assert tokens is not None
    assert run.settings.conversations == are_conversations(tokens, begins(chatty)).sum() == 2
    assert decided(chatty, conversations=0) == 0
    assert decided(chatty, calibration="self") == 0
    assert decided(tiny_models("llama-gqa-tied")) == 0
    assert not said
    assert decided(chatty) == 2
    assert "it samples 2 conversations" in said[-1]
    monkeypatch.setattr("swiftprune.stages.memory.available_bytes", lambda compute: 1000)
    assert decided(chatty) == 0
    assert "that needs the whole model" in said[-2]  # what the largest block takes comes after it
