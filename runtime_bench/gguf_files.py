"""Checkpoints as llama.cpp reads them: GGUF files of the same weights, in bfloat16 or quantized by llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from runtime_bench.engines import llamacpp_engine
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.models.load import read_config

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
"""Those that are written as llama.cpp's architecture `llama`."""
QUANTIZED = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
"""llama.cpp's numbers (`llama_ftype`) of the types that it quantizes to."""


def write(folder: Path, out: Path) -> None:
    """Writes the checkpoint in `folder` as `out`: matrices in bfloat16, vectors in float32, no tokenizer.

    Raises CheckpointError for an architecture that is not in ARCHITECTURES and SettingsError without the package gguf.
    """
    try:
        import gguf
    except ImportError:
        raise SettingsError("GGUF files need: pip install 'swiftprune[rivals]'") from None
    config = read_config(folder)
    if (name := (config.architectures or ["unknown"])[0]) not in ARCHITECTURES:
        raise CheckpointError(f"{folder}: {name} is not written as GGUF; known: {', '.join(ARCHITECTURES)}")
    checkpoint = Checkpoint(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    aside = out.with_name(f"{out.name}.partial")
    writer = gguf.GGUFWriter(aside, "llama")
    _write_settings(writer, config)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for key, entry in checkpoint.tensors.items():
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise CheckpointError(f"{folder}: {key} has no name in llama.cpp")
        tensor = checkpoint.read([key])[key]
        if ".q_proj." in key:
            tensor = _interleaved(tensor, config.num_attention_heads)
        elif ".k_proj." in key:
            tensor = _interleaved(tensor, config.num_key_value_heads)
        if len(entry.shape) == 1:
            writer.add_tensor(stored, tensor.float().numpy())
        else:
            halves = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(stored, halves, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.rename(out)


def quantize(source: Path, out: Path, file_type: str, threads: int) -> None:
    """Writes `out` with the tensors of the GGUF file `source` quantized by llama.cpp to one of QUANTIZED.

    Raises RuntimeError when llama.cpp fails and SettingsError when it is not installed.
    """
    llama = llamacpp_engine.library()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = QUANTIZED[file_type]
    parameters.nthread = threads
    aside = out.with_name(f"{out.name}.partial")
    if code := llama.llama_model_quantize(str(source).encode(), str(aside).encode(), parameters):
        raise RuntimeError(f"{source}: llama.cpp cannot quantize it to {file_type} (code {code})")
    aside.rename(out)


def token_bytes(path: Path) -> int:
    """Bytes of the tensors that every decoded token reads: all but an embedding that is not the head as well."""
    import gguf

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    return sum(tensors.values()) - (tensors["token_embd.weight"] if "output.weight" in tensors else 0)


def _write_settings(writer: Any, config: PretrainedConfig) -> None:
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")


def _rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What llama.cpp divides the frequencies of plain RoPE by, if anything."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"RoPE of type {kind!r} is not written as GGUF; known: default, llama3")
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    width = 2 * len(scaled)
    plain = float(config.rope_parameters["rope_theta"]) ** -(torch.arange(0, width, 2).float() / width)
    factors: Tensor = plain / scaled
    return factors


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves, as transformers has what RoPE turns together, to neighbours, as llama.cpp does."""
    shape = weight.shape
    return weight.view(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)
