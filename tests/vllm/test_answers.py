"""Packed checkpoints in vLLM answer as the same weights stored dense do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2AudioConfig

from exporters import export
from runtime_bench import demo_data
from swiftprune.config import PruneSettings
from swiftprune.formats.spec import QUANTIZED, Quantized
from swiftprune.kernels import native
from tests import models
from tests.vllm.conftest import Answers, Checkpoints
from tests.vllm.engine import PROMPTS, ROUNDED, TOKENS, TOLERANCE, answers, ask, assert_same, engine


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


def test_a_model_with_a_tower(tmp_path: Path) -> None:
    """For sound: those for images need torchvision, which has no build for this torch on CPUs."""
    size = models.SMALL | {"hidden_size": 128, "num_key_value_heads": 2} | {"model_type": "qwen2"}
    tower = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    none, no_sound = PruneSettings(calibration="none"), {"audio": 0}
    source = models.write_model(tmp_path / "source", Qwen2AudioConfig(text_config=size, audio_config=tower))
    stored = load_file(source / "model.safetensors")
    stored = {name.replace("model.model.model", "model.model"): tensor for name, tensor in stored.items()}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})  # as the hub's, not as 5.19 saves it
    dense, packed = (
        ask(
            Path(export(source, tmp_path / target, none, target=target).out),
            dtype="float32",
            limit_mm_per_prompt=no_sound,
        )
        for target in ("dense", "packed")
    )
    assert assert_same(dense, packed, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS


@pytest.mark.parametrize(
    ("dtype", "devices"), [("float32", 1), ("bfloat16", 1), ("float32", 2)], ids=["float32", "bfloat16", "two-devices"]
)
def test_compiled_or_on_two_devices(dtype: str, devices: int, checkpoints: Checkpoints, dense_answers: Answers) -> None:
    folder = checkpoints("llama-gqa-tied", "packed")
    packed = ask(folder, dtype=dtype, enforce_eager=devices > 1, tensor_parallel_size=devices)
    compared = assert_same(dense_answers("llama-gqa-tied", dtype), packed, TOLERANCE[dtype])
    assert compared >= len(PROMPTS) * TOKENS // 2


@pytest.mark.parametrize("values", QUANTIZED)
def test_quantized_values(
    values: Quantized, quantized: Callable[[Quantized], Path], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what was stored; and on the kernels that round inputs too, about that."""
    folder = quantized(values)
    dense = ask(folder / "dense", dtype="float32")
    fast = ask(folder, dtype="float32")
    kernel = f"{native.QUANT_ISAS[0]}-{values}"
    assert log[0].startswith(f"INFO swiftprune: 12 2:4 linears run on the backend {kernel}. For torch.float32 on cpu")
    assert assert_same(dense, fast, ROUNDED) >= len(PROMPTS) * TOKENS // 4
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")
    exact = ask(folder, dtype="float32")
    assert assert_same(dense, exact, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS
    assert log[-1].startswith(
        "WARNING swiftprune: 12 2:4 linears run on the backend reference-quantized, which unpacks"
    )


def test_quantized_values_compiled_and_on_two_devices(quantized: Callable[[Quantized], Path]) -> None:
    eager = ask(quantized("int8"), dtype="bfloat16")
    compiled = ask(quantized("int8"), dtype="bfloat16", enforce_eager=False)
    # Inputs are rounded to 8 bits, so what bfloat16 rounds otherwise may move them by a step.
    assert assert_same(eager, compiled, ROUNDED) >= len(PROMPTS) * TOKENS // 4
    shared = ask(quantized("int8"), dtype="bfloat16", tensor_parallel_size=2)
    assert assert_same(eager, shared, ROUNDED) >= len(PROMPTS) * TOKENS // 4


@pytest.mark.parametrize("name", ["llama-mha-untied", "gpt-neox"])
def test_heads_in_8_bits(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Beside 16-bit values, not tied, in vLLM's own model and in the one of transformers. Tied ones: see above."""
    source = checkpoints(name, "dense").parent / name
    # A process of its own: vLLM leaves classes of transformers that it has run changed.
    command = Path(sys.executable).with_name("swiftprune-export")
    subprocess.run(
        [command, source, "--out", tmp_path / "out", "--calibration", "none", "--head", "int8"],
        check=True,
        capture_output=True,
    )
    twin = shutil.copytree(checkpoints(name, "dense"), tmp_path / "twin")
    stored = {
        key: tensor for shard in (tmp_path / "out").glob("*.safetensors") for key, tensor in load_file(shard).items()
    }
    ends = {
        key: (tensor.float() * stored[f"{key}_scale"].float())
        for key, tensor in stored.items()
        if tensor.dtype == torch.int8
    }
    assert len(ends) == 2
    for shard in twin.glob("*.safetensors"):
        tensors = load_file(shard)
        save_file({key: ends.get(key, tensor) for key, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    dense, packed = (ask(tmp_path / folder, dtype="float32") for folder in ("twin", "out"))
    assert assert_same(dense, packed, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS


def test_in_the_transformers_that_vllm_brings(checkpoints: Checkpoints) -> None:
    """An older one than that of all other tests."""
    logits = []
    for target in ("packed", "dense"):
        model = AutoModelForCausalLM.from_pretrained(checkpoints("llama-gqa-tied", target), dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(torch.arange(1, 20)[None]).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_by_its_hub_id(hub_id: Path, dense_answers: Answers) -> None:
    assert assert_same(dense_answers("llama-gqa-tied", "float32"), ask(hub_id, dtype="float32"), TOLERANCE["float32"])


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
