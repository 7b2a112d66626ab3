"""Which linears of a model are pruned: found from the module tree, whatever the architecture is called."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call

from swiftprune.checkpoints.names import made_parameters, parameter_names
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import CheckpointError, SettingsError, first_line
from swiftprune.formats.spec import unpackable_reason
from swiftprune.models.architectures import CROSS_ATTENTION, MULTIPLIED_DIRECTLY, ROUTERS
from swiftprune.models.experts import is_stacked, unseparable_reason
from swiftprune.models.ignore import DEFAULT_IGNORE, Ignore, compile_ignore
from swiftprune.models.linears import stored_parts
from swiftprune.models.load import auto_class, read_config

# Of the blocks' weights, what may be no linears.
_MOST = 0.5


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
    tensor_of: dict[str, str]
    """Parameter of the model -> tensor of the checkpoint."""
    embedding: str
    """Tensor of the input embeddings."""
    head: str
    """Tensor of the output head: the same where the two are tied, and empty where the checkpoint has none."""
    dense_ends: str | None
    """Why embeddings and head cannot be stored in 8 bits; None where they can."""
    dense: dict[str, str] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    towers: list[str] = field(default_factory=list)
    """Of these, tensors that text does not go through: of encoders for images or sound."""


def empty_model(checkpoint: Checkpoint) -> tuple[nn.Module, Checkpoint]:
    """The checkpoint's language model with parameters on the meta device and real buffers (rotary tables and the like).

    All weights are in linears, in the model and in the view of the checkpoint that comes with it: see `as_linears`.

    Raises CheckpointError when transformers does not know the architecture.
    """
    config = read_config(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = auto_class(config).from_config(
                config, dtype=torch.float32, trust_remote_code=checkpoint.trust_remote_code
            )
    except Exception as error:  # of many types, where values of config.json do not fit together
        raise CheckpointError(
            f"{checkpoint.folder}: transformers has no causal language model for model_type "
            f"{checkpoint.config.get('model_type')!r}: {first_line(error)}"
        ) from error
    parts = stored_parts(model, checkpoint.tensors)
    checkpoint = checkpoint.split(parts) if parts else checkpoint
    return model.eval(), checkpoint.with_made(made_parameters(model, checkpoint))


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder blocks: an outermost ModuleList of the language model.

    Where there are several, as of encoders for images or sound: one as long as config.json says, the nearest to the
    top, the one with the most parameters.
    """
    inside = _decoder_prefix(model)
    every = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in every if name.startswith(inside)] or every
    outermost = [
        (name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if not outermost:
        raise CheckpointError(f"{type(model).__name__}: has no list of decoder blocks (no ModuleList)")
    config: Any = model.config
    length = getattr(config.get_text_config(), "num_hidden_layers", None)

    def likely(item: tuple[str, nn.ModuleList]) -> tuple[bool, int, int]:
        name, modules = item
        return len(modules) == length, -name.count("."), sum(p.numel() for p in modules.parameters())

    return max(outermost, key=likely)


def _decoder_prefix(model: nn.Module) -> str:
    """What the names of all that is in the language model begin with; its head and towers are beside it."""
    causal: Any = model
    decoder = causal.get_decoder() if hasattr(model, "get_decoder") else None
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def find_targets(model: nn.Module, checkpoint: Checkpoint, *, ignore: str, group: int) -> Targets:
    """Finds the linears of every decoder block and matches the model with the checkpoint.

    `ignore` is as in `Ignore`; `group` is the M of N:M, which in_features must be a multiple of.
    Raises CheckpointError when tensors are missing, have a wrong shape or dtype, or when the architecture keeps its
    weights in a form that is not supported (some forms of experts).
    """
    ignored = compile_ignore(ignore)
    if ignore != DEFAULT_IGNORE:
        ignored.check(name for name, _ in model.named_modules())
    list_name, modules = decoder_blocks(model)
    stacked = _stacked(list_name, modules)
    plain = _plain_linears(modules)
    parameter_of = parameter_names(model, checkpoint.tensors)
    tensor_of = {parameter: tensor for tensor, parameter in parameter_of.items()}
    _match_tensors(model, checkpoint, tensor_of)
    dense = stacked | _further_blocks(model, checkpoint, f"{list_name}.", len(modules), tensor_of)
    blocks = []
    claimed: set[str] = set()
    for index, module in enumerate(modules):
        block_name = f"{list_name}.{index}"
        linears = []
        for child_name, child in module.named_modules():
            name = f"{block_name}.{child_name}"
            if not isinstance(child, nn.Linear):
                if _is_router(child):  # which engines may well make a linear of
                    dense[name] = "it chooses experts"
                continue
            tensor = tensor_of[f"{name}.weight"]
            if reason := _dense_reason(name, child, checkpoint, tensor, ignored, group, plain):
                dense[name] = reason
            else:
                linears.append(Linear(name, tensor))
        tensors = sorted(tensor for tensor, name in parameter_of.items() if name.startswith(f"{block_name}."))
        claimed.update(tensors)
        blocks.append(Block(block_name, linears, tensors))
    for name, child in model.named_modules():
        if isinstance(child, nn.Linear) and not name.startswith(f"{list_name}."):
            dense[name] = "outside of the decoder blocks"
    if not any(block.linears for block in blocks):
        raise SettingsError(f"nothing to prune: all linears are ignored or unsuitable ({_first_reason(dense)})")
    outside = sorted(set(checkpoint.tensors) - claimed)
    embedding, head = _ends(model, tensor_of)
    inside = _decoder_prefix(model)
    beside = {tensor for name, tensor in tensor_of.items() if not name.startswith(inside)} - {embedding, head}
    towers = [tensor for tensor in outside if tensor in beside]
    made = next((f"{end} is made as it is loaded" for end in (embedding, head) if end in checkpoint.made), None)
    dense_ends = made or _dense_ends(model, tensor_of)
    return Targets(blocks, tensor_of, embedding, head, dense_ends, dense, outside, towers)


def _is_router(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _dense_ends(model: Any, tensor_of: dict[str, str]) -> str | None:
    """See `Targets.dense_ends`: engines may do more there than look rows up and multiply by them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, plain in ((embedding, nn.Embedding), (head, nn.Linear)):
        if type(module) is not plain:
            return f"{type(model).__name__} has {type(module).__name__} in the place of {plain.__name__}"
    name = next(name for name, module in model.named_modules() if module is embedding)
    stored = tensor_of.get(f"{name}.weight", "")  # of tied ones some checkpoints hold the head
    return None if stored.endswith(f"{name.rpartition('.')[2]}.weight") else f"the embeddings are stored as {stored}"


def _ends(model: nn.Module, tensor_of: dict[str, str]) -> tuple[str, str]:
    """The tensors of the input embeddings and of the output head."""
    causal: Any = model
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    names = [next((name for name, module in model.named_modules() if module is end), "") for end in ends]
    embedding, head = f"{names[0]}.weight", f"{names[1]}.weight"
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = [tensor_of.get(name) or tensor_of.get(tied.get(name, "")) or "" for name in (embedding, head)]
    if not stored[0]:
        raise CheckpointError(f"{type(model).__name__}: no tensor of the checkpoint is {embedding}, its embeddings")
    return stored[0], stored[1]


def _further_blocks(
    model: nn.Module, checkpoint: Checkpoint, within: str, count: int, tensor_of: Mapping[str, str]
) -> dict[str, str]:
    """Modules, with the reason to leave them dense, of blocks behind the model's `count`: they predict further tokens.

    Raises CheckpointError when config.json knows nothing of such blocks: then it has too few.
    """
    config: Any = model.config
    further = getattr(config.get_text_config(), "num_nextn_predict_layers", None) or 0
    dense = {}
    for name, tensor in tensor_of.items():
        number = name.removeprefix(within).partition(".")[0]
        if not (name.startswith(within) and number.isdigit() and int(number) >= count):
            continue
        if int(number) >= count + further:
            raise CheckpointError(
                f"{checkpoint.folder}: holds {tensor}, but by config.json (num_hidden_layers) the model has {count} "
                "blocks; put back the config.json that belongs to these weights"
            )
        if name.endswith(".weight") and len(checkpoint.tensors[tensor].shape) == 2:
            dense[name.removesuffix(".weight")] = "in a block that predicts further tokens, which is not pruned"
    return dense


def _head(model: nn.Module) -> nn.Module:
    causal: Any = model
    head: nn.Module = causal.get_output_embeddings() or nn.Module()
    return head


def _first_reason(dense: dict[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in dense.items()), "the blocks hold no linears")


def _dense_reason(
    name: str,
    module: nn.Linear,
    checkpoint: Checkpoint,
    tensor: str,
    ignored: Ignore,
    group: int,
    plain: set[type[nn.Linear]],
) -> str | None:
    kind = name.rpartition(".")[2]
    if kind in MULTIPLIED_DIRECTLY:
        return "its module multiplies by the weight itself"
    if type(module) not in plain:
        return f"it is a {type(module).__name__}, which multiplies in a way of its own"
    if not ROUTERS.isdisjoint(name.split(".")[-2:]):
        return "it chooses experts"
    if set(name.split(".")) & CROSS_ATTENTION:
        return "it reads the states of an encoder, which a causal language model does not have"
    if ignored.search(name):
        return f"matches --ignore {ignored.pattern}"
    if tensor in checkpoint.made:
        return f"it is made of {', '.join(checkpoint.made[tensor].stored)} as it is loaded"
    entry = checkpoint.tensors[tensor]
    if entry.dtype is None:
        raise CheckpointError(
            f"{checkpoint.folder / entry.shard}: {tensor} is {entry.dtype_name}; "
            "pruning needs BF16, F16 or F32 weights: prune before quantizing, or convert it"
        )
    if module.in_features % group:
        return f"in_features = {module.in_features} is not a multiple of {group}"
    return unpackable_reason(entry.shape, entry.dtype) if group == 4 else None


def _plain_linears(modules: nn.Module) -> set[type[nn.Linear]]:
    """The classes of linears that give x W^T + b; of each the smallest linear is asked."""
    smallest: dict[type[nn.Linear], nn.Linear] = {}
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            known = smallest.setdefault(type(module), module)
            if module.weight.numel() < known.weight.numel():
                smallest[type(module)] = module
    return {kind for kind, module in smallest.items() if _multiplies_as_linear(module)}


def _multiplies_as_linear(module: nn.Linear) -> bool:
    """Whether it gives x W^T + b; one with a forward of its own is asked on numbers."""
    if type(module).forward is nn.Linear.forward:
        return True
    parameters = {name: torch.randn(parameter.shape) for name, parameter in module.named_parameters()}
    x = torch.randn(2, module.in_features)
    try:
        y = functional_call(module, parameters, x)
    except Exception:  # of any type, for inputs of another kind
        return False
    wanted = F.linear(x, parameters["weight"], parameters.get("bias"))
    return isinstance(y, Tensor) and y.shape == wanted.shape and torch.allclose(y, wanted, rtol=1e-3, atol=1e-3)


def _stacked(list_name: str, modules: nn.ModuleList) -> dict[str, str]:
    """Modules of the blocks whose weights are no linears, with the reason; they stay dense.

    Raises CheckpointError where they hold most of the blocks' weights.
    """
    found = {f"{list_name}.{name}": module for name, module in modules.named_modules() if name and is_stacked(module)}
    reasons = {name: unseparable_reason(module) or "it is no linear" for name, module in found.items()}
    size = sum(parameter.numel() for module in found.values() for parameter in module.parameters(recurse=False))
    share = size / max(1, sum(parameter.numel() for parameter in modules.parameters()))
    if share > _MOST:
        name, reason = next(iter(reasons.items()))
        raise CheckpointError(
            f"{name}: {share:.0%} of the decoder's weights are no linears, which cannot be pruned: {reason}"
        )
    return reasons


def _match_tensors(model: nn.Module, checkpoint: Checkpoint, tensor_of: dict[str, str]) -> None:
    """Every parameter needs its tensor in the right shape, or one that it is tied to, under either name.

    `tensor_of` gets those of parameters that are stored under the other name only. A head may be missing.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    partners = defaultdict(list, {source: [name for name in tied if tied[name] == source] for source in tied.values()})
    head = {id(parameter) for parameter in _head(model).parameters()}
    missing = []
    for parameter, value in model.named_parameters(remove_duplicate=False):
        if parameter not in tensor_of:
            if other := next((name for name in partners[parameter] if name in tensor_of), None):
                tensor_of[parameter] = tensor_of[other]
            elif parameter in checkpoint.made:
                tensor_of[parameter] = parameter
            elif parameter not in tied and id(value) not in head:
                missing.append(parameter)
            continue
        tensor = tensor_of[parameter]
        entry = checkpoint.tensors[tensor]
        if not re.match(r"F\d|BF", entry.dtype_name):
            raise CheckpointError(
                f"{checkpoint.folder / entry.shard}: {tensor} is {entry.dtype_name}, where the model has numbers of a "
                "float type: the checkpoint is quantized or damaged; prune the original one"
            )
        if entry.shape != tuple(value.shape):
            raise CheckpointError(
                f"{checkpoint.folder / entry.shard}: {tensor} has shape {entry.shape}, but config.json asks for "
                f"{tuple(value.shape)}"
            )
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(missing)} parameters of the model have no tensor, first {missing[0]}"
        )
