"""`--values int8|int4`: from a checkpoint to one that transformers loads, with every stage that changes weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporters import export
from exporters.info import describe
from swiftprune import PruneSettings, prune, unpack
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import FormatError, SettingsError
from swiftprune.formats.packed24 import PackedFormat
from swiftprune.formats.spec import QUANTIZED, Packed24, Quantized, validate
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import keep_mask

Models = Callable[[str], Path]
PROMPT = torch.arange(40)[None] % 97


def stored(folder: Path) -> dict[str, Packed24]:
    """The packed weights of a checkpoint by name, checked."""
    checkpoint = Checkpoint(folder)
    tensors = dict(checkpoint.read(checkpoint.tensors))
    found = {name: PackedFormat().decode(name, tensors) for name in tensors if name.endswith(".weight")}
    packed = {name: weight for name, weight in found.items() if weight is not None}
    for name, weight in packed.items():
        validate(weight, name)
    return packed


def logits(folder: Path, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model(PROMPT).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt-neox"])
@pytest.mark.parametrize("method", ["admm", "wanda", "swiftprune-pairs", "swiftprune-data-free"])
def test_from_checkpoint_to_transformers(
    name: str, method: str, quantized: Quantized, tiny_models: Models, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    settings: dict[str, Any] = {"method": method, "calibration": str(text_file), "samples": 6, "seqlen": 48}
    report = export(tiny_models(name), tmp_path / "out", PruneSettings(values=quantized, **settings), head="keep")
    export(tiny_models(name), tmp_path / "plain", PruneSettings(**settings))
    weights, plain = stored(tmp_path / "out"), stored(tmp_path / "plain")
    assert weights.keys() == plain.keys()
    assert len(weights) == len(report.layers)
    assert report.linear_bytes_after == sum(weight.spec.nbytes for weight in weights.values())
    first = [key for key in weights if ".layers.0." in key]  # later blocks were calibrated on the rounded ones before
    for key, weight in weights.items():
        assert weight.quantized == quantized
        assert method == "admm" or key not in first or torch.equal(keep_mask(weight), keep_mask(plain[key]))
        off = (unpack(weight) - unpack(plain[key]).float()).norm() / unpack(plain[key]).float().norm()
        assert off < (0.6 if key not in first else 0.02 if quantized == "int8" else 0.15)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, Linear24)]
    assert len(layers) == len(weights)
    assert all(layer.backend.endswith(f"-{quantized}") for layer in layers)
    fast = logits(tmp_path / "out")
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")
    exact = logits(tmp_path / "out")
    # The twin, dense: without rounded inputs the same to the last bits, with them nearly so.
    twin = AutoModelForCausalLM.from_pretrained(tiny_models(name), dtype=torch.float32)
    parameters = dict(twin.named_parameters())
    for key, weight in weights.items():
        parameters[key].data.copy_(unpack(weight))
    norms = {key: parameter for key, parameter in parameters.items() if parameter.ndim == 1}
    for key, tensor in Checkpoint(tmp_path / "out").read(norms).items():
        norms[key].data.copy_(tensor)  # of 4-bit weights these took over some of what makes inputs differ
    with torch.no_grad():
        want = twin(PROMPT).logits
    torch.testing.assert_close(exact, want, rtol=1e-4, atol=1e-5)
    assert float((fast - want).norm() / want.norm()) < 0.06

    model.save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    for key, weight in weights.items():
        for have, want in zip(again[key].tensors, weight.tensors, strict=True):
            assert torch.equal(have, want)
    told = describe(tmp_path / "out")
    assert told.kind == f"packed 2:4 weights, {quantized} values"
    assert told.packed_linears == len(weights)
    assert told.engines["vLLM"].startswith("sparse")


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_distillation_comes_before_rounding_and_tunes_scales_after(
    quantized: Quantized, tiny_models: Models, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("swiftprune.stages.distill.LEARNING_RATE", 5e-3)
    monkeypatch.setattr("swiftprune.stages.tune_scales.LEARNING_RATE", 5e-3)
    common = PruneSettings(values=quantized, method="wanda", calibration=str(text_file), samples=12, seqlen=48)
    trained = common.model_copy(update={"refine": ("distill",), "steps": 40})
    report = export(tiny_models("llama-gqa-tied"), tmp_path / "after", trained)
    whole, rounded = (
        [point.divergence for point in report.distillation if point.rounded is after] for after in (False, True)
    )
    assert min(whole) < 0.9 * whole[0]
    assert rounded[0] < whole[0]
    assert min(rounded) < rounded[0]
    assert report.distillation[-1].step == 50
    after = stored(tmp_path / "after")
    in_16_bits = trained.model_copy(update={"values": None})
    for done in prune(tiny_models("llama-gqa-tied"), in_16_bits):
        for key, weight in done.weights.items():
            if key in after:
                assert torch.equal(keep_mask(weight), keep_mask(after[key]))
                off = float((unpack(weight).float() - unpack(after[key])).norm() / unpack(weight).float().norm())
                assert off < {"int8": 0.05, "int4": 0.3}[quantized]
    # What validation saw is what was written: the same model as the folder holds.
    blocks = {
        name: weight for done in prune(tiny_models("llama-gqa-tied"), trained) for name, weight in done.weights.items()
    }
    for key, weight in after.items():
        pruned = blocks[key]
        assert isinstance(pruned, Packed24)
        assert all(map(torch.equal, pruned.tensors, weight.tensors))


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_permuted_refined_and_partly_dense(
    quantized: Quantized, tiny_models: Models, text_file: Path, tmp_path: Path
) -> None:
    """The other stages, and linears that --sparsity auto leaves dense, which stay as they were."""
    common: dict[str, Any] = {"values": quantized, "calibration": str(text_file), "samples": 6, "seqlen": 48}
    settings = PruneSettings(**common, method="swiftprune", permute=True, refine=("weights", "blocks"))
    export(tiny_models("llama-gqa-tied"), tmp_path / "permuted", settings)
    assert all(weight.quantized == quantized for weight in stored(tmp_path / "permuted").values())
    assert logits(tmp_path / "permuted").isfinite().all()
    auto = PruneSettings(**common, method="wanda", max_perplexity_ratio=1.02)
    report = export(tiny_models("llama-gqa-tied"), tmp_path / "auto", auto)
    weights = stored(tmp_path / "auto")
    assert 0 < len(weights) < len(weights) + len(report.dense_linears)
    assert not {f"{name}.weight" for name in report.dense_linears} & weights.keys()


def test_weights_that_are_sparse_already(tiny_models: Models, tmp_path: Path) -> None:
    export(tiny_models("qwen2"), tmp_path / "dense", PruneSettings(calibration="none"), target="dense")
    export(tmp_path / "dense", tmp_path / "out", PruneSettings(method="keep", values="int8"))
    dense = load_file(next((tmp_path / "dense").glob("*0001*.safetensors")))
    for key, weight in stored(tmp_path / "out").items():
        if key in dense:
            assert not unpack(weight)[dense[key] == 0].any()


def test_what_values_do_not_go_with(tiny_models: Models, tmp_path: Path) -> None:
    model = tiny_models("qwen2")
    for target in ("dense", "torch", "sparse24-bitmask", "onnx-dense"):
        with pytest.raises(SettingsError, match=f"--values int8 is for --target packed and onnx, not for {target}"):
            export(model, tmp_path / "out", PruneSettings(calibration="none", values="int8"), target=target)
    with pytest.raises(SettingsError, match="--values int4 is for --format 2:4 only"):
        export(model, tmp_path / "out", PruneSettings(calibration="none", values="int4", pattern="4:8"), target="dense")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [None, "int8"])
def test_a_packed_weight_that_is_not_whole_is_refused(
    values: Quantized | None, tiny_models: Models, tmp_path: Path
) -> None:
    """Else transformers would make up what is missing, or cut floats off."""
    export(tiny_models("qwen2"), tmp_path / "out", PruneSettings(calibration="none", values=values))
    shard = next(
        path
        for path in sorted((tmp_path / "out").glob("*.safetensors"))
        if "weight_meta" in str(load_file(path).keys())
    )
    tensors = load_file(shard)
    name = next(key for key in tensors if key.endswith("weight_meta"))
    save_file(tensors | {name: tensors[name].float()}, shard, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=f"{name} is F32, not U8"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight, scale = name.removesuffix("_meta"), name.removesuffix("_meta") + "_scale"
    damages: list[tuple[dict[str, Tensor | None], str]] = [
        ({weight: tensors[weight].double()}, f"{weight} is F64, not "),
        ({weight: tensors[weight].int()}, f"{weight} is I32, not "),
        ({weight: tensors[weight][:, :-8].clone()}, rf"{name} is \(.*\) beside values"),
        ({weight: None}, f"holds {name} without {weight}"),
        ({scale: None}, f"holds {name} without {scale}")
        if values
        else ({scale: torch.ones(1)}, f"holds {scale}, but config"),
    ]
    for changed, message in damages:
        kept = {key: tensor for key, tensor in {**tensors, **changed}.items() if tensor is not None}
        save_file(kept, shard, metadata={"format": "pt"})
        with pytest.raises(FormatError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_damaged_checkpoints_are_refused(tiny_models: Models, tmp_path: Path) -> None:
    export(tiny_models("qwen2"), tmp_path / "out", PruneSettings(calibration="none", values="int4"), head="keep")
    shard = next(
        path
        for path in sorted((tmp_path / "out").glob("*.safetensors"))
        if any("_scale" in key for key in load_file(path))
    )
    tensors = load_file(shard)
    name = next(key for key in tensors if key.endswith("weight_scale"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"{name.removesuffix('_scale')}: scale \(0, 0\) is nan"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] | {"ignore": []} == {
        "quant_method": "swiftprune", "format": "2:4", "version": 2, "values": "int4", "ignore": [],
    }  # fmt: skip
    config["quantization_config"]["values"] = "int2"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="values 'int2'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
