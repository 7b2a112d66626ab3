"""A model whose weights are all in linears: one for each expert of a mixture, and GPT-2's the usual way round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from swiftprune.checkpoints.names import parameter_names
from swiftprune.checkpoints.shards import TensorEntry
from swiftprune.checkpoints.source import Part
from swiftprune.models.experts import separate_experts


def as_linears(model: nn.Module) -> dict[str, Part]:
    """Puts linears in the place of stacked experts and of GPT-2's Conv1D, which share memory with what was there
    where that is in order.

    Returns, by name, the parameters that are new, and where in which of the old ones they were.
    """
    return separate_experts(model) | _turned(model)


def _turned(model: nn.Module) -> dict[str, Part]:
    """GPT-2's Conv1D stores its weight as (in, out)."""
    parts = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            parts[f"{name}.weight"] = part = Part(f"{name}.weight", None, slice(None), transposed=True)
            cols, rows = module.weight.shape
            linear = nn.Linear(cols, rows, device="meta")
            linear.weight = nn.Parameter(part.of(module.weight).detach(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return parts


def stored_parts(model: Any, tensors: Mapping[str, TensorEntry]) -> dict[str, Part]:
    """Does `as_linears`; returns its parts of those `tensors` that a checkpoint stores, by names for a checkpoint.

    Stacked experts may be stored the other way round than in the model, as transformers takes them by their shape.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensor_of = {parameter: tensor for tensor, parameter in parameter_names(model, tensors).items()}
    parts = {}
    for name, part in as_linears(model).items():
        if tensor := tensor_of.get(part.tensor):
            # The checkpoint's prefix, where the rest is as in the model.
            owner, leaf = part.tensor.rpartition(".")[::2]
            stem = tensor.removesuffix(leaf).removesuffix(".") if tensor.endswith(f".{leaf}") else owner
            turned = part.transposed
            if part.index is not None and len(shape := shapes[part.tensor]) == 3 and tensors[tensor].shape != shape:
                turned ^= tensors[tensor].shape == (shape[0], shape[2], shape[1])
            parts[stem + name.removeprefix(owner)] = dataclasses.replace(part, tensor=tensor, transposed=turned)
    return parts
