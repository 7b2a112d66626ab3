"""What the methods for linears, experts and embeddings do with the parameters that vLLM fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftprune.errors import FormatError
from swiftprune.formats.spec import GROUP, SCALED_INPUTS, Packed24, Quantized

GROUPS_PER_BYTE = 2


def check_share(prefix: str, inputs: int, whole: int, values: Quantized | None) -> None:
    """Raises FormatError where a device's share of so many of a weight's `whole` inputs cannot be cut out of it."""
    together = SCALED_INPUTS if values == "int4" else GROUP * GROUPS_PER_BYTE
    if inputs % GROUP or (inputs != whole and inputs % together):
        raise FormatError(
            f"{prefix}: a share of {inputs} of its {whole} inputs cannot be cut out of the packed weight; "
            f"shares must be multiples of {together}: use another --tensor-parallel-size"
        )


def packed_from(tensors: Sequence[Tensor]) -> Packed24:
    """The weight that was loaded into `tensors`, or any of their shape where none was."""
    packed = Packed24(*tensors)
    return _any_packed(packed) if holds_random_weights() else packed


def holds_random_weights() -> bool:
    """Whether vLLM was told to fill up weights with whatever (`--load-format dummy`), to measure without reading."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def _any_packed(packed: Packed24) -> Packed24:
    """A valid pair of the same shape: the first two of every four are kept."""
    metadata = torch.full_like(packed.metadata, 0x44)
    if packed.shape[1] // GROUP % GROUPS_PER_BYTE:
        metadata[:, -1] = 0x4
    if packed.scales is not None:
        values = packed.values if packed.quantized == "int4" else packed.values.clamp(min=-127)
        return Packed24(values, metadata, torch.nan_to_num(packed.scales, 0, 0, 0))
    return Packed24(torch.nan_to_num(packed.values, 0, 0, 0), metadata)


def explained(load: Callable[..., Any], name: str) -> Callable[..., Any]:
    """vLLM's loader, whose bare assertions become an error that names the tensor."""

    def loader(param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(param, loaded_weight, *args, **kwargs)
        except (AssertionError, RuntimeError) as error:
            raise FormatError(
                f"{name}: the checkpoint's {tuple(loaded_weight.shape)} {loaded_weight.dtype} does not fit the model's "
                f"{tuple(param.shape)} {param.dtype}; is config.json that of this checkpoint? {error}"
            ) from error

    return loader


def of_its_type(load: Callable[..., None]) -> Callable[..., None]:
    """vLLM's loader, which would cast what is of another type than the parameter."""

    def loader(parameter: Any, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        assert loaded.dtype == parameter.dtype
        load(parameter, loaded, *args, **kwargs)

    return loader
