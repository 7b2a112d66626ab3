"""`keep`: what is sparse already is packed bit for bit, and masks made elsewhere are applied, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporters import export
from swiftprune import PruneSettings, unpack
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import SettingsError
from swiftprune.stages.context import Run
from swiftprune.stages.run import stream_blocks

DOWN = "model.layers.1.mlp.down_proj.weight"
DECLARED = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]},
}


@pytest.fixture
def sparse(tiny_models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A 2:4 checkpoint with zeros in place, a row with one weight, and no word of where it is from."""
    folder = tmp_path / "sparse"
    export(tiny_models("llama-mha-untied"), folder, PruneSettings(calibration="none"), target="dense")
    (folder / "swiftprune.json").unlink()
    edit(folder, DOWN, alone)
    return folder


def alone(weight: Tensor) -> None:
    weight[5] = 0
    weight[5, 3] = 1e-30


def edit(folder: Path, name: str, change: Callable[[Tensor], object]) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, shard, metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def declare(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_what_is_sparse_is_kept_bit_for_bit(sparse: Path, tmp_path: Path) -> None:
    report = export(sparse, tmp_path / "out", PruneSettings(method="keep"))
    assert report.settings.calibration == "none"
    assert len(report.layers) == 21
    before = AutoModelForCausalLM.from_pretrained(sparse)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = unpack(after.get_submodule(DOWN.removesuffix(".weight")).packed)
    assert torch.equal(weight, before.get_parameter(DOWN))
    export(sparse, tmp_path / "dense", PruneSettings(method="keep"), target="dense")
    kept = tensors_of(tmp_path / "dense")
    assert kept.keys() == tensors_of(sparse).keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors_of(sparse).items())


def test_pruning_again_drops_nothing_either(sparse: Path, tmp_path: Path) -> None:
    """And it says that there is a better way."""
    said: list[str] = []
    export(sparse, tmp_path / "out", PruneSettings(calibration="none"), target="dense", notify=said.append)
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors_of(sparse).items())
    assert any("is 2:4 already" in text and "--method keep" in text for text in said)


@pytest.mark.parametrize("by", ["config", "manifest"])
def test_it_is_chosen_where_the_checkpoint_says_so(sparse: Path, tmp_path: Path, by: str) -> None:
    said: list[str] = []
    if by == "config":
        declare(sparse, DECLARED)
    else:
        (sparse / "swiftprune.json").write_text(json.dumps({"settings": {"pattern": "2:4"}}))
    report = export(sparse, tmp_path / "out", PruneSettings(), notify=said.append)
    assert (report.settings.method, report.settings.calibration) == ("keep", "none")
    assert any("leaves them as they are" in text for text in said)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "swiftprune"
    assert export(sparse, tmp_path / "again", PruneSettings(method="magnitude")).settings.method == "magnitude"
    export(sparse, tmp_path / "dense", PruneSettings(), target="dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense")


def test_linears_that_are_not_sparse_stay_dense_and_are_named(sparse: Path, tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj.weight"
    edit(sparse, q, lambda weight: weight[3, 4:8].fill_(1))
    report = export(sparse, tmp_path / "out", PruneSettings(method="keep"))
    assert report.dense_linears["model.layers.0.self_attn.q_proj"] == "not 2:4: row 3, group 1 has 4 non-zeros"
    for kind in ("k_proj", "v_proj"):
        reason = report.dense_linears[f"model.layers.0.self_attn.{kind}"]
        assert reason == "engines run it as one with model.layers.0.self_attn.q_proj"
    assert len(report.layers) == 18
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_parameter(q), tensors_of(sparse)[q])
    with pytest.raises(SettingsError, match=r"--strict: 1 of 21 linears are not, first .*q_proj: not 2:4: row 3"):
        export(sparse, tmp_path / "strict", PruneSettings(method="keep", strict=True))


def test_nothing_to_keep(tiny_models: Callable[[str], Path]) -> None:
    with pytest.raises(SettingsError, match=r"no linear of the decoder can stay as it is: .* has [34] non-zeros"):
        Run(Checkpoint(tiny_models("llama-mha-untied")), PruneSettings(method="keep"))


def masks_of(folder: Path) -> dict[str, np.ndarray]:
    """Any two of each four, of all linears of the decoder."""
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for name, tensor in tensors_of(folder).items():
        if name.endswith("_proj.weight"):
            ranks = torch.rand(tensor.shape[0], tensor.shape[1] // 4, 4, generator=generator).argsort(-1).argsort(-1)
            masks[name] = (ranks < 2).view(tensor.shape).numpy()
    return masks


def packed_flat(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask)


def packed_rows(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, axis=1)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("form", ["bool", "uint8", "float32", packed_flat, packed_rows])
@pytest.mark.parametrize("suffix", [".weight", ".weight.mask", "", "_mask"])
def test_masks_from_elsewhere(
    ending: str, form: Any, suffix: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_models("llama-mha-untied")
    masks = masks_of(folder)
    stored = {
        name.removesuffix(".weight") + suffix: mask.astype(form) if isinstance(form, str) else form(mask)
        for name, mask in masks.items()
    }
    path = tmp_path / f"masks.{ending}"
    if ending == "npz":
        np.savez_compressed(path, **stored)  # type: ignore[arg-type]
    else:
        save_file({name: torch.from_numpy(array) for name, array in stored.items()}, path)
    settings = PruneSettings(mask=str(path))
    assert settings.resolved().method == "keep"
    dense = tensors_of(folder)
    done = {name: unpack(w) for b in stream_blocks(Run(Checkpoint(folder), settings)) for name, w in b.weights.items()}
    assert done.keys() == masks.keys()
    for name, weight in done.items():
        assert torch.equal(weight, torch.where(torch.from_numpy(masks[name]), dense[name], 0))


def test_kept_weights_can_be_refined_on_a_given_mask(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    folder = tiny_models("llama-mha-untied")
    masks = masks_of(folder)
    np.savez(tmp_path / "masks.npz", **masks)  # type: ignore[arg-type]
    settings = PruneSettings(
        mask=str(tmp_path / "masks.npz"), calibration=str(text_file), samples=4, seqlen=32, refine=("weights",)
    )
    for done in stream_blocks(Run(Checkpoint(folder), settings)):
        for name, packed in done.weights.items():
            weight = unpack(packed)
            assert not (weight != 0)[~torch.from_numpy(masks[name])].any()
            assert not torch.equal(weight, torch.where(torch.from_numpy(masks[name]), tensors_of(folder)[name], 0))


def test_masks_that_do_not_fit_are_refused(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_models("llama-mha-untied")
    good = masks_of(folder)
    path = tmp_path / "masks.npz"

    def refused(masks: dict[str, np.ndarray], message: str) -> None:
        np.savez(path, **masks)  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match=message):
            Run(Checkpoint(folder), PruneSettings(mask=str(path)))

    beyond = "model.layers.9.mlp.down_proj.weight"
    refused(good | {beyond: good[DOWN]}, rf"'{beyond}' is of no linear that is pruned; near is 'model\.layers\.")
    refused(good | {DOWN: good[DOWN].T}, r"has shape \(160, 64\) and type bool")
    refused(good | {DOWN: np.packbits(good[DOWN])[:-1]}, "or its bits as 1280 uint8")
    refused(good | {DOWN: good[DOWN] * 0.5}, "holds other values than 0 and 1")
    refused(good | {f"{DOWN}.mask": good[DOWN]}, rf"'{DOWN}' and '{DOWN}\.mask' are both masks of {DOWN}")
    three = good[DOWN].copy()
    three[7, 8:12] = [1, 1, 1, 0]
    refused(good | {DOWN: three}, "is not 2:4: row 7, group 2 has 3 non-zeros")
    del good[DOWN]
    np.savez(path, **good)  # type: ignore[arg-type]
    dense = Run(Checkpoint(folder), PruneSettings(mask=str(path))).targets.dense
    assert "non-zeros and masks.npz has no mask of it" in dense[DOWN.removesuffix(".weight")]
    path.write_bytes(b"torn")
    with pytest.raises(SettingsError, match="cannot be read"):
        Run(Checkpoint(folder), PruneSettings(mask=str(path)))
    for settings, message in (
        (PruneSettings(mask="missing.npz"), "no such file"),
        (PruneSettings(mask=str(shutil.copy(path, tmp_path / "masks.pt"))), r"give a \.npz or \.safetensors"),
        (PruneSettings(mask=str(path), method="wanda"), "--mask is for --method keep, not for wanda"),
        (PruneSettings(strict=True), "--strict is for --method keep"),
        (PruneSettings(method="keep", permute=True, calibration="x"), "--permute moves zeros"),
    ):
        with pytest.raises(SettingsError, match=message):
            Run(Checkpoint(folder), settings)


def test_a_share_of_zeros_is_checked_too(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """`keep` of an unstructured pattern: a dense model has not that many zeros."""
    folder = tiny_models("llama-mha-untied")
    settings = PruneSettings(method="keep", pattern="unstructured:0.5", strict=True)
    with pytest.raises(
        SettingsError, match=r"--strict: 21 of 21 linears are not.*not unstructured:0\.5: 0\.0% of it is"
    ):
        Run(Checkpoint(folder), settings)
    half = {name: mask.copy() for name, mask in masks_of(folder).items()}
    np.savez(tmp_path / "masks.npz", **half)  # type: ignore[arg-type]
    Run(Checkpoint(folder), settings.model_copy(update={"mask": str(tmp_path / "masks.npz")}))
    half[DOWN][:] = True
    np.savez(tmp_path / "masks.npz", **half)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"down_proj\.weight is not unstructured:0\.5: 0\.0% of it is zero"):
        Run(Checkpoint(folder), settings.model_copy(update={"mask": str(tmp_path / "masks.npz")}))


def test_a_damaged_mask_is_named(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """The members of a .npz are read one by one, long after it was opened."""
    folder = tiny_models("llama-mha-untied")
    path = tmp_path / "masks.npz"
    np.savez(path, **masks_of(folder))  # type: ignore[arg-type]
    content = bytearray(path.read_bytes())
    content[300:9000] = bytes(8700)
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"masks\.npz: \S+ cannot be read"):
        Run(Checkpoint(folder), PruneSettings(mask=str(path)))
