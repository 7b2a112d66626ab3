"""Loads a whole model with transformers, for what cannot run block by block: sampling, distillation, evaluation.

Two things that a checkpoint's own files set are taken back, since they would leak into what is measured and sampled:
generation settings (`repetition_penalty`, `top_k` and so on; only its special tokens stay) and the attention
implementation (`flash_attention_2` asks for a package that this needs nothing of).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PretrainedConfig,
)

from swiftprune.checkpoints import fp8
from swiftprune.checkpoints.source import Checkpoint, stores_plain_weights
from swiftprune.errors import CheckpointError, first_line

# Up to this size models run in fp32, which is faster than bf16 on CPUs without bf16 matrix units.
FP32_PARAMETERS = 1_000_000_000


def load_whole_model(
    folder: Path,
    parameter_count: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> Any:
    """The language model in `folder`, in eval mode, that generates by no settings but those given to `generate`.

    In `dtype`, or without one in fp32 when it has at most FP32_PARAMETERS, else in its own type.
    """
    small = parameter_count is not None and parameter_count <= FP32_PARAMETERS
    chosen: Any = dtype or (torch.float32 if small else "auto")
    config = read_config(folder, trust_remote_code=trust_remote_code)
    quantization: Any = getattr(config, "quantization_config", None) or {}
    if is_fp8 := quantization.get("quant_method") == fp8.METHOD:
        fp8.check_loads_whole(Checkpoint(folder))
        quantization["dequantize"] = True  # as transformers does by itself only where no GPU multiplies fp8
    model = auto_class(config).from_pretrained(folder, config=config, dtype=chosen, trust_remote_code=trust_remote_code)
    if is_fp8 and chosen != "auto":
        model = model.to(chosen)  # what was fp8 is bfloat16 else
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    return model.eval()


def auto_class(config: PretrainedConfig) -> Any:
    """Of transformers' Auto classes, the one that makes the model that `config` says it is of.

    A language model with towers for images or sound stays whole: the folder it came from is loaded by its own class,
    and so is the result. Without such inputs it runs on text.
    """
    kind, with_towers = type(config), AutoModelForMultimodalLM._model_mapping
    if kind not in with_towers:
        return AutoModelForCausalLM
    named = with_towers[kind].__name__ in (config.architectures or ())
    has_other = kind in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if has_other and not named else AutoModelForMultimodalLM


def context_length(config: PretrainedConfig) -> int | None:
    """How many tokens the model was made for; None where its config does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def vocabulary_size(model: Any) -> int:
    """How many logits a token has."""
    size: int = model.config.get_text_config().vocab_size
    return size


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """transformers' reading of config.json, attention left to it. Raises CheckpointError when it cannot read it."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here, all meaning the same to the user
        hint = ""
        if "trust_remote_code" in str(error):
            hint = "; if you trust that code, add --trust-remote-code"
        elif "does not recognize this architecture" in str(error):
            hint = "; a newer transformers may know it: pip install --upgrade transformers"
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot read it: {first_line(error)}{hint}"
        ) from error
    config._attn_implementation = None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and (not quantization or stores_plain_weights(quantization)):
        del config.quantization_config  # else transformers wants the package that wrote it, or that it names one
    return config
