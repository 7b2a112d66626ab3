"""LoRA adapters over packed weights, and weights that were never read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from swiftprune.formats.spec import QUANTIZED, Quantized
from tests.vllm.conftest import Checkpoints
from tests.vllm.engine import PROMPTS, TOKENS, TOLERANCE, Answer, answers, ask, assert_same, engine

RANK = 4


def write_adapter(folder: Path, model: Path) -> Path:
    """Random numbers for every linear of a Llama, as peft saves them."""
    config = AutoConfig.from_pretrained(model)
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (outputs, inputs) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": [name.partition(".")[2] for name in shapes],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_answers_with_an_adapter_are_those_of_the_dense_twin(checkpoints: Checkpoints, tmp_path: Path) -> None:
    dense, packed = (checkpoints("llama-gqa-tied", target) for target in ("dense", "packed"))
    adapter = write_adapter(tmp_path / "adapter", dense)
    dense_with, dense_without = with_and_without(dense, adapter)
    packed_with, packed_without = with_and_without(packed, adapter)
    assert assert_same(dense_with, packed_with, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS
    assert assert_same(dense_without, packed_without, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS
    assert [answer.tokens for answer in dense_with] != [answer.tokens for answer in dense_without]


def with_and_without(folder: Path, adapter: Path) -> tuple[list[Answer], list[Answer]]:
    with engine(folder, dtype="float32", enable_lora=True, max_lora_rank=8) as llm:
        return answers(llm, adapter=adapter), answers(llm)


def test_a_load_without_reading(checkpoints: Checkpoints, quantized: Callable[[Quantized], Path]) -> None:
    """To measure a model without its weights; whatever stands in memory is made a valid pair."""
    for target in ("packed", "sparse24-bitmask"):
        found = ask(checkpoints("llama-gqa-tied", target), dtype="float32", load_format="dummy")
        assert [len(answer.tokens) for answer in found] == [TOKENS] * len(PROMPTS)
    for values in QUANTIZED:
        assert len(ask(quantized(values), dtype="float32", load_format="dummy")) == len(PROMPTS)
