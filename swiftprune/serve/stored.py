"""What files say of packed weights, checked before an engine reads them.

Loaders of engines make up a tensor that is missing, convert one of another type, and name neither in their errors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from swiftprune.checkpoints.shards import TensorEntry
from swiftprune.errors import FormatError
from swiftprune.formats.spec import METADATA_SUFFIX, SCALE_SUFFIX, Quantized, WeightSpec

WEIGHT = ".weight"
_ENDS = 2  # embeddings and head
# As safetensors calls the types of values.
_VALUE_TYPES: dict[Quantized | None, tuple[str, ...]] = {None: ("BF16", "F16", "F32"), "int8": ("I8",), "int4": ("U8",)}


def packed_modules(stored: Mapping[str, TensorEntry]) -> list[str]:
    """Names of the linears that are stored packed."""
    ending = WEIGHT + METADATA_SUFFIX
    return sorted(name.removesuffix(ending) for name in stored if name.endswith(ending))


def check_stored(stored: Mapping[str, TensorEntry], values: Quantized | None, *, quantized_head: bool = False) -> None:
    """Raises FormatError, with file and tensor, unless all tensors of every packed weight are there and fit together.

    `values` is what config.json says of them, `quantized_head` whether it says that embeddings and head are in 8 bits.
    """
    packed = packed_modules(stored)
    for module in packed:
        _check_weight(stored, module + WEIGHT, values)
    ends = [name for name, entry in stored.items() if entry.dtype_name == "I8"]
    ends = sorted(set(ends) - {module + WEIGHT for module in packed})
    if bool(ends) != quantized_head:
        where = f"{stored[ends[0]].shard}: holds {ends[0]} in 8 bits" if ends else "no embeddings are stored in 8 bits"
        raise FormatError(f"{where}, but config.json says {'so' if quantized_head else 'nothing'} of a quantized head")
    if len(ends) > _ENDS:
        raise FormatError(
            f"{stored[ends[-1]].shard}: holds {', '.join(ends)} in 8 bits, more than embeddings and a head"
        )
    for name in ends:
        check_rows_stored(stored, name)


def check_rows_stored(stored: Mapping[str, TensorEntry], name: str) -> None:
    """Raises FormatError, with file and tensor, unless the embeddings or the head `name` are in 8 bits, with scales."""
    entry, scale = stored[name], stored.get(name + SCALE_SUFFIX)
    if entry.dtype_name != "I8":
        raise FormatError(f"{entry.shard}: {name} is {entry.dtype_name}, but config.json says that it is in 8 bits")
    expected = (entry.shape[0], 1)
    if scale is None or scale.dtype_name != "BF16" or scale.shape != expected:
        found = f"{scale.dtype_name} {scale.shape}" if scale else "missing"
        raise FormatError(f"{entry.shard}: {name}{SCALE_SUFFIX} is {found}, not BF16 {expected}")


def _check_weight(stored: Mapping[str, TensorEntry], weight: str, values: Quantized | None) -> None:
    metadata, scales = weight + METADATA_SUFFIX, weight + SCALE_SUFFIX
    if not values and scales in stored:
        raise FormatError(f"{stored[scales].shard}: holds {scales}, but config.json names no quantized values")
    types = {weight: _VALUE_TYPES[values], metadata: ("U8",)} | ({scales: ("BF16",)} if values else {})
    for name, allowed in types.items():
        if name not in stored:
            raise FormatError(f"{stored[metadata].shard}: holds {metadata} without {name}")
        if (dtype := stored[name].dtype_name) not in allowed:
            raise FormatError(
                f"{stored[name].shard}: {name} is {dtype}, not {' or '.join(allowed)}; the file is damaged or of "
                "another format"
            )
    rows, width = (*stored[weight].shape, 0, 0)[:2]
    expected = WeightSpec((rows, width * (4 if values == "int4" else 2)), torch.float32, values)
    for name, shape in ((weight, (rows, width)), (metadata, expected.metadata), (scales, expected.scales)):
        if name in types and stored[name].shape != shape:
            found, beside = stored[name].shape, stored[weight].shape
            raise FormatError(f"{stored[name].shard}: {name} is {found} beside values {beside}, not {shape}")
