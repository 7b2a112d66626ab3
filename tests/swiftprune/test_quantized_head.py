"""Output heads and embeddings in 8 bits: format version 3, in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Gemma3TextConfig

from exporters import export
from exporters.info import describe
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError, FormatError, SettingsError
from swiftprune.formats.spec import check_declared
from swiftprune.kernels.dense8 import Embedding8, Head8, multiply_rows, quantize_rows
from tests import models

IDS = torch.arange(5, 29)[None]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mha-untied", "gpt-neox"])
@pytest.mark.parametrize("values", [None, "int4"])
def test_head_in_transformers(name: str, values: Any, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """What is loaded is the model whose ends are the stored numbers, densely; saved again, it is the same files."""
    source = tiny_models(name)
    settings = PruneSettings(calibration="none", values=values)
    export(source, tmp_path / "kept", settings, head="keep")
    # By itself with quantized values, else when asked for.
    export(source, tmp_path / "out", settings, head=None if values else "int8")
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (declared["version"], declared["head"], declared.get("values")) == (3, "int8", values)
    dense, stored = tensors_of(source), tensors_of(tmp_path / "out")
    ends = [end for end in dense if any(part in end for part in ("embed", "lm_head"))]
    assert len(ends) == 2 - ("tied" in name.split("-"))
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    for end in ends:
        values8, scale = stored[end], stored[f"{end}_scale"]
        assert (values8.dtype, scale.dtype, scale.shape) == (torch.int8, torch.bfloat16, (len(values8), 1))
        rows = values8.double() * scale.double()
        assert ((rows - dense[end].double()).abs() <= scale.double().abs() * 0.501 + 1e-9).all()
        is_head = "lm_head" in end or "embed_out" in end  # as older checkpoints call it
        module = twin.get_output_embeddings() if is_head else twin.get_input_embeddings()
        module.weight.data = rows.float()
    if len(ends) == 1:
        twin.lm_head.weight = twin.model.embed_tokens.weight
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), Embedding8)
    assert isinstance(model.get_output_embeddings(), Head8)
    with torch.inference_mode():
        assert torch.allclose(model(IDS).logits, twin(IDS).logits, atol=2e-5)
    answer = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, IDS.shape[1] + 4)
    model.save_pretrained(tmp_path / "again")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], stored[key]) for key in stored)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    body = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(body(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)
    assert "int8 output head" in describe(tmp_path / "out").kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs", [1, 4, 20, 33, 48, 60, 64, 576, 900])
def test_products_are_those_of_the_numbers(dtype: torch.dtype, inputs: int) -> None:
    """Of every width: torch's operator reads past the ends of rows of some, so it is for others."""
    for tokens in (1, 3, 40):
        _check_product(dtype, tokens, inputs)


def _check_product(dtype: torch.dtype, tokens: int, inputs: int) -> None:
    torch.manual_seed(tokens)
    values, scale = quantize_rows(torch.randn(70, inputs))
    x, bias = torch.randn(2, tokens, inputs).to(dtype), torch.randn(70).to(dtype)
    layer = Head8(inputs, 70, bias=True, dtype=dtype)
    layer.weight.data, layer.weight_scale.data = values, scale
    assert layer.bias is not None
    layer.bias.data = bias
    exact = x.double() @ (values.double() * scale.double()).T + bias.double()
    rounding = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    with torch.inference_mode():
        assert (layer(x).double() - exact).abs().max() < rounding * exact.abs().max()
        assert torch.allclose(layer.to_dense()(x), layer(x), rtol=rounding, atol=rounding * float(exact.abs().max()))
    # Adapters below it train.
    x = x.float().requires_grad_()
    multiply_rows(x, values, scale[:, 0].float()).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.allclose(x.grad[0, 0], (values.float() * scale.float()).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [0, 1, 8, 16, 32, 40])
def test_numbers_may_stand_anywhere(place: int) -> None:
    """In a file that is mapped they do, at multiples of 8 bytes; torch's own operator crashes on those of bfloat16."""
    rows, inputs, generator = 40, 64, torch.Generator().manual_seed(0)
    scale = torch.rand(rows, generator=generator).bfloat16()
    values = torch.randint(-127, 128, (place + rows * inputs,), generator=generator, dtype=torch.int8)[place:]
    values = values.view(rows, inputs)
    for tokens in (1, 4, 16):
        x = torch.randn(place + tokens * inputs, generator=generator).bfloat16()[place:].view(tokens, inputs)
        expected = (x.double() @ values.double().T) * scale.double()
        y = multiply_rows(x, values, scale)
        assert torch.allclose(y.double(), expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


def test_a_head_of_a_mapped_file_is_multiplied_by_where_it_is_fast(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_models("llama-gqa-tied"), tmp_path / "out", PruneSettings(calibration="none", values="int8"))
    shards = {path: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    (path,) = (path for path, tensors in shards.items() if "model.embed_tokens.weight" in tensors)
    for padding in range(0, 64, 8):  # of the header, which moves all that follows
        save_file(shards[path], path, metadata={"format": "pt", "padding": " " * padding})
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        weight = model.get_output_embeddings().weight
        assert weight.data_ptr() % 64 == 0
        assert weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        with torch.inference_mode():
            assert torch.isfinite(model(IDS).logits).all()


def test_moved_to_another_type(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    export(tiny_models("llama-gqa-tied"), tmp_path / "out", PruneSettings(calibration="none"), head="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).to(torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        assert model(IDS).logits.dtype == torch.float32
        # Norms and the like have been rounded to bfloat16, in which they are stored.
        assert torch.allclose(model(IDS).logits, loaded(IDS).logits, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    stored, again = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert all(torch.equal(again[key], stored[key]) for key in stored if key.endswith("_scale"))
    with pytest.raises(TypeError, match="Embedding8"):
        model.resize_token_embeddings(400)


def test_ends_that_differ_though_the_config_ties_them(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers then keeps them apart, and so must what is exported."""
    source = tmp_path / "model"
    shutil.copytree(tiny_models("llama-mha-untied"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    settings = PruneSettings(calibration="none")
    kept, out = tmp_path / "kept", tmp_path / "out"
    export(source, kept, settings)
    export(source, out, settings, head="int8")
    dense, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (kept, out))
    with torch.inference_mode():
        expected, found = dense(IDS).logits, model(IDS).logits
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_heads_that_are_refused(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = PruneSettings(calibration="none", values="int8")
    with pytest.raises(SettingsError, match="--head int4 is for --target onnx, not for packed, which has int8"):
        export(tiny_models("llama-gqa-tied"), tmp_path / "out", settings, head="int4")
    with pytest.raises(SettingsError, match="--head int8 is for --target packed and onnx, not for dense"):
        export(
            tiny_models("llama-gqa-tied"),
            tmp_path / "out",
            PruneSettings(calibration="none"),
            target="dense",
            head="int8",
        )
    gemma = models.write_model(tmp_path / "model", Gemma3TextConfig(**models.SMALL, num_key_value_heads=2, head_dim=16))
    said: list[str] = []
    export(gemma, tmp_path / "gemma", settings, notify=said.append)
    assert any("stay as they are: Gemma3ForCausalLM has Gemma3TextScaledWordEmbedding" in line for line in said)
    with pytest.raises(SettingsError, match="--head int8: the output head stays as it is: Gemma3ForCausalLM has"):
        export(gemma, tmp_path / "no", settings, head="int8")
    for version, head in ((2, "int8"), (3, None), (3, "int4"), (1, "int8")):
        with pytest.raises(FormatError, match=f"declares version {version} of the packed format with head"):
            check_declared("2:4", version, "transformers", (1, 2, 3), None if version == 1 else "int8", head)
    check_declared("2:4", 3, "transformers", (1, 2, 3), "int4", "int8")


def test_damaged_heads(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """Loaders of transformers would make up what is missing, and cast what is of another type."""
    export(tiny_models("llama-gqa-tied"), tmp_path / "out", PruneSettings(calibration="none", values="int8"))
    end = "model.embed_tokens.weight"
    (shard,) = (path for path in (tmp_path / "out").glob("*.safetensors") if end in load_file(path))
    good = load_file(shard)
    config = (tmp_path / "out" / "config.json").read_text()

    def refused(changes: dict[str, torch.Tensor | None], match: str) -> None:
        changed = {key: value for key, value in (good | changes).items() if value is not None}
        save_file(changed, shard, metadata={"format": "pt"})
        with pytest.raises(FormatError, match=match):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        if "not finite" not in match and "-128" not in match and "none" not in match:  # from headers alone
            with pytest.raises((FormatError, CheckpointError)):
                describe(tmp_path / "out")

    scale = good[f"{end}_scale"]
    refused({f"{end}_scale": None}, r"embed_tokens.weight_scale is missing, not BF16")
    refused({f"{end}_scale": scale.float()}, "is F32")
    refused({f"{end}_scale": scale[:-1]}, "is BF16")
    refused({end: good[end].float() * scale.float()}, "no embeddings are stored in 8 bits, but config.json says so")
    refused({end: good[end].view(torch.uint8)}, "no embeddings are stored in 8 bits")
    norm = torch.ones(8, dtype=torch.int8)
    refused(
        {"a.weight": norm, "b.weight": norm.clone()},
        "a.weight, b.weight, model.embed_tokens.weight in 8 bits, more than",
    )
    refused(
        {end: None, f"{end}_scale": None, "a.weight": good[end], "a.weight_scale": scale},
        "embed_tokens.weight is in none",
    )
    refused({f"{end}_scale": torch.full_like(scale, torch.nan)}, "a scale is not finite")
    refused({end: torch.full_like(good[end], -128)}, "holds -128")
    (tmp_path / "out" / "config.json").write_text(
        config.replace('"head": "int8"', '"none": 0').replace('"version": 3', '"version": 2')
    )
    refused({}, "holds model.embed_tokens.weight in 8 bits, but config.json says nothing")


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_sums_that_float16_holds_only_when_scaled(width: int, dtype: torch.dtype) -> None:
    x = torch.full((3, width), 20.0, dtype=dtype)
    values = torch.full((8, width), 127, dtype=torch.int8)
    got = multiply_rows(x, values, torch.full((8,), 2**-10, dtype=dtype))
    torch.testing.assert_close(got, torch.full((3, 8), 20 * 127 * width / 1024, dtype=dtype), rtol=0.01, atol=0)
