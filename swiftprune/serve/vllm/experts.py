"""Packed experts of a mixture in vLLM: their parameters, and the product of the tokens that are routed to each.

vLLM's own loader puts the experts of a checkpoint into one parameter for gate and up (`w13`) and one for down (`w2`),
by the names that parameters have for all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from swiftprune.errors import FormatError
from swiftprune.formats.spec import METADATA_SUFFIX, SCALE_DTYPE, SCALE_SUFFIX, WeightSpec
from swiftprune.kernels.linear import Linear24
from swiftprune.serve.vllm.parameters import check_share, explained, packed_from

if TYPE_CHECKING:
    from swiftprune.serve.vllm.quantization import SwiftpruneConfig

_UP, _DOWN = "w13", "w2"
_SUFFIXES = ("", METADATA_SUFFIX, SCALE_SUFFIX)


class SwiftpruneExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Parameters and products of the experts of one block."""

    def __init__(self, config: SwiftpruneConfig, layer: RoutedExperts, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.config = config
        self.prefix = prefix
        for reason, found in (
            ("their outputs are weighted before, not after", layer.apply_router_weight_on_input),
            ("they have biases", self.moe.has_bias),
            ("--enable-expert-parallel", self.moe.moe_parallel_config.use_ep),
            ("the checkpoint is sparse-24-bitmask", config.from_bitmask),
        ):
            if found:
                raise FormatError(f"{prefix}: packed experts do not run in vLLM here: {reason}")

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., Any],
        **_: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        check_share(self.prefix, inner, inner * self.moe.moe_parallel_config.tp_size, self.config.values)
        self._dtype = params_dtype
        shapes = {_UP: ((2 if self.moe.is_act_and_mul else 1) * inner, hidden_size), _DOWN: (hidden_size, inner)}
        for name, shape in shapes.items():
            weight = WeightSpec(shape, params_dtype, self.config.values)
            values, dtype = weight.values
            stored = {"": torch.empty(num_experts, *values, dtype=dtype)}
            stored[METADATA_SUFFIX] = torch.empty(num_experts, *weight.metadata, dtype=torch.uint8)
            if weight.scales:
                stored[SCALE_SUFFIX] = torch.empty(num_experts, *weight.scales, dtype=SCALE_DTYPE)
            for suffix, tensor in stored.items():
                parameter = nn.Parameter(tensor, requires_grad=False)
                loader = explained(weight_loader, f"{self.prefix}.{name}_weight{suffix}")
                kind = "group" if self.config.values == "int4" else "channel"  # of scales
                set_weight_attrs(parameter, {"weight_loader": loader, "quant_method": kind})
                layer.register_parameter(f"{name}_weight{suffix}", parameter)
        self.config.started(self.prefix)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "experts24"):
            return
        made: dict[str, list[Linear24]] = {}
        for name in (_UP, _DOWN):
            keys = [f"{name}_weight{suffix}" for suffix in _SUFFIXES if hasattr(layer, f"{name}_weight{suffix}")]
            stacked = [getattr(layer, key).data for key in keys]
            for key in keys:
                delattr(layer, key)
            made[name] = [
                Linear24.from_packed(packed_from(parts), name=f"{self.prefix}.{index}.{name}", dtype=self._dtype)
                for index, parts in enumerate(zip(*stacked, strict=True))
            ]
        layer.experts24 = list(zip(made[_UP], made[_DOWN], strict=True))
        self.config.finished(self.prefix, [*made[_UP], *made[_DOWN]], stacked[0].device.type)

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        found: Tensor = torch.ops.swiftprune.experts24(x, topk_weights, topk_ids, layer.layer_name)
        return found

    def multiply(self, layer: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """(T, H) -> (T, H): of each token the sum over its experts `ids` (T, top k), weighted by `weights`."""
        total = torch.zeros_like(x)
        for index in sorted(set(ids.flatten().tolist())):
            token, rank = torch.where(ids == index)
            up, down = layer.experts24[index]
            both = up.multiply(x[token], None)
            hidden = both.new_empty(len(both), down.in_features)
            apply_moe_activation(layer.activation, hidden, both)
            out = down.multiply(hidden, None) * weights[token, rank, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


@torch.library.custom_op("swiftprune::experts24", mutates_args=())
def _experts24(x: Tensor, weights: Tensor, ids: Tensor, name: str) -> Tensor:
    """An operator, since which experts run depends on numbers, which compilers cannot follow."""
    runner: Any = get_forward_context().no_compile_layers[name]
    layer = runner.routed_experts
    found: Tensor = layer.quant_method.multiply(layer, x, weights, ids)
    return found


@_experts24.register_fake
def _(x: Tensor, weights: Tensor, ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
