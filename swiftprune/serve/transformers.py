"""Packed checkpoints in Hugging Face transformers. `import swiftprune` registers the format:

>>> import swiftprune
>>> model = transformers.AutoModelForCausalLM.from_pretrained("./my-model-2of4")  # doctest: +SKIP

Without that import transformers stops with a shape mismatch, or says `Unknown quantization type, got swiftprune`; it
never runs on wrong weights. Tools that import nothing of their user's are run by `python -m swiftprune`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from swiftprune.checkpoints.names import parameter_names
from swiftprune.checkpoints.shards import TensorEntry, shard_entries
from swiftprune.errors import FormatError
from swiftprune.formats import spec
from swiftprune.formats.spec import QUANT_METHOD, Quantized
from swiftprune.kernels import native
from swiftprune.kernels.dense8 import Embedding8, Head8, aligned, check_rows
from swiftprune.kernels.linear import Linear24
from swiftprune.models.experts import merges_experts
from swiftprune.models.linears import as_linears
from swiftprune.serve.stored import check_rows_stored, check_stored, packed_modules

logger = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class SwiftpruneConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed checkpoint's config.json; `ignore` names the linears that stay dense."""

    def __init__(
        self,
        format: str = spec.FORMAT,
        version: int = spec.VERSION,
        ignore: list[str] | None = None,
        values: str | None = None,
        head: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format = format
        self.version = version
        self.ignore = ignore or []
        if values:
            self.values = values
        if head:
            self.head = head


@register_quantizer(QUANT_METHOD)
class SwiftpruneQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a Linear24 in the place of every linear that the checkpoint stores packed.

    So it does with the modules of `dense8` and the ends of the model that are stored in 8 bits.
    """

    def __init__(self, quantization_config: SwiftpruneConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("swiftprune packs checkpoints ahead of time: run swiftprune-export, then load its output")

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        declared = self.quantization_config
        head = getattr(declared, "head", None)
        spec.check_declared(declared.format, declared.version, "transformers", spec.VERSIONS, self._values, head)

    @property
    def _values(self) -> Quantized | None:
        return getattr(self.quantization_config, "values", None)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        stored = _stored(checkpoint_files)
        as_linears(model)
        is_packed = self._is_packed(model, stored)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and is_packed(name):
                packed = Linear24(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    dtype=module.weight.dtype,
                    device=torch.device("meta"),
                    quantized=self._values,
                )
                model.set_submodule(name, packed)
        if hasattr(self.quantization_config, "head"):
            _quantize_ends(model, stored)
        return model

    def _is_packed(self, model: nn.Module, stored: Mapping[str, TensorEntry] | None) -> Callable[[str], bool]:
        """By name in the model: whether the checkpoint stores a linear packed.

        The model may be another than the one that was exported: the body without its head, or with another head. Its
        names then have a prefix less or more than those of the files, and heads of its own are in none of them.
        """
        if stored is None:
            ignored = set(self.quantization_config.ignore)
            return lambda name: name not in ignored
        check_stored(stored, self._values, quantized_head=hasattr(self.quantization_config, "head"))
        names = parameter_names(model, (f"{module}.weight" for module in packed_modules(stored)))
        return {name.removesuffix(".weight") for name in names.values()}.__contains__

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """Experts have linears of their own here, as checkpoints have them: none are stacked."""
        kept = [conversion for conversion in weight_conversions if not merges_experts(conversion)]
        return list(super().update_weight_conversions(kept, *model))  # 5.19, which vLLM 0.32 pins, gives no model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        served: Counter[str] = Counter()
        files = native.MappedFiles()
        for name, module in model.named_modules():
            if isinstance(module, Linear24):
                packed = module.packed
                served[module.use_checked(name=f"{name}.weight").backend] += 1
                if packed.values.is_cpu and module.weight.numel() == 0:  # so that one weight only is in memory twice
                    for tensor in packed.tensors:
                        files.drop(tensor)
        for backend, count in served.items():
            logger.info("%d 2:4 linears run on the backend %s", count, backend)
        _check_ends(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top are: packed weights pass gradients through, and have none themselves."""
        return True


def _stored(checkpoint_files: list[str] | None) -> dict[str, TensorEntry] | None:
    """What is in the files of a checkpoint; None where they are no safetensors."""
    if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
        return None
    return {name: entry for file in checkpoint_files for name, entry in shard_entries(Path(file)).items()}


def _quantize_ends(model: Any, stored: Mapping[str, TensorEntry] | None) -> None:
    """Puts 8-bit modules in the places of the input embeddings and of the output head, where the model has one.

    A head that is not `stored` shares the rows of the embeddings. Raises FormatError where an end that is needed is
    stored in another way, or nowhere, or something else is in 8 bits.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [names[id(end)] for end in (embedding, head) if end is not None]
    own_head = head is not None and not _may_be_tied(model, ends[-1])
    if stored is not None:
        tensor_of = {parameter: tensor for tensor, parameter in parameter_names(model, stored).items()}
        found = {end: tensor_of.get(f"{end}.weight") for end in ends}
        own_head = head is not None and found[ends[-1]] is not None
        for end, tensor in found.items():
            if tensor is not None:
                check_rows_stored(stored, tensor)
            elif end == ends[0] or not _may_be_tied(model, end):
                raise FormatError(f"{end}.weight is in none of the files")
    meta = torch.device("meta")
    rows = Embedding8(
        embedding.num_embeddings,
        embedding.embedding_dim,
        embedding.padding_idx,
        dtype=embedding.weight.dtype,
        device=meta,
    )
    model.set_submodule(ends[0], rows)
    if head is not None:
        own = Head8(
            head.in_features,
            head.out_features,
            bias=head.bias is not None,
            dtype=head.weight.dtype,
            device=meta,
            tied=None if own_head else rows,
        )
        model.set_submodule(ends[1], own)


def _may_be_tied(model: Any, head: str) -> bool:
    return f"{head}.weight" in (getattr(model, "all_tied_weights_keys", None) or {})


def _check_ends(model: nn.Module) -> None:
    """Checks the numbers of 8-bit ends, and has them where CPUs multiply by them; elsewhere they become dense."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Embedding8, Head8)):
            check_rows(module.weight, module.scale, f"{name}.weight")
            if module.weight.is_cpu:
                module.weight.data = aligned(module.weight.data)  # of both ends, where they are tied
            else:
                logger.info(
                    "%s is made dense on %s: only CPUs multiply by 8-bit heads here", name, module.weight.device
                )
                model.set_submodule(name, module.to_dense())
