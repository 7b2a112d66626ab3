"""Pushing to the hub and loading from it, against a stand-in of its HTTP interface."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.cli.hf import app as hf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import swiftprune.serve.onnxruntime
from exporters import export
from exporters.cli import app
from swiftprune.config import PruneSettings
from swiftprune.errors import OutputError, SettingsError, SwiftpruneError
from tests import hub
from tests.hub import TOKEN, Hub, Repository

DATA_FREE = PruneSettings(calibration="none")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process."""
    with hub.running() as made:
        for name, value in (
            ("ENDPOINT", made.url),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_TOKEN_PATH", str(tmp_path / "no token")),
            ("HUGGINGFACE_CO_URL_TEMPLATE", f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"),
        ):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def test_an_export_is_pushed_and_loads_by_its_hub_id(
    server: Hub, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    out, name = tmp_path / "out", "team/tiny-2of4"
    command = [str(tiny_models("llama-gqa-tied")), "--out", str(out), "--calibration", "none", "--push-to-hub", name]
    pushed = CliRunner().invoke(app, [*command, "--private", "--json"])
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["hub"] == f"{server.url}/{name}"
    repository = server.repositories[name]
    assert repository.private
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert repository.files == written | {".gitattributes": b""}
    card = written["README.md"].decode()
    assert f'from_pretrained("{name}")' in card
    assert f"vllm serve {name}" in card

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, cache_dir=tmp_path / "cache")
    same = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert "Linear24" in str(model)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(20)[None]).logits, same(torch.arange(20)[None]).logits)

    again = CliRunner().invoke(app, [*command, "--overwrite", "--target", "dense"])
    assert again.exit_code == 0, again.output
    only = {path.name for path in out.iterdir()} | {".gitattributes"}  # nothing of what was there before
    assert set(server.repositories[name].files) == only


@pytest.mark.parametrize(
    ("name", "error", "message", "change"),
    [
        ("tiny", SettingsError, "--push-to-hub tiny: give owner/name", {}),
        ("owner/a b", SettingsError, "--push-to-hub owner/a b: .*must use", {}),
        ("google/tiny", SettingsError, "your token is of owner, who writes to owner, team only", {}),
        ("owner/full", OutputError, r"holds more\.txt and 1 more; give another, or --overwrite to replace all", {}),
        ("owner/new", SettingsError, "the hub does not say who you are: ", {"token": "hf_wrong"}),
        ("owner/new", SettingsError, "no token is stored here; run `hf auth login`", {"token": ""}),
        ("owner/new", SettingsError, "the hub does not say who you are: .*offline", {"offline": True}),
        ("owner/new", SettingsError, "your token may only read", {"role": "read"}),
    ],
)
def test_a_repository_that_cannot_be_written_is_said_before_any_work(
    name: str,
    error: type[SwiftpruneError],
    message: str,
    change: dict[str, Any],
    server: Hub,
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = Repository(commits=[{"precious.txt": b"x", "more.txt": b"", ".gitattributes": b""}])
    server.repositories["owner/full"] = full
    server.role = change.get("role", "write")
    monkeypatch.setenv("HF_TOKEN", change.get("token", TOKEN))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", change.get("offline", False))
    with pytest.raises(error, match=message):
        export(tiny_models("llama-gqa-tied"), tmp_path / "out", DATA_FREE, push_to_hub=name)
    assert not list(tmp_path.glob("out*"))
    assert server.repositories == {"owner/full": full}
    assert len(full.commits) == 1


def test_an_output_that_could_not_be_pushed_is_there_all_the_same(
    server: Hub, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    server.fails = True
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="is complete, but could not be pushed to owner/tiny") as refused:
        export(tiny_models("llama-gqa-tied"), out, DATA_FREE, push_to_hub="owner/tiny")
    go_on = ["upload", "owner/tiny", str(out), ".", "--delete", "*"]
    assert f"hf {' '.join(go_on[:-1])} '*'" in str(refused.value)
    server.fails = False
    hf.main(go_on, standalone_mode=False)
    assert set(server.repositories["owner/tiny"].files) == {path.name for path in out.iterdir()} | {".gitattributes"}


def test_an_onnx_decoder_generates_by_its_hub_id(
    server: Hub, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    out = tmp_path / "out"
    export(tiny_models("llama-gqa-tied"), out, DATA_FREE, target="onnx", push_to_hub="owner/tiny-onnx")
    answers = []
    for model in ("owner/tiny-onnx", out):
        loaded, linears = swiftprune.serve.onnxruntime.genai_model(model)
        answers.append(("".join(swiftprune.serve.onnxruntime.generate(loaded, "The pruned", 8)), linears))
    assert answers[0] == answers[1]
    assert len(answers[0][1]) == 2  # backends: a native one, and dense for the head
