"""Permutations: the dense model must stay what it is, and groups must become better, against all orders there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PhiConfig

from exporters import export
from exporters.workspace import Workspace
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.models.plan import empty_model, find_targets
from swiftprune.stages import permute
from swiftprune.stages.context import Run
from swiftprune.stages.permute import find_permutations, search_permutation
from swiftprune.stages.run import stream_blocks
from tests import models


def kept(scores: Tensor) -> float:
    return float(scores.view(len(scores), -1, 4).sort(dim=2).values[..., 2:].sum())


def test_the_order_comes_close_to_the_best_of_all() -> None:
    """Eight channels fall into two groups in 35 ways."""
    found = best = before = 0.0
    for seed in range(20):
        scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed)).pow(4)
        order = search_permutation(scores)
        assert sorted(order.tolist()) == list(range(8))
        found += kept(scores[:, order])
        before += kept(scores)
        best += max(
            kept(scores[:, [*first, *(k for k in range(8) if k not in first)]])
            for first in itertools.combinations(range(8), 4)
        )
    assert best - found < 0.15 * (best - before)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), groups=st.integers(1, 40), alike=st.booleans())
def test_an_order_is_never_worse_than_none(seed: int, n: int, groups: int, alike: bool) -> None:
    scores = torch.rand(n, 4 * groups, generator=torch.Generator().manual_seed(seed)).pow(3)
    if alike:
        scores = scores.round(decimals=1)
    order = search_permutation(scores)
    assert sorted(order.tolist()) == list(range(4 * groups))
    assert kept(scores[:, order]) >= kept(scores) * (1 - 1e-6)


def test_partitions_of_a_large_layer_are_still_better(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(32, 256, generator=torch.Generator().manual_seed(0)).pow(4)
    whole = kept(scores[:, search_permutation(scores)])
    monkeypatch.setattr(permute, "GROUPS_AT_ONCE", 10)
    assert kept(scores) < kept(scores[:, search_permutation(scores)])
    assert kept(scores) * 1.02 < whole


def write(folder: Path, name: str) -> Path:
    """A model whose one-dimensional parameters matter too: norms and biases differ by channel."""
    config = models.SUPPORTED[name]
    if name == "qwen2":
        config = type(config)(**(config.to_dict() | {"attention_bias": True}))
    models.write_model(folder, config, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for key, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[key] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", list(models.SUPPORTED))
def test_the_permuted_dense_model_is_the_same(name: str, tmp_path: Path) -> None:
    """Its tensors, written to disk and loaded by transformers, give the same logits; all that should move has."""
    folder = write(tmp_path / "model", name)
    checkpoint = Checkpoint(folder)
    model, _ = empty_model(checkpoint)
    targets = find_targets(model, checkpoint, ignore="lm_head|embed", group=4)
    tokens = torch.randint(0, models.VOCABULARY, (4, 30), generator=torch.Generator().manual_seed(0))
    ticks: list[None] = []
    orders = find_permutations(model, checkpoint, targets, tokens, tick=lambda: ticks.append(None))
    assert len(ticks) == 4 * len(targets.blocks)
    permuted = checkpoint.permuted(orders).read(checkpoint.tensors)
    for key, tensor in checkpoint.read(checkpoint.tensors).items():
        stays = any(kind in key for kind in ("q_norm", "k_norm", "q_proj.bias", "k_proj.bias"))
        assert torch.equal(tensor, permuted[key]) == stays, key
    other = tmp_path / "permuted"
    models.write_model(other, models.SUPPORTED[name], torch.float32)
    save_file(
        {key: value.contiguous() for key, value in permuted.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens).logits
        got = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)(input_ids=tokens).logits
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt-neox"])
def test_more_of_the_scores_is_kept(name: str, text_file: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name)
    energy = {}
    for chosen in (False, True):
        settings = PruneSettings(
            method="wanda", permute=chosen, calibration=str(text_file), samples=6, seqlen=48, one_pass=True
        )
        results = [result for done in stream_blocks(Run(Checkpoint(folder), settings)) for result in done.results]
        energy[chosen] = sum(result.output_error or 0 for result in results)
    assert energy[True] < 0.99 * energy[False]


@pytest.mark.parametrize("refine", [(), ("distill",)])
def test_an_export_with_permutations_resumes_to_the_same_model(
    refine: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path / "model", "llama-gqa-tied")
    settings = PruneSettings(
        method="wanda",
        permute=True,
        calibration=str(text_file),
        samples=4,
        seqlen=32,
        refine=refine,
        steps=3 if refine else None,
    )
    export(model, tmp_path / "whole", settings, target="dense")

    def stop(self: Workspace, shard: str, *arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            export(model, tmp_path / "out", settings, target="dense")
    seen: list[str] = []
    export(
        model, tmp_path / "out", settings, target="dense", resume=True, progress=lambda stage, *_: seen.append(stage)
    )
    assert "permute" not in seen
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not (tmp_path / "out" / "permutations.safetensors").exists()

    # An unpruned linear's weight is the dense one in another order, and what is outside of the blocks is too.
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for key, ours in pruned.named_parameters():
        if "layers" not in key:
            assert torch.equal(ours.flatten().sort().values, dense.get_parameter(key).flatten().sort().values), key
    assert not torch.equal(pruned.model.norm.weight, dense.model.norm.weight)


def test_what_cannot_be_permuted_says_why(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PruneSettings(method="wanda", permute=True, calibration=str(text_file), samples=2, seqlen=16)
    common = {key: models.SUPPORTED["llama-mha-untied"].to_dict()[key] for key in ("vocab_size", "hidden_size")}
    phi = models.write_model(
        tmp_path / "phi", PhiConfig(**common, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    )
    with pytest.raises(SettingsError, match=r"knows the decoder blocks of Llama and GPT-NeoX, not those of Phi"):
        list(stream_blocks(Run(Checkpoint(phi), settings)))
    with pytest.raises(SettingsError, match="--permute finds orders for --format 2:4 only"):
        settings.model_copy(update={"pattern": "4:8"}).resolved()
    with pytest.raises(SettingsError, match="--permute needs calibration data"):
        settings.model_copy(update={"calibration": "none"}).resolved()

    right = permute._Search._head_orders

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        inside, rows = right(*arguments)
        return inside, rows.flip(0)

    monkeypatch.setattr(permute._Search, "_head_orders", wrong)
    with pytest.raises(CheckpointError, match=r"permuting changes the hidden states .* leave out --permute"):
        list(stream_blocks(Run(Checkpoint(tiny_models("llama-mha-untied")), settings)))
