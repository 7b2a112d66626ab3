"""Checkpoints of real shapes with random weights, for memory and speed, where no real ones are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from swiftprune.errors import SettingsError

SHAPES: dict[str, LlamaConfig] = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
}
_POOL = 1 << 25


def write(name: str, folder: Path, *, shard_bytes: int = 1 << 30, seed: int = 0) -> Path:
    """Writes a sharded bf16 checkpoint of the named shape, its weights drawn from one pool of normals under `seed`."""
    if name not in SHAPES:
        raise SettingsError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    config = SHAPES[name]
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()  # accelerate made two of what is one
    shapes = {key: value.shape for key, value in model.named_parameters()}  # tied ones once
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator).mul_(0.02).bfloat16()

    folder.mkdir(parents=True)
    shards: list[dict[str, torch.Size]] = [{}]
    for key, shape in shapes.items():
        if sum(2 * other.numel() for other in shards[-1].values()) + 2 * shape.numel() > shard_bytes and shards[-1]:
            shards.append({})
        shards[-1][key] = shape
    weight_map = {}
    for index, members in enumerate(shards):
        shard = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _draw(pool, shape, generator) for key, shape in members.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(members, shard))
    total = sum(2 * shape.numel() for shape in shapes.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return folder


def _draw(pool: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Consecutive numbers of the pool, round and round, from a random place."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)  # norms
    start = int(torch.randint(len(pool), (1,), generator=generator))
    pieces, needed = [pool[start : start + shape.numel()]], shape.numel()
    while (missing := needed - sum(piece.numel() for piece in pieces)) > 0:
        pieces.append(pool[:missing])
    return torch.cat(pieces).view(shape)
