"""How vLLM finds the plugin, what the plugin claims, and what it refuses with a message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod

from swiftprune.errors import CheckpointError, FormatError
from swiftprune.serve import vllm as plugin
from swiftprune.serve.vllm.quantization import SwiftpruneConfig, SwiftpruneLinearMethod
from tests.vllm.conftest import Checkpoints
from tests.vllm.engine import ask


def test_registering_is_lazy_and_can_be_repeated() -> None:
    plugin.register()
    plugin.register()
    code = "import sys, swiftprune.serve.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_plugin_vllm_stops(checkpoints: Checkpoints) -> None:
    """Never on wrong weights."""
    code = f"import vllm; vllm.LLM({str(checkpoints('llama-gqa-tied', 'packed'))!r}, max_model_len=64)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"VLLM_PLUGINS": ""}, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "Unknown quantization method: swiftprune" in run.stderr


def damaged(source: Path, folder: Path, shard: str, change: Any) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


SHARD = "model-00001-of-00004.safetensors"
Q = "model.layers.0.self_attn.q_proj"


def test_a_truncated_file_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints("llama-gqa-tied", "packed"), tmp_path / "model"))
    os.truncate(folder / SHARD, 5000)
    with pytest.raises(CheckpointError, match=f"{SHARD}: truncated or damaged"):
        ask(folder)


def put(name: str, index: tuple[int, int], value: float) -> Any:
    return lambda tensors: tensors[name].__setitem__(index, value)


def narrow(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{Q}.weight_meta", (3, 1), 0x45), r"qkv_proj\.weight: metadata of row 3, group 2 is 0x5"),
        (put(f"{Q}.weight", (3, 1), float("nan")), r"qkv_proj\.weight: value \(3, 1\) is nan"),
        (narrow(f"{Q}.weight_meta"), rf"{Q}\.weight_meta is \(256, 31\) beside values"),
    ],
    ids=["not a pair of positions", "not finite", "too narrow"],
)
def test_damaged_tensors_are_named(change: Any, message: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = damaged(checkpoints("llama-gqa-tied", "packed"), tmp_path / "model", SHARD, change)
    with pytest.raises(FormatError, match=message):
        ask(folder)


def test_other_formats_and_versions_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints("llama-gqa-tied", "packed"), tmp_path / "model"))
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=quantization | {"version": 99})
    with pytest.raises(FormatError, match="version 99 of the packed format, but vLLM reads 1, 2 and 3 here"):
        ask(folder)
    edit_config(folder, quantization_config=quantization | {"format": "2:4-cutlass"})
    with pytest.raises(FormatError, match="format '2:4-cutlass'; vLLM can run '2:4' only"):
        ask(folder)
    edit_config(folder, quantization_config=quantization | {"ignore": [Q]})
    with pytest.raises(
        FormatError, match=f"but only {Q} stays dense in this checkpoint; export again with an --ignore"
    ):
        ask(folder)
    edit_config(folder, quantization_config=quantization, intermediate_size=640)
    with pytest.raises(
        FormatError, match=r"weight: the checkpoint's .* does not fit the model's .* is config.json that of"
    ):
        ask(folder)


def empty_linear() -> Any:
    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    torch.nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize(
    ("sparsity", "dense"),
    [
        ({"targets": ["Linear"], "ignore": ["lm_head", "re:.*down_proj$"]}, {"a.down_proj", "lm_head"}),
        ({"targets": ["a.up_proj", "re:a[.]o_.*"]}, {"a.down_proj", "lm_head"}),
        ({}, set()),
    ],
)
def test_what_compressed_tensors_calls_sparse(sparsity: dict[str, Any], dense: set[str]) -> None:
    config = SwiftpruneConfig.from_config({"sparsity_config": {"format": "sparse-24-bitmask"} | sparsity})
    assert config.from_bitmask
    for name in ("a.up_proj", "a.o_proj", "a.down_proj", "lm_head"):
        method = config.get_quant_method(empty_linear(), name)
        assert isinstance(method, UnquantizedLinearMethod if name in dense else SwiftpruneLinearMethod), name


def test_quantized_bitmask_checkpoints_are_left_to_vllm() -> None:
    config = {"sparsity_config": {"format": "sparse-24-bitmask"}, "config_groups": {"group_0": {}}}
    assert SwiftpruneConfig.override_quantization_method(config, None) is None
    assert SwiftpruneConfig.override_quantization_method({"quant_method": "fp8"}, None) is None


def test_inputs_that_cannot_be_shared_out() -> None:
    config = SwiftpruneConfig(["lm_head"])
    layer = empty_linear()
    method: Any = config.get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    assert isinstance(config.get_quant_method(layer, "lm_head"), UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "embed") is None
    with pytest.raises(FormatError, match=r"a share of 36 of its 72 inputs .* use another --tensor-parallel-size"):
        method.create_weights(layer, 36, [8], 72, 8, torch.float32, weight_loader=lambda *_: None)
    method = SwiftpruneConfig([], values="int4").get_quant_method(layer, "model.layers.0.mlp.down_proj")
    with pytest.raises(FormatError, match=r"a share of 160 of its 320 inputs .* must be multiples of 128"):
        method.create_weights(layer, 160, [8], 320, 8, torch.float32, weight_loader=lambda *_: None)
