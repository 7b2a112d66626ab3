"""Tiny random checkpoints of each architecture, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from swiftprune.kernels.packing import unpack
from swiftprune.models.linears import as_linears
from swiftprune.models.load import auto_class

TEXT = "The pruned weights of a language model leave two of every four inputs. " * 4 + "".join(
    f"Sentence {i} has its own number and the word {'abcdefghij'[i % 10] * (i % 7 + 1)}. " for i in range(400)
)
VOCABULARY = 300

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

QWEN_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
}

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SUPPORTED: dict[str, PretrainedConfig] = {
    "llama-mha-untied": LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=False),
    "llama-gqa-tied": LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "mistral-sliding": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=16),
}


def write_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, **save: Any) -> Path:
    """A checkpoint with random weights, larger than transformers' own start so that outputs differ by token."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.to(dtype).save_pretrained(folder, **save)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def masked_twin(source: Path, packed: Any, linears: Iterable[str]) -> Any:
    """The dense model of `source`, in fp32, with what the packed one has of its `linears`."""
    dense = auto_class(AutoConfig.from_pretrained(source)).from_pretrained(source, dtype=torch.float32).eval()
    as_linears(dense)
    for name in linears:
        dense.get_submodule(name).weight.data = unpack(packed.get_submodule(name).packed)
    return dense
