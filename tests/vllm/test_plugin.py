"""Packed checkpoints in vLLM answer as the same weights stored dense do, and damaged ones do not start."""

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

from exporters import export
from runtime_bench import demo_data
from swiftprune.errors import CheckpointError, FormatError
from swiftprune.pruning.pipeline import PruneSettings
from swiftprune.serve import vllm as plugin
from swiftprune.serve.vllm.quantization import SwiftpruneConfig, SwiftpruneLinearMethod
from swiftprune.sparse24.kernels import native
from tests.vllm.conftest import Answers, Checkpoints
from tests.vllm.engine import PROMPTS, TOKENS, TOLERANCE, answers, ask, assert_same, engine


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen2", "mistral-sliding", "gpt-neox"])
def test_answers_of_the_dense_model(
    name: str, dtype: str, checkpoints: Checkpoints, dense_answers: Answers, log: list[str]
) -> None:
    dense = dense_answers(name, dtype)
    assert not log
    packed = ask(checkpoints(name, "packed"), dtype=dtype)
    compared = assert_same(dense, packed, TOLERANCE[dtype])
    assert compared >= (len(PROMPTS) * TOKENS if dtype == "float32" else len(PROMPTS) * TOKENS // 2)
    # Three layers of qkv, o, gate and up, down; GPT-NeoX has no gate.
    fastest = native.linear_isas(getattr(torch, dtype))[0]
    assert [line.split(". For")[0] for line in log] == [f"INFO swiftprune: 12 2:4 linears run on the backend {fastest}"]


@pytest.mark.parametrize(
    ("dtype", "devices"), [("float32", 1), ("bfloat16", 1), ("float32", 2)], ids=["float32", "bfloat16", "two-devices"]
)
def test_compiled_and_on_two_devices(
    dtype: str, devices: int, checkpoints: Checkpoints, dense_answers: Answers
) -> None:
    packed = ask(
        checkpoints("llama-gqa-tied", "packed"), dtype=dtype, enforce_eager=False, tensor_parallel_size=devices
    )
    compared = assert_same(dense_answers("llama-gqa-tied", dtype), packed, TOLERANCE[dtype])
    assert compared >= len(PROMPTS) * TOKENS // 2


def test_a_cached_prefix_changes_nothing(checkpoints: Checkpoints) -> None:
    long = [[*range(5, 100)]]
    with engine(checkpoints("llama-gqa-tied", "packed"), dtype="float32", block_size=32) as llm:
        first, second = answers(llm, long), answers(llm, long)
        cached = llm.generate([{"prompt_token_ids": long[0]}], use_tqdm=False)[0].num_cached_tokens
    assert (cached or 0) >= 64
    assert first[0].tokens == second[0].tokens


def test_old_bitmask_checkpoints_are_claimed(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama-gqa-tied", "sparse24-bitmask")
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    packed, old = ask(checkpoints("llama-gqa-tied", "packed"), dtype="bfloat16"), ask(folder, dtype="bfloat16")
    assert [answer.tokens for answer in packed] == [answer.tokens for answer in old]


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    source = demo_data.fetch(Path("build/demo")).model
    for target in ("dense", "packed"):
        export(source, tmp_path / target, PruneSettings(calibration="none"), target=target)
    dense, packed = (ask(tmp_path / target, dtype="bfloat16") for target in ("dense", "packed"))
    assert assert_same(dense, packed, TOLERANCE["bfloat16"]) >= len(PROMPTS) * TOKENS // 2


def test_a_backend_asked_for_is_named(
    checkpoints: Checkpoints, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "generic")
    ask(checkpoints("qwen2", "packed"), dtype="bfloat16")
    assert "12 2:4 linears run on the backend generic. SWIFTPRUNE_BACKEND=generic asks for it" in log[0]
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")
    ask(checkpoints("qwen2", "packed"), dtype="bfloat16")
    assert log[1].startswith("WARNING swiftprune: 12 2:4 linears run on the backend reference, which unpacks")


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
        (narrow(f"{Q}.weight_meta"), rf"{Q}\.weight_meta is \(256, 31\) U8 beside values"),
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
    with pytest.raises(FormatError, match="version 99 of the packed format, but this swiftprune reads version 1"):
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
