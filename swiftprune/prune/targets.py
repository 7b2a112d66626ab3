"""Which linears of a model are pruned: found from the module tree, whatever the architecture is called."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.prune.checkpoint import Checkpoint
from swiftprune.sparse24.format import unpackable_reason

DEFAULT_IGNORE = r"lm_head|embed"


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder block: its module name in the model, and its tensor in the checkpoint."""

    name: str
    tensor: str

    @property
    def kind(self) -> str:
        """Its role, e.g. `q_proj`: the last part of the name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Block:
    """One decoder block: the linears to prune and every tensor of the checkpoint that belongs to it."""

    name: str
    linears: list[Linear]
    tensors: list[str]


@dataclass(frozen=True)
class Targets:
    """The work: blocks in order, linears that stay dense with the reason, and tensors outside of the blocks."""

    blocks: list[Block]
    dense: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)


def empty_model(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's causal LM with parameters on the meta device and real buffers (rotary tables and the like).

    Raises CheckpointError when transformers does not know the architecture.
    """
    config = _read_config(checkpoint.folder)
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, ImportError) as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(
            f"{checkpoint.folder}: transformers has no causal language model for model_type "
            f"{checkpoint.config.get('model_type')!r}: {first_line}"
        ) from error
    return model.eval()


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
        return config
    except Exception as error:  # transformers raises many types here, all meaning the same to the user
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it: {first_line}") from error


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder blocks: the outermost ModuleList of the model with the most parameters."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if not outermost:
        raise CheckpointError(f"{type(model).__name__}: has no list of decoder blocks (no ModuleList)")
    return max(outermost, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def compile_ignore(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SettingsError(f"--ignore {pattern!r}: not a regular expression ({error})") from error


def find_targets(model: nn.Module, checkpoint: Checkpoint, *, ignore: str, group: int) -> Targets:
    """Finds the linears of every decoder block and matches the model with the checkpoint.

    `ignore` is searched in full module names; `group` is the M of N:M, which in_features must be a multiple of.
    Raises CheckpointError when tensors are missing, have a wrong shape or dtype, or when the architecture keeps its
    weights in a form that is not supported (transposed Conv1D, fused mixture-of-experts tensors).
    """
    ignored = compile_ignore(ignore)
    list_name, modules = decoder_blocks(model)
    _match_tensors(model, checkpoint)
    dense: dict[str, str] = {}
    blocks = []
    claimed: set[str] = set()
    for index, module in enumerate(modules):
        block_name = f"{list_name}.{index}"
        linears = []
        for child_name, child in module.named_modules():
            full_name = f"{block_name}.{child_name}"
            _refuse_unsupported(full_name, child, ignored)
            if not isinstance(child, nn.Linear):
                continue
            tensor = _tensor_name(f"{full_name}.weight", model, checkpoint)
            if reason := _dense_reason(full_name, child, checkpoint, tensor, ignored, group):
                dense[full_name] = reason
            else:
                linears.append(Linear(full_name, tensor))
        tensors = sorted(_tensor_prefixed(checkpoint, block_name, model))
        claimed.update(tensors)
        blocks.append(Block(block_name, linears, tensors))
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear) and not name.startswith(f"{list_name}."):
            dense[name] = "outside of the decoder blocks"
    if not any(block.linears for block in blocks):
        raise SettingsError(f"nothing to prune: all linears are ignored or unsuitable ({_first_reason(dense)})")
    return Targets(blocks, dense, sorted(set(checkpoint.tensors) - claimed))


def _first_reason(dense: dict[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in dense.items()), "the blocks hold no linears")


def _dense_reason(
    name: str, module: nn.Linear, checkpoint: Checkpoint, tensor: str, ignored: re.Pattern[str], group: int
) -> str | None:
    if ignored.search(name):
        return f"matches --ignore {ignored.pattern}"
    entry = checkpoint.tensors[tensor]
    if entry.dtype is None:
        raise CheckpointError(
            f"{checkpoint.folder / entry.shard}: {tensor} is {entry.dtype_name}; "
            "pruning needs BF16, F16 or F32 weights, so prune before quantizing"
        )
    if module.in_features % group:
        return f"in_features = {module.in_features} is not a multiple of {group}"
    return unpackable_reason(entry.shape, entry.dtype) if group == 4 else None


def _refuse_unsupported(name: str, module: nn.Module, ignored: re.Pattern[str]) -> None:
    if isinstance(module, Conv1D):
        raise CheckpointError(
            f"{name}: a GPT-2 style Conv1D, which stores its weight transposed (in, out); "
            "such models are not supported, since no engine serves their packed form"
        )
    experts = [key for key, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    if experts or isinstance(module, nn.ModuleList):
        what = f"{name}.{experts[0]}" if experts else name
        raise CheckpointError(
            f"{what}: mixture-of-experts weights; such models are not supported yet, "
            "since their experts are fused into three-dimensional tensors that no 2:4 engine serves"
        )


def _tensor_name(parameter: str, model: nn.Module, checkpoint: Checkpoint) -> str:
    name = checkpoint.tensor_name(parameter, model)
    if name is None:
        raise CheckpointError(f"{checkpoint.folder}: holds no tensor for {parameter}")
    return name


def _tensor_prefixed(checkpoint: Checkpoint, block_name: str, model: nn.Module) -> list[str]:
    """Every tensor under the block, extra ones (saved rotary tables, say) included."""
    prefix: Any = getattr(model, "base_model_prefix", "")
    prefixes = (f"{block_name}.", f"{block_name.removeprefix(f'{prefix}.')}.")
    return [name for name in checkpoint.tensors if name.startswith(prefixes)]


def _match_tensors(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Every parameter needs its tensor in the right shape, tied ones (lm_head on the embeddings) excepted."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = []
    for parameter, value in model.named_parameters(remove_duplicate=False):
        name = checkpoint.tensor_name(parameter, model)
        if name is None:
            if parameter not in tied:
                missing.append(parameter)
            continue
        entry = checkpoint.tensors[name]
        if entry.shape != tuple(value.shape):
            raise CheckpointError(
                f"{checkpoint.folder / entry.shard}: {name} has shape {entry.shape}, but config.json asks for "
                f"{tuple(value.shape)}"
            )
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} parameters of the model have no tensor, first {missing[0]}"
        )
