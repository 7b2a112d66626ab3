"""Damaged, incomplete and unsupported checkpoints: an error that names what is wrong, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporters import export
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.models.load import load_whole_model
from swiftprune.stages.context import Run
from swiftprune.stages.run import stream_blocks
from tests import models

SETTINGS = PruneSettings(calibration="none")


def open_pipeline(folder: Path) -> Run:
    return Run(Checkpoint.open(folder), SETTINGS)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_shard(keep: float, tiny_copy: Path) -> None:
    path = tiny_copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or damaged"):
        open_pipeline(tiny_copy)


def test_header_with_a_lying_length(tiny_copy: Path) -> None:
    path = tiny_copy / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_pipeline(tiny_copy)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = models.write_model(tmp_path / "sharded", models.SUPPORTED["llama-gqa-tied"], max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name}: missing"):
        open_pipeline(sharded)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"model.layers.9.nothing": "model-00001-of-00003.safetensors"}, "which does not hold it"),
        ({"x": "../outside.safetensors"}, "not a plain file name"),
        ({"x": "absent.safetensors"}, "absent.safetensors: missing"),
        ({"x": "x" * 300}, "xxx: missing"),
    ],
)
def test_index_that_lies(entry: dict[str, str], message: str, sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"] |= {key: first if "00001" in value else value for key, value in entry.items()}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_pipeline(sharded)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "[" * 100_000],
)
def test_index_that_is_not_one(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_pipeline(sharded)


def test_missing_tensor(tiny_copy: Path) -> None:
    edit_tensors(tiny_copy, lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 parameters .* first model\.layers\.1\.self_attn\.v_proj\.weight"):
        open_pipeline(tiny_copy)


def test_wrong_dtype(tiny_copy: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(tiny_copy, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"v_proj\.weight is I8, where the model has numbers of a float type"):
        open_pipeline(tiny_copy)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_embeddings_of_another_type(dtype: torch.dtype, tiny_copy: Path) -> None:
    name = "model.embed_tokens.weight"
    edit_tensors(tiny_copy, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is (I8|BOOL), where the model has"):
        open_pipeline(tiny_copy)


def test_wrong_shape(tiny_copy: Path) -> None:
    edit_config(tiny_copy, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"has shape \(160, 64\), but config.json asks for \(128, 64\)"):
        open_pipeline(tiny_copy)


def test_in_features_that_are_no_multiple_of_four(tmp_path: Path) -> None:
    config = models.SUPPORTED["llama-gqa-tied"].__class__(
        **models.SUPPORTED["llama-gqa-tied"].to_dict() | {"intermediate_size": 90}
    )
    targets = open_pipeline(models.write_model(tmp_path / "odd", config)).targets
    assert targets.dense["model.layers.0.mlp.down_proj"] == "in_features = 90 is not a multiple of 4"
    assert {linear.kind for linear in targets.blocks[0].linears} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }


def test_unknown_architecture(tiny_copy: Path) -> None:
    edit_config(tiny_copy, model_type="frobnicator")
    with pytest.raises(CheckpointError, match=r"config\.json.*frobnicator"):
        open_pipeline(tiny_copy)


def test_encoder_without_causal_language_model(tiny_copy: Path) -> None:
    edit_config(tiny_copy, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(CheckpointError, match="no causal language model for model_type 'vit'"):
        open_pipeline(tiny_copy)


@pytest.mark.parametrize("dtype", ["float64", "int8", 16])
def test_a_type_that_no_weight_multiplies_in(dtype: object, tiny_copy: Path) -> None:
    edit_config(tiny_copy, dtype=dtype)
    with pytest.raises(
        CheckpointError, match=rf"config\.json: its dtype is {dtype}, .* --dtype: bfloat16, float16, float32"
    ):
        open_pipeline(tiny_copy)
    Run(Checkpoint.open(tiny_copy), PruneSettings(calibration="none", dtype="bfloat16"))


def test_an_empty_quantization_is_none(tiny_copy: Path) -> None:
    edit_config(tiny_copy, quantization_config={})
    load_whole_model(tiny_copy)


@pytest.mark.parametrize("value", ["awq", [4], {"sparsity_config": "2:4"}, {"sparsity_config": [1]}])
def test_a_quantization_that_says_nothing(value: object, tiny_copy: Path) -> None:
    edit_config(tiny_copy, quantization_config=value)
    with pytest.raises(CheckpointError, match=r"config\.json: its quantization_config is no object"):
        open_pipeline(tiny_copy)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "64"}, {"num_attention_heads": 0}, {"num_hidden_layers": -1}, {"vocab_size": None}]
)
def test_config_values_that_are_none(changes: dict[str, object], tiny_copy: Path) -> None:
    edit_config(tiny_copy, **changes)
    with pytest.raises(CheckpointError):
        open_pipeline(tiny_copy)


def test_fewer_blocks_in_the_config_than_in_the_weights(tiny_copy: Path, text_file: Path, tmp_path: Path) -> None:
    """The rest would be written dense, and no engine would run it."""
    edit_config(tiny_copy, num_hidden_layers=2, layer_types=None)
    with pytest.raises(
        CheckpointError, match=r"holds model\.layers\.2\.\S+, but by config\.json \(num_hidden_layers\)"
    ):
        open_pipeline(tiny_copy)
    # Blocks that predict further tokens are known to the config, and stay as they are.
    edit_config(tiny_copy, num_nextn_predict_layers=1)
    report = export(tiny_copy, tmp_path / "out", PruneSettings(calibration="none"))
    further = {name for name, why in report.dense_linears.items() if "predicts further tokens" in why}
    assert "model.layers.2.mlp.down_proj" in further
    assert {layer.name.split(".")[2] for layer in report.layers} == {"0", "1"}


def test_already_quantized(tiny_copy: Path) -> None:
    edit_config(tiny_copy, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="already quantized or packed by 'gptq'"):
        open_pipeline(tiny_copy)


def test_folders_that_hold_no_checkpoint(tiny_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        Checkpoint.open(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(CheckpointError, match="empty: is a peft adapter of owner/base, not a model; merge it first"):
        Checkpoint.open(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(tiny_copy / "config.json")
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    (tiny_copy / "model.safetensors").rename(tiny_copy / "model-q8_0.gguf")
    with pytest.raises(CheckpointError, match=r"model-q8_0\.gguf: convert it first"):
        Checkpoint.open(tiny_copy)


def test_weights_of_torch_save(tiny_copy: Path, tmp_path: Path) -> None:
    """As older repositories hold them: to the same bytes as from safetensors."""
    export(tiny_copy, tmp_path / "wanted", SETTINGS)
    stored = load_file(tiny_copy / "model.safetensors")
    (tiny_copy / "model.safetensors").unlink()
    embeddings = stored.pop("model.embed_tokens.weight")
    shards: dict[str, dict[str, torch.Tensor]] = {  # tied weights in one piece of memory, others not contiguous
        "pytorch_model-00001-of-00002.bin": {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings},
        "pytorch_model-00002-of-00002.bin": {"rotary.steps": torch.tensor(3)}
        | {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in stored.items()},
    }
    for shard, tensors in shards.items():
        torch.save(tensors, tiny_copy / shard)
    placed = {name: shard for shard, tensors in shards.items() for name in tensors}
    (tiny_copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    export(tiny_copy, tmp_path / "out", SETTINGS)
    ours, wanted = (Checkpoint(tmp_path / name) for name in ("out", "wanted"))
    assert ours.read(["rotary.steps"])["rotary.steps"] == 3
    for name, tensor in wanted.read(wanted.tensors).items():
        assert torch.equal(ours.read([name])[name], tensor), name
    assert not list((tmp_path / "out").glob("*.bin*"))


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(Path.cwd() / "written-by-a-pickle"), "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.embed_tokens.weight": _Harmful()}, "would run code that it holds"),
        ([torch.ones(2)], "is no dictionary of tensors by name"),
        ({"steps": 3}, "is no dictionary of tensors by name"),
        (None, r"truncated or damaged \(.*; 100 bytes on disk\)"),
    ],
)
def test_damaged_or_harmful_weights_of_torch_save(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(tiny_copy)
    path = tiny_copy / "pytorch_model.bin"
    (tiny_copy / "model.safetensors").unlink()
    torch.save(content or {"a": torch.ones(100)}, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tiny_copy)
    assert not (tiny_copy / "written-by-a-pickle").exists()
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"is not as torch.save has written since"):
        Checkpoint.open(tiny_copy)


def test_hub_id_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder here, and the hub could not be read"):
        Checkpoint.open("nobody/nothing")


def test_hub_id_in_the_cache(monkeypatch: pytest.MonkeyPatch, tiny_copy: Path, tmp_path: Path) -> None:
    """The layout that huggingface_hub keeps: found offline, and named by its id."""
    repository = tmp_path / "cache" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    tiny_copy.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint.open("owner/tiny")
    assert checkpoint.name == "owner/tiny"
    assert len(Run(checkpoint, SETTINGS).targets.blocks) == 3


def test_nothing_left_to_prune(tiny_copy: Path) -> None:
    with pytest.raises(SettingsError, match="nothing to prune"):
        Run(Checkpoint.open(tiny_copy), PruneSettings(calibration="none", ignore="."))


def test_base_model_names_are_found(tiny_copy: Path) -> None:
    """Checkpoints of the bare model lack the prefix `model.`; the output keeps the names of the source."""
    edit_tensors(
        tiny_copy,
        lambda tensors: ([tensors.update({name.removeprefix("model."): tensors.pop(name)}) for name in list(tensors)]),
    )
    blocks = list(stream_blocks(open_pipeline(tiny_copy)))
    assert "layers.0.self_attn.q_proj.weight" in blocks[0].weights
    assert len(blocks) == 3


def test_of_two_sets_of_weights_the_one_that_transformers_loads_is_pruned(
    tiny_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stale file beside the shards of an index, or stale shards beside the file: nobody can tell."""
    model = AutoModelForCausalLM.from_pretrained(tiny_copy, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.neg_()
    model.save_pretrained(tiny_copy / "other", max_shard_size="50KB")
    for file in (tiny_copy / "other").glob("model*"):
        shutil.copy(file, tiny_copy)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_copy, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(tiny_copy).read([name])[name], loaded.get_parameter(name))
    assert "the first is read, as transformers reads it" in caplog.text
