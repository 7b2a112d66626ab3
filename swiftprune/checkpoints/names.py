"""Which parameter of a model each tensor of a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


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
