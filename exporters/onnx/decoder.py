"""From a dense checkpoint to an ONNX decoder whose KV cache goes in and comes out.

Two ways lead there. onnxruntime-genai's model builder writes the graph that ONNX Runtime runs fastest, of its own fused
operators, for the architectures that it knows. torch.onnx traces every other one, and all of them where only standard
operators will do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from exporters.onnx.last_logits import keep_last
from exporters.onnx.trace import STANDARD_OPSET, trace
from exporters.workspace import disk_errors
from swiftprune.config import DTYPES, DtypeName
from swiftprune.errors import CheckpointError, OutputError, first_line
from swiftprune.models.load import load_whole_model, read_config
from swiftprune.progress import ProgressCallback, no_progress

FUSED_OPSET = 23
"""The first with Attention, RMSNormalization and RotaryEmbedding, which ONNX Runtime runs faster than their parts."""
# Those of the builder's that are compared with transformers in tests -> the kinds of RoPE that it gets right. It takes
# others of Llama's for plain RoPE without a word.
_BUILDER_ROPE = {
    "LlamaForCausalLM": {"default", "llama3"},
    "MistralForCausalLM": {"default"},
    "Qwen2ForCausalLM": {"default"},
    "Qwen3ForCausalLM": {"default"},
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_TOTAL = "total_sequence_length"  # of past and step together


def build_decoder(
    checkpoint: Path,
    out: Path,
    *,
    dtype: DtypeName = "float32",
    standard_ops: bool = False,
    progress: ProgressCallback = no_progress,
) -> str:
    """Writes the causal LM in the folder `checkpoint` (dense) as `out/model.onnx` and `out/model.onnx.data`.

    Inputs: `input_ids` (B, T), `attention_mask` (B, past + T), `position_ids` (B, T), all int64, and
    `past_key_values.I.key` and `.value` (B, heads, past, width), where past may be 0. Outputs: `logits` (B, 1, V) of
    each row's last token, (B, T, V) with `standard_ops`; `present.I.key` and `.value`. All numbers are in `dtype`;
    bfloat16 runs on no CPU in ONNX Runtime.

    The model builder is used for float32 without `standard_ops` where it covers the model and finds a tokenizer, which
    it copies, with a genai_config.json. Its graph has no `position_ids`, takes a mask with zeros at the end only, and
    several tokens after a past in a batch of one only. The other way has no such limits, and writes the model alone.

    Returns what built it: "onnxruntime-genai 0.18.0" or "torch.onnx 2.13.0". Raises CheckpointError when the model
    cannot be exported, OutputError when the disk is full, and SettingsError when a package is missing.
    """
    config = read_config(checkpoint)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if dtype == "float32" and not standard_ops and builder_covers(checkpoint, config):
        run_builder(checkpoint, out, progress=progress)
        with disk_errors(out):
            return f"onnxruntime-genai {_finish_built(out / 'model.onnx', _head_width(config))}"
    return _trace_model(checkpoint, out, DTYPES[dtype], STANDARD_OPSET if standard_ops else FUSED_OPSET, progress)


def builder_covers(checkpoint: Path, config: PretrainedConfig) -> bool:
    """Whether onnxruntime-genai's model builder writes the checkpoint's decoder, and is right about it."""
    architecture = (config.architectures or [""])[0]
    # The builder looks for windows in the list of the layers' kinds only, which Mistral's config does without.
    sliding = architecture == "MistralForCausalLM" and config.sliding_window is not None
    return (
        architecture in _BUILDER_ROPE
        and config.rope_parameters["rope_type"] in _BUILDER_ROPE[architecture]
        and config.hidden_act == "silu"
        and not sliding
        and _head_width(config) % 8 == 0  # or ONNX Runtime does not run its attention
        and any((checkpoint / name).exists() for name in _TOKENIZERS)
        and all(find_spec(package) for package in ("onnx", "onnxruntime_genai"))
    )


def _head_width(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def run_builder(
    checkpoint: Path, out: Path, precision: str = "fp32", *options: str, progress: ProgressCallback = no_progress
) -> None:
    """Calls onnxruntime-genai's model builder for CPUs. `options` are `name=value` of its --extra_options.

    Raises CheckpointError with its last words when it fails.
    """
    progress("build decoder", 0, 1)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.builder-") as scratch:
        command = [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu"),
            *("-i", str(checkpoint.resolve()), "-o", str(out.resolve()), "-c", str(Path(scratch).resolve() / "cache")),
            # A cache of the window's length evicts on its own, which callers that pass a growing past do not expect.
            *("--extra_options", "hf_token=false", "windowed_kv_cache=false", *options),
        ]
        run = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        error = OutputError if "No space left" in run.stderr else CheckpointError
        last = "\n".join((run.stderr.strip() or run.stdout.strip()).splitlines()[-3:])
        raise error(f"{checkpoint}: onnxruntime-genai's model builder failed (exit code {run.returncode}):\n{last}")
    progress("build decoder", 1, 1)


def _finish_built(path: Path, head_width: int) -> str:
    """Makes what the builder wrote valid ONNX, and closes the width of the cache's heads, which it leaves open.

    Returns the builder's version.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for node in graph.node:
        # ONNX Runtime's own, though in ONNX's domain, where the same operator has had another name since FUSED_OPSET.
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"
    next(opset for opset in model.opset_import if not opset.domain).version = FUSED_OPSET
    constants = {node.output[0] for node in graph.node if node.op_type == "Constant"}  # declared with wrong shapes
    declared = [value for value in graph.value_info if value.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(declared)
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "kv_cache_dim":
                size.dim_value = head_width
    # It adds the commit of whatever repository it is installed in.
    model.producer_version = model.producer_version.partition("+")[0]
    keep_last(model)
    onnx.save(model, path)
    return str(model.producer_version)


class DecoderWithCache(nn.Module):
    """A causal LM of transformers with its cache as plain tensors: a key and a value per layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        # Without a config no layer of the cache drops what its sliding window has passed: the mask hides that.
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(past),
            use_cache=True,
        )
        return output.logits, _keys_and_values(output.past_key_values)


def _keys_and_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _trace_model(checkpoint: Path, out: Path, dtype: torch.dtype, opset: int, progress: ProgressCallback) -> str:
    import onnx

    progress("build decoder", 0, 3)
    try:
        model: nn.Module = load_whole_model(checkpoint, dtype=dtype)
    except Exception as error:  # of many types
        raise CheckpointError(f"{checkpoint}: transformers cannot load it: {first_line(error)}") from error
    progress("build decoder", 1, 3)
    try:
        program = _trace_step(model, opset)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {type(model).__name__}: {error}") from error
    progress("build decoder", 2, 3)
    with disk_errors(out):
        program.save(out / "model.onnx", external_data=True)
        if opset == FUSED_OPSET:
            written = onnx.load(out / "model.onnx", load_external_data=False)
            keep_last(written)
            onnx.save(written, out / "model.onnx")
    progress("build decoder", 3, 3)
    return f"torch.onnx {torch.__version__.partition('+')[0]}"


def _trace_step(model: nn.Module, opset: int) -> Any:
    """The torch.onnx.ONNXProgram of one step of the model."""
    rows, length, seen = 2, 3, 5  # any sizes, but neither 0 nor 1, which torch.export would take for constants
    past = [
        tuple(part.new_zeros(rows, part.shape[1], seen, part.shape[3]) for part in layer)
        for layer in _cache_of_one_token(model)
    ]
    positions = torch.arange(seen, seen + length).repeat(rows, 1)
    mask = torch.ones(rows, seen + length, dtype=torch.int64)
    names = [f"{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]
    step, grown = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: _TOTAL}
    kept = {0: "batch_size", 2: "past_sequence_length"}
    program = trace(
        DecoderWithCache(model).eval(),
        (torch.zeros_like(positions), mask, positions, past),
        {},
        opset=opset,
        dynamic_shapes=(step, grown, step, [(kept, kept) for _ in past]),
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        prefix="model.",
    )
    for present in program.model.graph.outputs[1:]:
        present.shape[2] = _TOTAL  # of many spellings: past_sequence_length + sequence_length, and the other way round
    return program


@torch.no_grad()
def _cache_of_one_token(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, for their shapes. Raises CheckpointError when the model's cache is of another kind."""
    try:
        return _keys_and_values(model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values)
    except Exception as error:  # whatever the model's code raises
        raise CheckpointError(f"does not run, or without a cache of keys and values: {first_line(error)}") from error
