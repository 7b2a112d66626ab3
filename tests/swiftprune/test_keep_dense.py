"""Which linears stay dense: against every choice there is, and as an export that engines load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporters import export
from exporters.workspace import Workspace
from swiftprune.calibration.text import load_tokenizer
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.methods.mask import n_of_m
from swiftprune.models.architectures import fused_sets
from swiftprune.models.perplexity import dense_perplexity, perplexity
from swiftprune.stages import distill, keep_dense, text
from swiftprune.stages.distill import Distillation
from swiftprune.stages.keep_dense import select_dense


def windows(model: Any) -> Tensor:
    """Text that the model itself is sure of, so that pruning makes it worse."""
    torch.manual_seed(0)
    out: Tensor = model.generate(
        torch.zeros(12, 1, dtype=torch.long),
        do_sample=True,
        temperature=0.5,
        min_new_tokens=47,
        max_new_tokens=47,
        pad_token_id=0,
    )
    return out


def dense_and_pruned(folder: Path) -> tuple[Any, Any, list[str]]:
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = [
        name
        for name, module in pruned.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
    ]
    for name in names:
        weight = pruned.get_submodule(name).weight
        weight.data.mul_(n_of_m(weight.detach().abs(), 2, 4))
    return dense, pruned, names


def test_fused_sets_are_not_split() -> None:
    names = [
        f"b.{i}.{kind}" for i in range(2) for kind in ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "m.up_proj")
    ]
    assert fused_sets(names) == [
        ["b.0.a.q_proj", "b.0.a.k_proj", "b.0.a.v_proj"],
        ["b.0.a.o_proj"],
        ["b.0.m.up_proj"],
        ["b.1.a.q_proj", "b.1.a.k_proj", "b.1.a.v_proj"],
        ["b.1.a.o_proj"],
        ["b.1.m.up_proj"],
    ]
    assert len(fused_sets(["x.dense", "x.query_key_value", "y.dense"])) == 3


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_budget_is_met_with_few_bytes(share: float, tiny_models: Callable[[str], Path]) -> None:
    dense, pruned, names = dense_and_pruned(tiny_models("llama-mha-untied"))
    tokens = windows(dense)
    before, worst = perplexity(dense, tokens), perplexity(pruned, tokens)
    assert worst > 1.5 * before
    ratio = 1 + share * (worst / before - 1)
    sets = fused_sets(names)
    kept = select_dense(
        pruned,
        lambda name: dense.get_submodule(name).weight.detach(),
        sets,
        tokens,
        dense_perplexity=before,
        max_ratio=ratio,
    )
    assert all(set(kept).issuperset(some) or not set(kept) & set(some) for some in sets)
    assert perplexity(pruned, tokens) <= ratio * before
    for name in names:
        assert torch.equal(pruned.get_submodule(name).weight, dense.get_submodule(name).weight) == (name in kept)

    def size(some: list[str]) -> int:
        return sum(dense.get_submodule(name).weight.numel() for name in some)

    # Restoring the sets that were not chosen, last ones first, takes more bytes to get there.
    _, other, _ = dense_and_pruned(tiny_models("llama-mha-untied"))
    reverse: list[str] = []
    for some in [s for s in sets if s[0] not in kept][::-1] + [s for s in sets if s[0] in kept]:
        if perplexity(other, tokens) <= ratio * before:
            break
        reverse += some
        for name in some:
            other.get_submodule(name).weight.data.copy_(dense.get_submodule(name).weight)
    assert size(kept) < size(reverse)


def test_a_budget_that_cannot_be_met(tiny_models: Callable[[str], Path]) -> None:
    dense, pruned, names = dense_and_pruned(tiny_models("llama-mha-untied"))
    tokens = windows(dense)
    with pytest.raises(SettingsError, match=r"with every linear dense perplexity still is 1\.\d+ times"):
        select_dense(
            pruned,
            lambda name: dense.get_submodule(name).weight.detach(),
            fused_sets(names),
            tokens,
            dense_perplexity=perplexity(dense, tokens) / 1.2,
            max_ratio=1.01,
        )


def test_a_budget_that_leaves_nothing_pruned(tiny_models: Callable[[str], Path]) -> None:
    """As an output it would be the dense model."""
    dense, pruned, names = dense_and_pruned(tiny_models("llama-mha-untied"))
    tokens = windows(dense)
    with pytest.raises(SettingsError, match=r"--max-perplexity-ratio 1: only with every linear dense"):
        select_dense(
            pruned,
            lambda name: dense.get_submodule(name).weight.detach(),
            fused_sets(names),
            tokens,
            dense_perplexity=perplexity(dense, tokens),
            max_ratio=1.0,
        )


@torch.no_grad()
def test_perplexity_of_a_broken_dense_model_is_no_measure(tiny_models: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama-mha-untied"), dtype=torch.float32).eval()
    tokens = torch.arange(24).view(2, 12)
    assert dense_perplexity(model, tokens) == perplexity(model, tokens)
    model.model.norm.weight.fill_(3e38)
    with pytest.raises(CheckpointError, match=r"the dense model's own perplexity is (inf|nan)"):
        dense_perplexity(model, tokens)


@pytest.mark.parametrize("refine", [(), ("distill",)])
def test_an_export_keeps_linears_dense_and_resumes(
    refine: Any, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_models("llama-gqa-tied"), tmp_path / "out"
    settings = PruneSettings(
        method="magnitude",
        calibration="self",
        samples=16,
        seqlen=64,
        permute=True,
        max_perplexity_ratio=1.3,
        refine=refine,
        steps=2 if refine else None,
    )
    report = export(model, tmp_path / "whole", settings)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    kept = {name for name, reason in report.dense_linears.items() if "--max-perplexity-ratio 1.3" in reason}
    assert 0 < len(kept) < 21
    assert kept <= set(config["quantization_config"]["ignore"])
    assert {layer.name for layer in report.layers}.isdisjoint(kept)
    assert len(report.layers) + len(kept) == 21
    assert report.token_bytes_after is not None
    assert report.linear_bytes_before / report.linear_bytes_after == pytest.approx(16 / 9)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name in kept:
        ours, theirs = loaded.get_submodule(name).weight, source.get_submodule(name).weight
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values), name

    export(model, tmp_path / "dense", settings, target="dense")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, same(tokens).logits, rtol=1e-4, atol=1e-4)

    def stop(self: Workspace, names: list[str]) -> None:
        keep(self, names)
        raise KeyboardInterrupt

    keep = Workspace.keep_dense_linears
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "keep_dense_linears", stop)
        with pytest.raises(KeyboardInterrupt):
            export(model, out, settings)
    stages: set[str] = set()
    export(model, out, settings, resume=True, progress=lambda stage, *_: stages.add(stage))
    assert keep_dense.STAGE not in stages
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.parametrize("source", ["self", "file"])
def test_what_judges_is_not_learnt_from(
    source: str, tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it stand amid what is: of a text, what training is validated and the budget measured on comes before."""
    seen: dict[str, Tensor] = {}

    class Noting(Distillation):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            seen["train"], seen["validation"] = arguments[4:6]
            super().__init__(*arguments, **options)

    def judge(model: Any, dense: Any, sets: Any, windows: Tensor, **_: Any) -> list[str]:
        seen["judged"] = windows
        return []

    monkeypatch.setattr(distill, "Distillation", Noting)
    monkeypatch.setattr(keep_dense, "select_dense", judge)
    if source == "file":
        monkeypatch.setattr(text, "TRAINING_SEQLEN", 16)
    model, path = tiny_models("llama-gqa-tied"), tmp_path / "text.txt"
    numbers = " ".join(
        str(number) for number in torch.randint(10**6, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    )
    path.write_text(numbers)
    settings = PruneSettings(
        method="magnitude",
        calibration="self" if source == "self" else str(path),
        samples=4,
        seqlen=32,
        conversations=0,
        max_perplexity_ratio=1.3,
        refine=("distill",),
        steps=1,
    )
    export(model, tmp_path / "out", settings)
    rows = {name: {tuple(row) for row in windows.tolist()} for name, windows in seen.items()}
    assert all(rows.values())
    assert not rows["train"] & rows["judged"]
    assert not rows["train"] & rows["validation"]
    if source == "self":
        assert len(seen["judged"]) == 6  # half of three times four windows
        return
    assert (len(seen["validation"]), len(seen["judged"])) == (8, 32)
    ids = load_tokenizer(model)(numbers).input_ids
    starts = {tuple(ids[i : i + 16]): i for i in range(len(ids) - 15)}
    first = min(starts[row] for row in rows["train"])
    assert max(starts[row] for row in rows["judged"] | rows["validation"]) < first < len(ids) / 5
    assert len(rows["train"]) > (len(ids) - first) // 16 - 2
