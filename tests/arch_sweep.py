"""Every causal or multimodal language model that transformers knows, tiny and random, from export to packed logits.

`python -m tests.arch_sweep docs/models.md` (make arch-sweep, ten minutes or more) writes the table of what came
through. A config is made small by the names of its fields, and by hand where that does not do.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from exporters import export
from swiftprune.config import PruneSettings
from swiftprune.errors import SwiftpruneError, first_line
from swiftprune.models.load import auto_class
from tests import models

TOLERANCE = 2e-2  # relative, of logits in bfloat16
LARGEST = 100_000_000  # parameters of a model that counts as small
LAYERS = 2
_LENGTHS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
# Fields of configs, by the many names that they have.
_SMALL: dict[str, int] = {
    name: size
    for size, names in {
        64: "hidden_size d_model n_embd dim moe_intermediate_size shared_expert_intermediate_size word_embed_proj_dim "
        "embedding_size attention_hidden_size lru_width expert_ffn_hidden_size out_hidden_size text_hidden_size "
        "audio_hidden_size",
        128: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size ff_proj mlp_hidden_size decoder_ffn_dim "
        "encoder_ffn_dim",
        LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_query_groups "
        "num_experts_per_tok moe_topk",
        4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts",
        16: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state rotary_dim",
        32: "q_lora_rank kv_lora_rank qk_head_dim hidden_size_per_layer_input",
        models.VOCABULARY: "vocab_size vocab_size_per_layer_input",
        256: "max_position_embeddings n_positions n_ctx",
        1: "n_shared_experts first_k_dense_replace n_group topk_group",
        0: "pad_token_id bos_token_id",
    }.items()
    for name in names.split()
} | {"eos_token_id": 1, "expand": 2}

_THROUGH = "Came through: "
_MAY_BE_NONE = {
    "head_dim",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "num_key_value_heads",
}
_ROTARY_SECTIONS = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm_ocr", "paddleocr_vl", "ernie4_5_vl")
_WIDER_HEADS = {"per_layer_config": {1: {"head_dim": 32}}}
_STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 16}
_OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "bamba": _STATE_SPACE | {"layers_block_type": ["mamba", "attention"], "attn_layer_indices": [1]},
    "granitemoehybrid": _STATE_SPACE,
    "mamba2": {"num_heads": 8},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [128] * LAYERS,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "mistral4": {"head_dim": 32},
    "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 16,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 4,
    },
    "gemma4_text": _WIDER_HEADS,
    "gemma4_unified_text": _WIDER_HEADS,
    "prophetnet": {"num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 48), "axial_pos_shape": (4, 8)},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 16},
}


@dataclass
class Outcome:
    """What became of one architecture."""

    name: str
    state: str
    """`packed` when the packed model gives the logits of the masked one, else the stage that failed."""
    why: str = ""
    linears: int = 0


def small_config(name: str) -> Any:
    """A config of the architecture with two small layers."""
    config = _shrunk(CONFIG_MAPPING[name]())
    if name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        config.architectures = [MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[name]]
    return config


def _shrunk(config: Any) -> Any:
    more = _OF_ITS_OWN.get(config.model_type, {})
    groups = {"num_key_value_heads": 2 if _get(config, "kv_lora_rank") is None else 4}
    wanted: dict[str, Any] = {**_SMALL, **groups, **more}
    for key, value in wanted.items():
        now = _get(config, key)
        fits = isinstance(now, int | float) and not isinstance(now, bool)
        if fits or key in more or (now is None and key in _MAY_BE_NONE and key in config.to_dict()):
            with contextlib.suppress(AttributeError, NotImplementedError):  # of properties
                setattr(config, key, value)
    for key in _LENGTHS:
        if key not in more and isinstance(now := _get(config, key), list | tuple) and len(now) > LAYERS:
            other = next((kind for kind in now if kind != now[0]), now[0])  # of each kind one
            setattr(config, key, [now[0], other])
    for part in getattr(config, "sub_configs", {}):
        if hasattr(_get(config, part), "to_dict"):
            _shrunk(_get(config, part))
    _shrink_rotary_sections(config)
    return config


def _shrink_rotary_sections(config: Any) -> None:
    """Of positions in time, height and width: together they are the pairs that are turned of a head."""
    rotary = _get(config, "rope_parameters")
    if not config.model_type.startswith(_ROTARY_SECTIONS) or not isinstance(rotary, dict):
        return
    size = _get(config, "head_dim") or config.hidden_size // config.num_attention_heads
    pairs = int(size * rotary.get("partial_rotary_factor", 1)) // 2
    third = pairs // 3
    rotary["mrope_section"] = [pairs - 2 * third, third, third]


def _get(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # of a value that differs by layer
        return None


def try_out(name: str, text: Path, folder: Path) -> Outcome:
    """Makes, exports, loads and compares one architecture in `folder`."""
    try:
        config = small_config(name)
        with torch.device("meta"):
            count = sum(p.numel() for p in auto_class(config).from_config(config).parameters())
        if count > LARGEST:
            return Outcome(name, "not built", f"{count / 1e6:.0f}M parameters when shrunk")
        source = models.write_model(folder / "source", config)
        logits(load(source))
    except Exception as error:  # of any type, from any architecture
        return Outcome(name, "not built", f"{type(error).__name__}: {first_line(error)}")
    settings = PruneSettings(calibration=str(text), samples=4, seqlen=32, conversations=0)
    try:
        report = export(source, folder / "packed", settings, check=False)
    except SwiftpruneError as error:
        return Outcome(name, "refused", first_line(error).replace(str(source), "MODEL"))
    except Exception as error:
        return Outcome(name, "export failed", f"{type(error).__name__}: {first_line(error)}")
    try:
        packed = load(folder / "packed")
        dense = models.masked_twin(source, packed, [layer.name for layer in report.layers])
        found, expected = logits(packed), logits(dense)
        difference = float((found - expected).norm() / expected.norm())
    except Exception as error:
        return Outcome(name, "loading failed", f"{type(error).__name__}: {first_line(error)}", len(report.layers))
    if not difference < TOLERANCE:
        return Outcome(name, "wrong logits", f"{difference:.2g} of their size", len(report.layers))
    return Outcome(name, "packed", "", len(report.layers))


def load(folder: Path) -> Any:
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(3, 35)[None], use_cache=False).logits.float()
    return found


def sweep(names: Iterable[str], text: Path) -> list[Outcome]:
    outcomes = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(try_out(name, text, Path(folder)))
        print(outcomes[-1], file=sys.stderr, flush=True)
    return outcomes


def markdown(outcomes: list[Outcome]) -> str:
    """The page: what came through, and why what did not."""
    states = Counter(outcome.state for outcome in outcomes)
    built = len(outcomes) - states["not built"]
    through = ", ".join(outcome.name for outcome in outcomes if outcome.state == "packed")
    lines = [
        "# Architectures",
        "",
        f"Written by `make arch-sweep`, with transformers {transformers.__version__}: a tiny random checkpoint of each "
        f"of its {len(outcomes)} causal and multimodal language models is pruned on text, packed, loaded in "
        "transformers, and its logits compared with those of the dense model with the same masks. "
        f"{built} could be built small, and "
        f"{states['packed']} of them came through.",
        "",
        f"{_THROUGH}{through}.",
        "",
        "| did not | where | why |",
        "| --- | --- | --- |",
    ]
    for outcome in outcomes:
        if outcome.state != "packed":
            why = outcome.why.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {outcome.name} | {outcome.state} | {why} |")
    return "\n".join([*lines, ""])


def came_through(page: Path) -> list[str]:
    """The architectures that `page` says came through."""
    (line,) = [line for line in page.read_text().splitlines() if line.startswith(_THROUGH)]
    return line.removeprefix(_THROUGH).rstrip(".").split(", ")


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    out, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(models.TEXT * 2)
        known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
        outcomes = sweep(names or sorted(known), text)
    Path(out).write_text(markdown(outcomes))


if __name__ == "__main__":
    main()
