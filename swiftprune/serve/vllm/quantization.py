"""What vLLM asks of a quantization method: which linears are packed, their parameters, and their product.

A linear of vLLM may stand for several of the checkpoint (q, k and v; gate and up) and hold a slice of them (tensor
parallelism). Both need only rows and columns of the packed pair, so vLLM's own loaders do the work, and what they have
put together is checked and laid out for the kernels once all weights are there.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import FormatError
from swiftprune.formats import bitmask, spec
from swiftprune.formats.spec import (
    GROUP,
    METADATA_SUFFIX,
    QUANT_METHOD,
    SCALE_DTYPE,
    SCALE_SUFFIX,
    Quantized,
    WeightSpec,
)
from swiftprune.kernels import dispatch, packing
from swiftprune.kernels.dense8 import check_rows, dequantize_rows, multiply_rows
from swiftprune.kernels.linear import Linear24
from swiftprune.serve.stored import check_stored
from swiftprune.serve.vllm.experts import SwiftpruneExpertsMethod
from swiftprune.serve.vllm.parameters import (
    GROUPS_PER_BYTE,
    check_share,
    explained,
    holds_random_weights,
    of_its_type,
    packed_from,
)

# Only children of the logger `vllm` show.
logger = init_logger("vllm.swiftprune")

_METADATA, _SCALES = f"weight{METADATA_SUFFIX}", f"weight{SCALE_SUFFIX}"
_ALL = "Linear"
_SLOW = ", which unpacks the weight in every call: right, but no faster than dense"


@register_quantization_config(QUANT_METHOD)
class SwiftpruneConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a packed checkpoint, or of one that compressed-tensors wrote as sparse-24-bitmask.

    `ignore` names the linears that stay dense, and `targets` those that do not, as the checkpoint calls them;
    compressed-tensors may also give regular expressions, after `re:`, and `Linear` for all.
    """

    def __init__(
        self,
        ignore: Sequence[str],
        *,
        targets: Sequence[str] = (_ALL,),
        from_bitmask: bool = False,
        values: Quantized | None = None,
        quantized_head: bool = False,
    ) -> None:
        super().__init__()
        self.values = values
        self.quantized_head = quantized_head
        self._has_embeddings = False
        self.ignore = list(ignore)
        self.targets = list(targets)
        self.from_bitmask = from_bitmask
        self._unfinished: set[str] = set()
        self._served: Counter[tuple[str, torch.dtype, str]] = Counter()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SwiftpruneConfig:
        if _is_bitmask(config):
            sparsity = config["sparsity_config"]
            return cls(sparsity.get("ignore") or [], targets=sparsity.get("targets") or [_ALL], from_bitmask=True)
        values, head = config.get("values"), config.get("head")
        spec.check_declared(config.get("format"), config.get("version"), "vLLM", spec.VERSIONS, values, head)
        return cls(config.get("ignore") or [], values=values, quantized_head=head is not None)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **_: Any) -> str | None:
        """Claims what compressed-tensors wrote as sparse-24-bitmask and what vLLM itself no longer serves."""
        return QUANT_METHOD if _is_bitmask(hf_quant_cfg) else None

    def maybe_update_config(self, model_name: str, **_: Any) -> None:
        """Reads every header of a local checkpoint before any work: a damaged file is named at once."""
        folder = Path(model_name)
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            check_stored(Checkpoint(folder).tensors, self.values, quantized_head=self.quantized_head)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)
        self.targets = hf_to_vllm_mapper.apply_list(self.targets)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if self.quantized_head and isinstance(layer, VocabParallelEmbedding):
            self._has_embeddings |= not isinstance(layer, ParallelLMHead)
            return SwiftpruneEmbeddingMethod(prefix)
        if isinstance(layer, RoutedExperts):
            return None if self._leaves_experts_dense(layer, prefix) else SwiftpruneExpertsMethod(self, layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        if self._stays_dense(prefix):
            return UnquantizedLinearMethod()
        return SwiftpruneLinearMethod(self, prefix)

    def _stays_dense(self, prefix: str) -> bool:
        parent, _, name = prefix.rpartition(".")
        members = [f"{parent}.{member}" for member in self.packed_modules_mapping.get(name, [name])]
        dense = [m for m in members if _names(self.ignore, m) or not _names(self.targets, m)]
        if dense and len(dense) < len(members):
            raise FormatError(
                f"{prefix}: vLLM runs {', '.join(members)} as one layer, but only {', '.join(dense)} stays dense in "
                "this checkpoint; export again with an --ignore that names all of them or none"
            )
        return bool(dense)

    def _leaves_experts_dense(self, layer: RoutedExperts, prefix: str) -> bool:
        dense = [entry for entry in self.ignore if entry.startswith(f"{prefix}.")]
        linears = layer.moe_config.num_experts * (3 if layer.moe_config.is_act_and_mul else 2)
        if dense and len(dense) < linears:
            raise FormatError(
                f"{prefix}: vLLM runs all experts as one layer, but {len(dense)} of their {linears} linears stay dense "
                f"in this checkpoint, first {dense[0]}; export again with an --ignore that names all of them or none"
            )
        return bool(dense)

    def started(self, prefix: str) -> None:
        self._unfinished.add(prefix)

    def finished(self, prefix: str, linears: list[Linear24], device: str) -> None:
        """Says, once all layers are there, what serves them."""
        self._served.update((linear.backend, linear.dtype, device) for linear in linears)
        self._unfinished.discard(prefix)
        if self._unfinished:
            return
        if self.quantized_head and not self._has_embeddings:
            raise FormatError(
                "the checkpoint's embeddings are in 8 bits, but vLLM's model of this architecture makes them without "
                "asking how they are stored; export again with --head keep"
            )
        _enter_compile_key(sorted(f"{backend} {dtype} {on}" for backend, dtype, on in self._served))
        for (backend, dtype, on), count in self._served.items():
            slow = backend in dispatch.SLOW
            logger.log(
                logging.WARNING if slow else logging.INFO,
                "swiftprune: %d 2:4 linears run on the backend %s%s. %s",
                count,
                backend,
                _SLOW if slow else "",
                _why(dtype, on, self.values),
            )
        self._served.clear()

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(spec.VALUE_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # of an NVIDIA GPU; `reference` runs on any

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


class SwiftpruneLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Parameters and product of one packed linear."""

    def __init__(self, config: SwiftpruneConfig, prefix: str) -> None:
        self.config = config
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        rows, cols = sum(output_partition_sizes), input_size_per_partition
        check_share(self.prefix, cols, input_size, self.config.values)
        weight = WeightSpec((rows, cols), params_dtype, self.config.values)
        shape, dtype = weight.values
        values = torch.empty(shape, dtype=dtype)
        if self.config.from_bitmask:
            mask = torch.empty(rows, cols // (GROUP * GROUPS_PER_BYTE), dtype=torch.uint8)
            tensors = {bitmask.VALUES: values, bitmask.MASK: mask}
            ignored = BasevLLMParameter(
                data=torch.empty(2, 1, dtype=torch.int64), weight_loader=lambda *_args, **_kwargs: None
            )
            layer.register_parameter(bitmask.SHAPE, ignored)
        else:
            tensors = {"weight": values, _METADATA: torch.empty(weight.metadata, dtype=torch.uint8)}
        for name, tensor in tensors.items():
            loader = explained(weight_loader, f"{self.prefix}.{name}")
            layer.register_parameter(
                name, ModelWeightParameter(data=tensor, input_dim=1, output_dim=0, weight_loader=loader)
            )
        if weight.scales:
            data = torch.empty(weight.scales, dtype=SCALE_DTYPE)
            loader = explained(weight_loader, f"{self.prefix}.{_SCALES}")
            if self.config.values == "int4":
                scales = GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
            else:
                scales = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            layer.register_parameter(_SCALES, scales)
        self._dtype = params_dtype
        self.config.started(self.prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "linear24"):
            return
        name = f"{self.prefix}.weight"
        if self.config.from_bitmask:
            mask = layer.bitmask.data
            if holds_random_weights():
                mask = torch.full_like(mask, 0b0011_0011)
            packed = packing.canonical(bitmask.from_bitmask(layer.compressed.data, mask, name), name)
            packed = packed_from(packed.tensors)
            del layer.compressed, layer.bitmask, layer.shape
        else:
            names = ("weight", _METADATA, _SCALES) if self.config.values else ("weight", _METADATA)
            packed = packed_from([layer.get_parameter(name).data for name in names])
            for tensor in names:
                delattr(layer, tensor)
        layer.linear24 = Linear24.from_packed(packed, name=name, dtype=self._dtype)
        # By this vLLM's LoRA finds the device on which adapters of the layer belong; nothing reads numbers from it.
        layer.weight_packed = packed.values.new_empty(0)
        self.config.finished(self.prefix, [layer.linear24], packed.values.device.type)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.linear24.multiply(x, bias)
        return y


class SwiftpruneEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Parameters, rows and product of embeddings or an output head in 8 bits."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix or "embeddings"

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **_: Any,
    ) -> None:
        rows = sum(output_partition_sizes)
        self._dtype = params_dtype
        stored = {
            "weight": torch.empty(rows, input_size_per_partition, dtype=torch.int8),
            _SCALES: torch.empty(rows, 1, dtype=SCALE_DTYPE),
        }
        for name, tensor in stored.items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            loader = explained(of_its_type(weight_loader), f"{self.prefix}.{name}")
            set_weight_attrs(parameter, {"input_dim": 1, "output_dim": 0, "weight_loader": loader})
            layer.register_parameter(name, parameter)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        for name in ("weight", _SCALES):
            layer.register_parameter(name, embed_tokens.get_parameter(name))
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "rows8"):
            return
        values, scale = layer.weight, layer.get_parameter(_SCALES)
        if not holds_random_weights():
            check_rows(values, scale, f"{self.prefix}.weight")
        if values.is_cpu:
            layer.rows8 = values.data, scale.data, scale.data[:, 0].to(self._dtype)
        else:  # there is no product of 8-bit heads here that would be faster
            if not hasattr(values, "made_dense"):  # once where the two are tied
                values.made_dense = dequantize_rows(values, scale, self._dtype)
            layer.rows8 = values.made_dense, None, None
            logger.info("swiftprune: %s is made dense on %s", self.prefix, values.device)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        values, scale, _ = layer.rows8
        rows = F.embedding(ids, values)
        return rows if scale is None else dequantize_rows(rows, F.embedding(ids, scale), self._dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values, scale, of_outputs = layer.rows8
        return F.linear(x, values, bias) if scale is None else multiply_rows(x, values, of_outputs, bias)


def _enter_compile_key(backends: list[str]) -> None:
    """Makes `backends` part of the key of vLLM's compile cache.

    Compiled graphs name the backend of each linear, but vLLM's key knows nothing of SWIFTPRUNE_BACKEND or a measured
    table: without this a graph made for other backends would be loaded, and run.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:  # not within an engine
        return
    if isinstance(config.additional_config, dict):
        before = config.additional_config.get(QUANT_METHOD, [])  # of a draft model, say
        config.additional_config[QUANT_METHOD] = sorted({*before, *backends})
    else:
        logger.warning(
            "swiftprune: additional_config takes no entries, so vLLM's compile cache does not know the "
            "backends; after changing them, start it once with VLLM_DISABLE_COMPILE_CACHE=1"
        )


# By name, since the decorator for it is younger (0.17) than the list.
if SwiftpruneLinearMethod.__name__ not in vllm_linear.WEIGHT_LOADER_V2_SUPPORTED:
    vllm_linear.WEIGHT_LOADER_V2_SUPPORTED.append(SwiftpruneLinearMethod.__name__)


def _names(entries: Sequence[str], module: str) -> bool:
    """Whether one of the entries names the module, its last part, or a regular expression that matches it."""
    return any(
        re.match(entry.removeprefix("re:"), module)
        if entry.startswith("re:")
        else entry in (_ALL, module, module.rpartition(".")[2])
        for entry in entries
    )


def _is_bitmask(config: dict[str, Any]) -> bool:
    """Whether compressed-tensors wrote this with its weights sparse and not quantized as well."""
    sparsity = config.get("sparsity_config") or {}
    return sparsity.get("format") == bitmask.FORMAT and not config.get("config_groups")


def _why(dtype: torch.dtype, device: str, values: Quantized | None) -> str:
    available = ", ".join(dispatch.linear_backends(dtype, device, values))
    if asked := os.environ.get(dispatch.BACKEND_VARIABLE):
        return f"{dispatch.BACKEND_VARIABLE}={asked} asks for it; for {dtype} on {device} there are: {available}."
    order = ", fastest first" if device == "cpu" else ""
    return f"For {dtype} on {device} there are{order}: {available}; {dispatch.BACKEND_VARIABLE} chooses."
