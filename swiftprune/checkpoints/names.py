"""Which parameter of a model each tensor of a checkpoint is, or helps to make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from swiftprune.checkpoints.shards import TensorEntry
from swiftprune.checkpoints.source import Checkpoint, Decoded


def parameter_names(model: nn.Module, tensors: Iterable[str]) -> dict[str, str]:
    """Tensor of a checkpoint -> parameter of the model, as transformers itself would load it.

    Names differ where a base model was saved without its prefix, or where transformers renamed a module since
    (GPT-NeoX: `embed_out` -> `lm_head`).
    """
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    parameters = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    names = {}
    for tensor in tensors:
        renamed, _ = rename_source_key(tensor, renamings, [], prefix, parameters)
        if renamed not in parameters and tensor in parameters:
            renamed = tensor
        names[tensor] = renamed
    return names


def made_parameters(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Decoded]:
    """The parameters that transformers makes of other tensors of `checkpoint` as it loads them, by name.

    So it joins convolutions that some store apart, and queries, keys and values of towers that others store together.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [change for change in conversions if isinstance(change, WeightRenaming)]
    converters = [change for change in conversions if isinstance(change, WeightConverter)]
    parameters = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    makings: dict[str, list[tuple[str, str]]] = {}
    # In the order in which transformers joins them: experts.2 before experts.10.
    for tensor in sorted(checkpoint.tensors, key=dot_natural_key) if converters else ():
        first, pattern = rename_source_key(tensor, renamings, converters, prefix, parameters)
        if pattern is not None and first in parameters and tensor not in parameters:
            makings.setdefault(first, []).append((tensor, pattern))
    made: dict[str, Decoded] = {}
    for first, sources in makings.items():
        (converter, *_) = (each for each in converters if sources[0][1] in each.source_patterns)
        entries = [checkpoint.tensors[tensor] for tensor, _ in sources]
        if any(entry.dtype is None for entry in entries):
            continue  # which is refused by name where it matters
        on_meta = {
            tensor: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for (tensor, _), entry in zip(sources, entries, strict=True)
        }
        for name, value in _convert(converter, first, sources, on_meta, model).items():
            entry = TensorEntry(entries[0].shard, tuple(value.shape), entries[0].dtype_name, value.nbytes)
            made[name] = Decoded(tuple(on_meta), entry, _reader(converter, first, sources, name, model, checkpoint))
    return made


def _reader(
    converter: Any, first: str, sources: list[tuple[str, str]], name: str, model: nn.Module, checkpoint: Checkpoint
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        return _convert(converter, first, sources, checkpoint.read(tensor for tensor, _ in sources), model)[name]

    return read


def _convert(
    converter: Any, first: str, sources: list[tuple[str, str]], tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """What transformers' `converter` makes of its sources, tensors with their patterns; `first` names it."""
    own = copy.deepcopy(converter)
    for tensor, pattern in sources:
        own.add_tensor(first, tensor, pattern, lambda tensor=tensor: tensors[tensor])
    made = own.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
