"""What the written checkpoints do in the engines that load them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from transformers import AutoModelForCausalLM

from exporters import Target, export, torch_sparse
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.errors import FormatError, SettingsError
from swiftprune.kernels.linear import Linear24
from tests import models

PROMPT = torch.tensor([[5, 17, 42, 99, 7]])


def generate(folder: Path, dtype: torch.dtype = torch.bfloat16) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    out = model.generate(PROMPT, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    return list(out[0].tolist())


@pytest.mark.parametrize("name", models.SUPPORTED)
def test_packed_generates_the_tokens_of_the_masked_dense_model(
    name: str, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=4, seqlen=64)
    packed = export(tiny_models(name), tmp_path / "packed", settings)
    dense = export(tiny_models(name), tmp_path / "dense", settings, target="dense")

    packed_tokens, dense_tokens, unpruned_tokens = (
        generate(folder, torch.float32) for folder in (tmp_path / "packed", tmp_path / "dense", tiny_models(name))
    )  # in bfloat16 tokens that are nearly as likely change places
    assert packed_tokens == dense_tokens != unpruned_tokens
    assert packed.linear_bytes_after * 16 == packed.linear_bytes_before * 9
    assert dense.linear_bytes_after == dense.linear_bytes_before
    assert [layer.name for layer in packed.layers] == [layer.name for layer in dense.layers]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    linears = [module for _, module in loaded.named_modules() if isinstance(module, Linear24)]
    assert len(linears) == len(packed.layers) > 0


@pytest.mark.parametrize("name", models.SUPPORTED)
def test_every_group_of_the_dense_target_has_two_zeros(
    name: str, tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    settings = PruneSettings(method="sparsegpt", calibration=str(text_file), samples=4, seqlen=64)
    report = export(tiny_models(name), tmp_path / "out", settings, target="dense")
    out, source = Checkpoint(tmp_path / "out"), Checkpoint(tiny_models(name))
    assert out.tensors.keys() == source.tensors.keys()
    pruned = {layer.name + ".weight" for layer in report.layers}
    for tensor_name, tensor in out.read(out.tensors).items():
        if tensor_name in pruned:
            assert (tensor.view(tensor.shape[0], -1, 4) != 0).sum(-1).eq(2).all(), tensor_name
        else:
            assert torch.equal(tensor, source.read([tensor_name])[tensor_name]), tensor_name
    assert pruned <= out.tensors.keys()


def test_packed_loads_saves_and_loads_again(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    export(tiny_models("qwen2"), tmp_path / "a", PruneSettings(calibration="none"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert generate(tmp_path / "a") == generate(tmp_path / "b")


def test_stock_transformers_stops_on_a_packed_checkpoint(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    export(tiny_models("llama-mha-untied"), tmp_path / "out", PruneSettings(calibration="none"))
    code = (
        "import sys, transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert 'swiftprune' not in sys.modules\n"
        "print('LOADED')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "LOADED" not in run.stdout
    assert "q_proj.weight" in run.stderr
    assert "mismatch" in run.stderr.lower()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99"), ({"format": "2:4-cutlass"}, "--target packed")],
)
def test_other_formats_and_versions_are_refused(
    change: dict[str, object], message: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    export(tiny_models("llama-mha-untied"), tmp_path / "out", PruneSettings(calibration="none"))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_torch_target_is_what_torch_itself_would_pack(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    name = "llama-mha-untied"
    settings = PruneSettings(calibration="none")
    report = export(tiny_models(name), tmp_path / "torch", settings, target="torch")
    export(tiny_models(name), tmp_path / "dense", settings, target="dense")
    dense = Checkpoint(tmp_path / "dense")
    loaded = torch_sparse.load(tmp_path / "torch")
    assert loaded.keys() == dense.tensors.keys()
    sparse = {key: value for key, value in loaded.items() if isinstance(value, SparseSemiStructuredTensorCUTLASS)}
    # K = 160 of down_proj is no multiple of 64: it is stored dense, and the report says so.
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in sparse} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }
    assert "multiples of (32, 64)" in report.dense_linears["model.layers.0.mlp.down_proj"]
    for key, tensor in sparse.items():
        values, metadata = sparse_semi_structured_from_dense_cutlass(dense.read([key])[key])  # type: ignore[no-untyped-call]
        assert tensor.packed is not None
        assert tensor.meta is not None
        assert torch.equal(tensor.packed, values)
        assert torch.equal(tensor.meta, metadata)
        assert tensor.shape == dense.tensors[key].shape


def test_torch_target_stops_stock_transformers(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    export(tiny_models("llama-mha-untied"), tmp_path / "out", PruneSettings(calibration="none"), target="torch")
    with pytest.raises(FormatError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    export(tiny_models("llama-mha-untied"), tmp_path / "packed", PruneSettings(calibration="none"))
    with pytest.raises(FormatError, match="--target torch"):
        torch_sparse.load(tmp_path / "packed")


@pytest.mark.parametrize(("pattern", "kept", "group"), [("4:8", 4, 8), ("1:4", 1, 4), ("3:5", 3, 5)])
def test_other_patterns_are_written_dense_only(
    pattern: str, kept: int, group: int, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = PruneSettings(pattern=pattern, calibration="none")
    report = export(tiny_models("mistral-sliding"), tmp_path / "out", settings, target="dense")
    out = Checkpoint(tmp_path / "out")
    assert report.layers
    for layer in report.layers:
        weight = out.read([layer.name + ".weight"])[layer.name + ".weight"]
        assert (weight.view(weight.shape[0], -1, group) != 0).sum(-1).eq(kept).all()
    # 64 inputs are no multiple of 5: those linears stay dense, 160 are.
    assert len(report.layers) == (3 if group == 5 else 21)
    with pytest.raises(SettingsError, match="--target dense"):
        export(tiny_models("mistral-sliding"), tmp_path / "packed", settings)


def test_unstructured_meets_its_sparsity(tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    settings = PruneSettings(pattern="unstructured:0.5", calibration=str(text_file), samples=4, seqlen=64)
    report = export(tiny_models("qwen3"), tmp_path / "out", settings, target="dense")
    assert all(abs(layer.sparsity - 0.5) < 0.005 for layer in report.layers)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_is_what_is_written(dtype: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = PruneSettings.model_validate({"calibration": "none", "dtype": dtype})
    export(tiny_models("llama-gqa-tied"), tmp_path / "packed", settings)
    export(tiny_models("llama-gqa-tied"), tmp_path / "dense", settings, target="dense")
    types = {entry.dtype_name for entry in Checkpoint(tmp_path / "packed").tensors.values()}
    assert types == {{"float16": "F16", "float32": "F32"}[dtype], "U8"}
    torch_dtype = getattr(torch, dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").dtype == torch_dtype
    assert generate(tmp_path / "packed", torch_dtype) == generate(tmp_path / "dense", torch_dtype)


def test_weights_that_do_not_fit_the_dtype_are_refused(tiny_copy: Path, tmp_path: Path) -> None:
    for tensor in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        model = AutoModelForCausalLM.from_pretrained(tiny_copy)
        model.get_parameter(tensor).data[3] = 1e6
        model.save_pretrained(tmp_path / "large")
        settings = PruneSettings(calibration="none", dtype="float16")
        with pytest.raises(SettingsError, match=f"--dtype float16: {tensor} holds .*, which does not fit"):
            export(tmp_path / "large", tmp_path / "out", settings)
        assert not (tmp_path / "out.partial").exists()


def test_ignored_linears_stay_as_they_are(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_models("llama-gqa-tied")
    settings = PruneSettings(calibration="none", ignore=r"lm_head|embed|layers\.0\.|down_proj")
    report = export(source, tmp_path / "out", settings)
    names = {layer.name for layer in report.layers}
    assert names
    assert not any("layers.0." in name or "down_proj" in name for name in names)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(before.read([key])[key], after.read([key])[key])
    assert len(generate(tmp_path / "out")) == 29


COMPRESSED_TENSORS = Path(sys.prefix) / "compressed-tensors-0.14"


@pytest.mark.skipif(not COMPRESSED_TENSORS.exists(), reason="make test installs compressed-tensors 0.14.0.1")
def test_bitmask_target_is_what_compressed_tensors_reads(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = PruneSettings(calibration="none")
    report = export(tiny_models("qwen2"), tmp_path / "bitmask", settings, target="sparse24-bitmask")
    export(tiny_models("qwen2"), tmp_path / "dense", settings, target="dense")
    assert report.linear_bytes_after < report.linear_bytes_before * 9 / 16 * 1.01  # and the shapes, 16 bytes each

    code = f"""
import sys
sys.path.insert(0, {str(COMPRESSED_TENSORS)!r})
import compressed_tensors, torch
from compressed_tensors.compressors import ModelCompressor
from transformers import AutoModelForCausalLM
assert compressed_tensors.__version__.startswith("0.14.0")
dense = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
model = AutoModelForCausalLM.from_pretrained({str(tiny_models("qwen2"))!r})
compressor = ModelCompressor.from_pretrained({str(tmp_path / "bitmask")!r})
compressor.decompress({str(tmp_path / "bitmask")!r}, model)
want = dense.state_dict()
assert want.keys() == model.state_dict().keys()
print(sum(torch.equal(want[name], tensor) for name, tensor in model.state_dict().items()), len(want))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    same, total = run.stdout.split()[-2:] if run.returncode == 0 else ("", run.stderr)
    assert same == total


def test_bitmask_target_resumes_to_the_same_bytes(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=2, seqlen=32)
    export(tiny_models("qwen2"), tmp_path / "whole", settings, target="sparse24-bitmask")

    def stop(stage: str, done: float, total: float) -> None:
        if stage == "prune" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny_models("qwen2"), tmp_path / "part", settings, target="sparse24-bitmask", progress=stop)
    export(tiny_models("qwen2"), tmp_path / "part", settings, target="sparse24-bitmask", resume=True)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "part" / path.name).read_bytes()


@pytest.mark.parametrize("target", ["packed", "sparse24-bitmask"])
@pytest.mark.parametrize("ignore", [r"0\.self_attn\.k_proj", "gate_proj"])
def test_what_engines_fuse_is_packed_together(
    target: Target, ignore: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = PruneSettings(calibration="none", ignore=ignore)
    with pytest.raises(SettingsError, match=r"stays dense .* would be packed, and engines run them as one layer"):
        export(tiny_models("qwen2"), tmp_path / "out", settings, target=target)
    assert not (tmp_path / "out").exists()
    export(tiny_models("qwen2"), tmp_path / "dense", settings, target="dense")
    export(
        tiny_models("qwen2"),
        tmp_path / "out",
        settings.model_copy(update={"ignore": "[qkv]_proj|o_proj"}),
        target=target,
    )
