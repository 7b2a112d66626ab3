"""What an export says of its own result: the check on held-back text, the model card, and `swiftprune-export info`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from exporters import cli, export
from exporters.checkpoint import Target
from exporters.info import app, describe
from swiftprune import PruneSettings
from swiftprune.calibration.data import calibration_data
from swiftprune.calibration.text import token_windows
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import CheckpointError
from swiftprune.models.load import load_whole_model
from swiftprune.progress import no_progress
from swiftprune.stages import memory

SAMPLES, SEQLEN = 8, 48


@pytest.fixture(scope="module")
def settings(long_text: Path) -> PruneSettings:
    return PruneSettings(method="wanda", calibration=str(long_text), samples=SAMPLES, seqlen=SEQLEN)


@pytest.fixture(scope="module")
def long_text(text_file: Path) -> Path:
    path = text_file.parent / "long.txt"
    path.write_text(text_file.read_text() * 8)
    return path


def naive_perplexity(folder: Path, windows: torch.Tensor) -> float:
    model = load_whole_model(folder, dtype=torch.float32)
    losses = []
    for window in windows:
        chances = model(window[None]).logits[0].log_softmax(-1)
        losses += [-float(chances[place, window[place + 1]].detach()) for place in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


def naive_words(folder: Path, begin: torch.Tensor) -> list[str]:
    """24 tokens, or fewer before the end of text, each the likeliest after all before."""
    model, tokenizer = load_whole_model(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in begin:
        tokens = row.tolist()
        while len(tokens) < 48 and 1 not in tokens[24:]:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokenizer.decode(tokens[24:], skip_special_tokens=True))
    return found


def naive_distance(dense: Path, pruned: Path, windows: torch.Tensor) -> tuple[float, float]:
    """Mean of sum p log(p / q), and how often the likeliest token is the same."""
    models = [load_whole_model(folder, dtype=torch.float32) for folder in (dense, pruned)]
    divergences, same = [], []
    for window in windows:
        p, q = (model(window[None]).logits[0, :-1].detach().softmax(-1) for model in models)
        divergences += (p * (p / q).log()).sum(-1).tolist()
        same += [a == b for a, b in zip(p.argmax(-1).tolist(), q.argmax(-1).tolist(), strict=True)]
    return sum(divergences) / len(divergences), sum(same) / len(same)


def test_an_evaluation_says_how_far_what_is_predicted_moved(
    tiny_models: Callable[[str], Path], settings: PruneSettings, long_text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model, settings = tiny_models("llama-gqa-tied"), settings.model_copy(update={"values": "int8"})
    report = export(model, tmp_path / "out", settings, evaluate=long_text, check=False)
    whole = token_windows(long_text.read_text(), AutoTokenizer.from_pretrained(model), 256, "text")
    divergence, agreement = naive_distance(model, tmp_path / "out", whole[: report.compared_windows])
    assert 1 < report.compared_windows < len(whole)
    assert report.divergence == pytest.approx(divergence, rel=1e-2)
    assert report.agreement == pytest.approx(agreement, abs=1e-3)
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1 << 20)  # too little to keep what the dense one predicts
    alone = export(model, tmp_path / "out", settings, evaluate=long_text, check=False, overwrite=True)
    assert (alone.divergence, alone.compared_windows) == (None, 0)
    assert alone.perplexity_after == report.perplexity_after


def test_it_is_said_when_training_reads_its_text_too_often(
    tiny_models: Callable[[str], Path], settings: PruneSettings, text_file: Path, tmp_path: Path
) -> None:
    for steps, is_said in ((1, False), (30, True)):
        said: list[str] = []
        trained = settings.model_copy(
            update={"calibration": str(text_file), "refine": ("distill",), "steps": steps, "compute": "float32"}
        )
        export(tiny_models("llama-gqa-tied"), tmp_path / str(steps), trained, check=False, notify=said.append)
        assert any("read its text" in text for text in said) == is_said


@pytest.mark.parametrize("target", ["packed", "dense", "torch", "sparse24-bitmask"])
def test_the_check_is_the_perplexity_of_both_models_on_windows_held_back(
    target: Target, tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path
) -> None:
    """Of the files of the dense and the packed target by another way; the others hold the same weights."""
    model = tiny_models("llama-gqa-tied")
    report = export(model, tmp_path / "out", settings, target=target)
    held_back = calibration_data(
        settings.calibration, Checkpoint(model), samples=SAMPLES, seqlen=SEQLEN, seed=0, progress=no_progress
    ).held_back
    assert len(held_back) > 1
    assert report.check is not None
    assert report.check.windows == len(held_back)
    assert report.check.dense == pytest.approx(naive_perplexity(model, held_back), rel=1e-4)
    export(model, tmp_path / "zeros", settings, target="dense", check=False)
    assert report.check.pruned == pytest.approx(naive_perplexity(tmp_path / "zeros", held_back), rel=1e-3)
    assert report.check.pruned != report.check.dense
    divergence, agreement = naive_distance(model, tmp_path / "zeros", held_back)
    assert report.check.divergence == pytest.approx(divergence, rel=1e-2)
    assert report.check.agreement == pytest.approx(agreement, abs=1e-4)
    assert 0 < agreement < 1
    for folder, side in ((model, "dense"), (tmp_path / "zeros", "pruned")):
        assert [getattr(found, side) for found in report.check.continuations] == naive_words(folder, held_back[:3, :24])
    written = json.loads((tmp_path / "out" / "swiftprune.json").read_text())
    assert written["check"] == report.check.model_dump()


def test_the_check_changes_no_weight_and_can_be_left_out(
    tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path
) -> None:
    model = tiny_models("llama-gqa-tied")
    export(model, tmp_path / "with", settings)
    report = export(model, tmp_path / "without", settings, check=False)
    assert report.check is None
    assert "not measured" in (tmp_path / "without" / "README.md").read_text()
    shards = sorted((tmp_path / "with").glob("*.safetensors"))
    assert shards
    for path in shards:
        assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes()


def test_the_check_in_bfloat16_sees_the_pruned_weights(
    tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path
) -> None:
    """Autocast can keep its casts of weights, and those are of the dense ones."""
    computed = [
        export(
            tiny_models("llama-gqa-tied"),
            tmp_path / name,
            settings.model_copy(update={"compute": name, "samples": 24}),  # so that masks hardly differ
        ).check
        for name in ("float32", "bfloat16")
    ]
    exact, rounded = computed
    assert exact is not None
    assert rounded is not None
    assert rounded.ratio == pytest.approx(exact.ratio, rel=0.02)
    assert rounded.pruned != rounded.dense


def test_what_cannot_be_checked_is_said(
    tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models("llama-gqa-tied")
    said: list[str] = []
    short = tmp_path / "short.txt"
    short.write_text(" ".join(Path(settings.calibration).read_text().split()[:150]))
    few = settings.model_copy(update={"calibration": str(short)})
    assert export(model, tmp_path / "few", few, notify=said.append).check is None
    assert "Not checked: there is too little calibration text to hold any back." in said
    monkeypatch.setattr(memory, "available_bytes", lambda compute: 1000)
    assert export(model, tmp_path / "small", settings, notify=said.append).check is None
    assert "Not checked: that needs the whole model" in said[-1]


def test_a_poor_result_is_said_with_what_to_do_next(
    tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swiftprune.stages.check.POOR_RATIO", 0.0)
    for method, calibration, advice in (
        ("wanda", settings.calibration, "the same without --method wanda: by default the kept weights"),
        ("admm", settings.calibration, "--quality balanced"),
        ("admm", "self", "--calibration FILE"),
    ):
        said: list[str] = []
        tried = settings.model_copy(update={"method": method, "calibration": calibration})
        report = export(tiny_models("llama-gqa-tied"), tmp_path / "out", tried, overwrite=True, notify=said.append)
        assert report.check is not None
        assert f"is {report.check.ratio:.1f} times the dense model's" in said[-1]
        assert advice in said[-1]


def test_the_card_says_where_it_comes_from_and_how_to_use_it(
    tiny_copy: Path, settings: PruneSettings, tmp_path: Path
) -> None:
    (tiny_copy / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- old\n---\n# Old\nWords.\n"
    )
    uses: tuple[tuple[Target, str], ...] = (
        ("packed", 'from_pretrained("./model-2of4")'),
        ("dense", "Loads anywhere"),
        ("torch", "torch_sparse"),
    )
    for target, use in uses:
        report = export(tiny_copy, tmp_path / "out", settings, target=target, overwrite=True)
        card = (tmp_path / "out" / "README.md").read_text()
        found = metadata_load(tmp_path / "out" / "README.md")
        assert found is not None
        assert found["base_model"] == "model"
        assert (found["license"], found["language"]) == ("apache-2.0", ["en"])
        assert found["tags"] == ["swiftprune", "sparse", "2:4"]
        assert report.check is not None
        for words in (use, "`wanda`", "long.txt", "8 sequences of 48 tokens", f"{report.check.ratio:.2f} times dense"):
            assert words in card
        assert card.count("\n  - pruned: ") == len(report.check.continuations) > 0
        assert "Words." not in card


def test_a_card_of_a_base_model_without_one(
    tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path
) -> None:
    export(tiny_models("gpt-neox"), tmp_path / "out", settings, check=False)
    found = metadata_load(tmp_path / "out" / "README.md")
    assert found is not None
    assert "license" not in found


def test_info_says_what_each_target_is(
    tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path
) -> None:
    model = tiny_models("llama-gqa-tied")
    plain = describe(model)
    assert (plain.kind, plain.settings, plain.packed_linears) == ("a dense checkpoint", None, 0)
    assert plain.bytes_by_type == {"BF16": Checkpoint(model).nbytes}
    expected: tuple[tuple[Target, str, int, str], ...] = (
        ("packed", "packed 2:4 weights", 21, "transformers"),
        ("dense", "dense tensors with 2:4 zeros in place", 0, "swiftprune-export"),
        ("torch", "CUTLASS layout of torch.sparse", 21, "torch on NVIDIA GPUs"),
        ("sparse24-bitmask", "2:4 weights as sparse-24-bitmask", 21, "vLLM up to 0.18"),
    )
    for target, kind, packed, engine in expected:
        report = export(model, tmp_path / target, settings, target=target)
        found = describe(tmp_path / target)
        assert (found.kind, found.source, found.settings) == (kind, "llama-gqa-tied", report.settings)
        assert found.check == report.check
        assert found.dense_linears == report.dense_linears
        assert engine in found.engines
        stored_dense = sum("stored dense" in reason for reason in found.dense_linears.values())
        assert found.packed_linears == packed - (stored_dense if packed else 0)
        assert sum(found.bytes_by_type.values()) == report.bytes_after


def test_info_on_the_command_line(tiny_models: Callable[[str], Path], settings: PruneSettings, tmp_path: Path) -> None:
    export(tiny_models("llama-gqa-tied"), tmp_path / "out", settings)

    def run(*arguments: str) -> Result:
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments])

    shown = run(str(tmp_path / "out"))
    assert shown.exit_code == 0, shown.stderr
    for words in ("2:4 by wanda", "times dense on held-back", "vllm serve", "outside of the decoder blocks"):
        assert words in shown.stdout
    assert json.loads(run(str(tmp_path / "out"), "--json").stdout)["source"] == "llama-gqa-tied"
    for path, message in ((tmp_path / "nowhere", "nowhere: no such folder"), (tmp_path, "config.json: missing; is")):
        missing = run(str(path))
        assert isinstance(missing.exception, CheckpointError)
        assert message in str(missing.exception)


def test_too_few_tokens_to_solve_for_weights_are_said(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    model = tiny_models("llama-gqa-tied")
    widest = json.loads((model / "config.json").read_text())["intermediate_size"]
    for seqlen, told in ((widest // 4, 0), (widest // 4 - 1, 1)):
        settings = PruneSettings(calibration=str(text_file), samples=4, seqlen=seqlen, conversations=0)
        export(model, tmp_path / str(seqlen), settings, notify=said.append)
        assert sum("down_proj: what is solved for fits these tokens" in text for text in said) == told


def test_info_mistyped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for typed in ("inf", "infos"):
        monkeypatch.setattr("sys.argv", ["swiftprune-export", typed, str(tmp_path)])
        with pytest.raises(SystemExit):
            cli.main()
        assert f"did you mean swiftprune-export info {tmp_path}?" in "".join(capsys.readouterr().err.split("\n"))
