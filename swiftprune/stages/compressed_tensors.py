"""Checkpoints of compressed-tensors (up to 0.14) whose weights are 2:4, and quantized as well or not: read as stored.

Which of these a linear is, its tensors say:

    weight_packed, meta, scale_packed             `marlin-24`, see `formats.marlin24`
    compressed, bitmask, shape [, weight_scale]   `sparse-24-bitmask`, see `formats.bitmask`; int8 and fp8 have a scale
    weight, weight_scale                          quantized, but dense

A scale of `weight_scale` is one for the tensor or one a row. What they stand for is values times scales, in the type of
the scales, as compressed-tensors multiplies; of marlin-24, which nothing else decodes, in float32, rounded once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swiftprune.checkpoints.shards import TORCH_DTYPES, TensorEntry
from swiftprune.checkpoints.source import Checkpoint, Decoded
from swiftprune.config import DTYPES, DtypeName
from swiftprune.errors import CheckpointError, FormatError
from swiftprune.formats import bitmask, marlin24
from swiftprune.formats.spec import GROUP, KEPT, SCALE_DTYPE, Packed24, validate
from swiftprune.kernels import packing

_WEIGHT, _SCALE = "weight", "weight_scale"
_EIGHT_BITS = ("I8", "F8_E4M3")
# Of an entry of `config_groups`: types with bits, and what shares a scale.
_TYPES = {marlin24.FORMAT: (("int", 4), ("int", 8)), bitmask.FORMAT: (("int", 8), ("float", 8))}
_STRATEGIES = {marlin24.FORMAT: ("channel", "group"), bitmask.FORMAT: ("channel", "tensor")}
# Beside a weight these change what it stands for.
_REFUSED = {
    "weight_zero_point": "zero points (asymmetric quantization)",
    "weight_g_idx": "an order of inputs (activation ordering)",
    "weight_global_scale": "a second scale",
}
_OF_ACTIVATIONS = tuple(
    f"{what}_{part}" for what in ("input", "output", "q", "k", "v") for part in ("scale", "zero_point", "global_scale")
)
_INSTEAD = "prune the checkpoint that it was made from"
_AGAIN = f"download it again, or {_INSTEAD}"


def declared_format(quantization: Mapping[str, Any]) -> str | None:
    """`marlin-24` or `sparse-24-bitmask`, where a `quantization_config` says that weights are stored so."""
    groups = quantization.get("config_groups") or {}
    groups = groups.values() if isinstance(groups, dict) else ()
    formats = [quantization.get("format"), *(group.get("format") for group in groups if isinstance(group, dict))]
    if marlin24.FORMAT in formats:
        return marlin24.FORMAT
    is_bitmask = (quantization.get("sparsity_config") or {}).get("format") == bitmask.FORMAT
    return bitmask.FORMAT if is_bitmask else None


@dataclass(frozen=True)
class _Weight:
    """The tensors that stand for a weight, from their headers."""

    parts: dict[str, str]
    """Last part of the name -> tensor."""
    shape: tuple[int, int]
    multiplied_in: torch.dtype
    """The type in which values are multiplied by scales."""
    dtype: torch.dtype
    """The type of the weight that comes of it."""
    bits: int = 8

    @property
    def is_sparse(self) -> bool:
        return _WEIGHT not in self.parts


@dataclass(frozen=True)
class _Stored:
    """What is stored of a weight: `values` (N, K/2) with our metadata (N, K/8), or without (N, K)."""

    values: Tensor
    metadata: Tensor | None
    scales: Tensor | None
    """(1, 1), (N, 1) or (N, K/128)."""


class StoredWeights:
    """The weights of such a checkpoint. Making it checks config.json, headers and scales.

    `dtype` is the type that is asked for, where that of the model would do.
    Raises CheckpointError, naming file and tensor, for what is damaged or of a kind that is not read.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: DtypeName | None = None) -> None:
        format = declared_format(checkpoint.quantization)
        assert format, "who makes this asks first"
        self.format = format
        self._source = checkpoint
        declared = str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))).removeprefix("torch.")
        self._dtype = DTYPES[dtype] if dtype else next((DTYPES[name] for name in DTYPES if name == declared), None)
        groups = _groups(checkpoint)
        for name, group in groups.items():
            self._check_group(name, group.get("weights") or {})
        self._bits = {group["weights"]["num_bits"] for group in groups.values() if group.get("weights")}
        self._weights = self._find_weights()
        self.is_quantized = any(weight.parts.keys() & {_SCALE, marlin24.SCALES} for weight in self._weights.values())
        left_out = [name for name in checkpoint.tensors if name.rpartition(".")[2] in _OF_ACTIVATIONS]
        self.quantizes_activations = bool(
            left_out
            or checkpoint.quantization.get("kv_cache_scheme")
            or any(group.get("input_activations") or group.get("output_activations") for group in groups.values())
        )
        """Whether more than weights was quantized, which is left out."""
        decoded = {
            name: Decoded(tuple(weight.parts.values()), self._decoded_entry(weight), partial(self._decode, name))
            for name, weight in self._weights.items()
        }
        self.checkpoint = checkpoint.with_decoded(decoded, left_out)
        """The same with plain weights, zeros in place."""

    def is_sparse(self, tensor: str) -> bool:
        """Whether the weight of that name is stored 2:4."""
        return tensor in self._weights and self._weights[tensor].is_sparse

    def packed(self, tensor: str) -> Packed24:
        """The weight in our 8 bits, value by value. `reason_against_8_bits` says whether that can be."""
        stored = self._read(tensor)
        assert stored.metadata is not None
        assert stored.scales is not None
        scales = stored.scales.to(SCALE_DTYPE).expand(len(stored.values), 1)
        return Packed24(stored.values, stored.metadata, scales.contiguous())

    def reason_against_8_bits(self, tensor: str) -> str | None:
        """Why our 8 bits cannot hold a 2:4 weight exactly, or None where they can. May read its values."""
        stored = self._read(tensor)
        if stored.values.dtype != torch.int8 or stored.scales is None:
            return f"its values are {str(stored.values.dtype).removeprefix('torch.')}"
        if stored.scales.shape[1] > 1:
            return f"it has a scale for each {marlin24.SCALED_INPUTS} inputs"
        if not torch.equal(stored.scales.to(SCALE_DTYPE).to(stored.scales.dtype), stored.scales):
            return "its scales need more than bfloat16"
        return "it holds -128" if (stored.values == -128).any() else None

    def _check_group(self, name: str, weights: Mapping[str, Any]) -> None:
        """Raises CheckpointError for an entry of `config_groups` whose weights are not read."""
        if not weights:
            return
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        readable = " or ".join(f"{bits}-bit {kind}" for kind, bits in _TYPES[self.format])
        strategies = _STRATEGIES[self.format]
        for fits, has, reads in (
            ((kind, bits) in _TYPES[self.format], f"{bits}-bit {kind} weights", readable),
            (weights.get("symmetric", True), "zero points (symmetric: false)", "symmetric quantization"),
            (weights.get("actorder") in (None, False, "weight", "static"), "activation ordering", "inputs in order"),
            (weights.get("strategy") in strategies, f"scales by {weights.get('strategy')}", " or ".join(strategies)),
            (
                weights.get("group_size") in (None, -1, marlin24.SCALED_INPUTS),
                f"groups of {weights.get('group_size')} inputs",
                f"groups of {marlin24.SCALED_INPUTS}",
            ),
        ):
            if not fits:
                raise CheckpointError(
                    f"{self._source.folder / 'config.json'}: {name} of its quantization_config has {has}; of "
                    f"{self.format} {reads} can be read: {_INSTEAD}"
                )

    def _find_weights(self) -> dict[str, _Weight]:
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._source.tensors:
            module, _, last = name.rpartition(".")
            if last in _REFUSED:
                raise self._refused(name, f"holds {_REFUSED[last]}, which are not read; {_INSTEAD}")
            modules[module][last] = name
        found = {f"{module}.{_WEIGHT}": self._find_weight(parts) for module, parts in modules.items()}
        weights = {name: weight for name, weight in found.items() if weight}
        if not any(weight.is_sparse for weight in weights.values()):
            raise CheckpointError(
                f"{self._source.folder}: config.json declares {self.format}, but no weight is stored so; put back the "
                "config.json that belongs to these weights"
            )
        return weights

    def _find_weight(self, parts: Mapping[str, str]) -> _Weight | None:
        """What stands for the weight of a module; None where it is a plain one, or there is none."""
        if parts.keys() & {marlin24.VALUES, marlin24.METADATA, marlin24.SCALES}:
            return self._find_marlin(self._all_of(parts, marlin24.VALUES, marlin24.METADATA, marlin24.SCALES))
        if parts.keys() & {bitmask.VALUES, bitmask.MASK}:
            return self._find_bitmask(parts)
        if _SCALE in parts or (_WEIGHT in parts and self._entry(parts[_WEIGHT]).dtype_name in _EIGHT_BITS):
            return self._find_scaled(self._all_of(parts, _WEIGHT, _SCALE), self._matrix(parts, _WEIGHT))
        return None

    def _find_marlin(self, parts: dict[str, str]) -> _Weight:
        for part, dtype in ((marlin24.VALUES, "I32"), (marlin24.METADATA, "I16"), (marlin24.SCALES, "F16")):
            self._check_type(parts[part], dtype)
        shapes = (self._entry(name).shape for name in parts.values())
        try:
            rows, cols, bits = marlin24.layout(*shapes)
        except FormatError as error:
            raise self._refused(parts[marlin24.VALUES], f"cannot be read: {error}; {_AGAIN}") from error
        if bits not in self._bits:
            raise self._refused(
                parts[marlin24.VALUES], f"is of {bits} bits, which config.json declares none of; {_AGAIN}"
            )
        self._check_scales(parts[marlin24.SCALES])
        return _Weight(parts, (rows, cols), torch.float32, self._dtype or torch.float16, bits)

    def _find_bitmask(self, parts: Mapping[str, str]) -> _Weight:
        found = self._all_of(parts, bitmask.VALUES, bitmask.MASK, bitmask.SHAPE)
        rows, width = self._matrix(found, bitmask.VALUES)
        shape = rows, width // KEPT * GROUP
        mask, stored = self._entry(found[bitmask.MASK]), self._source.read([found[bitmask.SHAPE]])[found[bitmask.SHAPE]]
        if stored.flatten().tolist() != list(shape) or mask.shape != (rows, shape[1] // 8) or shape[1] % 8:
            raise self._refused(
                found[bitmask.VALUES],
                f"{(rows, width)}, {bitmask.MASK} {mask.shape} and {bitmask.SHAPE} {stored.flatten().tolist()} do not "
                "belong together; of a weight (N, K), K a multiple of 8, they are (N, K/2), (N, K/8) and [N, K]: "
                + _AGAIN,
            )
        self._check_type(found[bitmask.MASK], "U8")
        if self._entry(found[bitmask.VALUES]).dtype_name in _EIGHT_BITS:
            return self._find_scaled(found | self._all_of(parts, bitmask.VALUES, _SCALE), shape)
        self._check_type(found[bitmask.VALUES], *TORCH_DTYPES)
        dtype = TORCH_DTYPES[self._entry(found[bitmask.VALUES]).dtype_name]
        return _Weight(found, shape, dtype, dtype)

    def _find_scaled(self, parts: dict[str, str], shape: tuple[int, int]) -> _Weight:
        """A weight of 8-bit values with scales, sparse or not."""
        self._check_type(next(iter(parts.values())), *_EIGHT_BITS)
        scale = self._entry(parts[_SCALE])
        if scale.shape not in ((), (1,), (1, 1), (shape[0], 1)):
            raise self._refused(
                parts[_SCALE],
                f"is {scale.shape} beside a weight {shape}; one scale for the tensor, or ({shape[0]}, 1), can be read: "
                f"{_INSTEAD}",
            )
        self._check_type(parts[_SCALE], *TORCH_DTYPES)
        self._check_scales(parts[_SCALE])
        dtype = TORCH_DTYPES[scale.dtype_name]
        # Of float32 scales compressed-tensors makes a float32 weight, beside which the model has another type.
        return _Weight(parts, shape, dtype, self._dtype or dtype if dtype == torch.float32 else dtype)

    def _all_of(self, parts: Mapping[str, str], *needed: str) -> dict[str, str]:
        """Those `parts` that are `needed`. Raises CheckpointError for one that is missing."""
        if missing := [part for part in needed if part not in parts]:
            there = next(iter(parts.values()))
            name = f"{there.rpartition('.')[0]}.{missing[0]}"
            raise CheckpointError(f"{self._file(there)}: holds {there} without {name}; {_AGAIN}")
        return {part: parts[part] for part in needed}

    def _matrix(self, parts: Mapping[str, str], part: str) -> tuple[int, int]:
        shape = self._entry(parts[part]).shape
        if len(shape) != 2 or 0 in shape:
            raise self._refused(parts[part], f"has shape {shape}, not that of a matrix; {_AGAIN}")
        return shape[0], shape[1]

    def _check_type(self, name: str, *allowed: str) -> None:
        if (found := self._entry(name).dtype_name) not in allowed:
            raise self._refused(name, f"is {found}, not {' or '.join(allowed)}; {_AGAIN}")

    def _check_scales(self, name: str) -> None:
        scales = self._source.read([name])[name]
        if not torch.isfinite(scales).all():
            index = (~torch.isfinite(scales)).nonzero()[0].tolist()
            raise self._refused(name, f"holds {scales[tuple(index)].item()} at {index}; scales are finite: {_AGAIN}")

    def _entry(self, name: str) -> TensorEntry:
        return self._source.tensors[name]

    def _file(self, name: str) -> str:
        return str(self._source.folder / self._entry(name).shard)

    def _refused(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._file(name)}: {name} {what}")

    @contextmanager
    def _naming_file(self, tensor: str) -> Iterator[None]:
        """Makes a CheckpointError, which names the file, of what is wrong with the numbers of a weight."""
        try:
            yield
        except FormatError as error:
            stored = next(iter(self._weights[tensor].parts.values()))
            raise CheckpointError(f"{self._file(stored)}: {error}; {_AGAIN}") from error

    def _read(self, tensor: str) -> _Stored:
        weight = self._weights[tensor]
        read = self._source.read(weight.parts.values())
        parts = {part: read[name] for part, name in weight.parts.items()}
        if marlin24.VALUES in parts:
            values, metadata, scale = (parts[part] for part in (marlin24.VALUES, marlin24.METADATA, marlin24.SCALES))
            return _Stored(*marlin24.from_marlin24(values, metadata, scale, weight.bits))
        scales = parts[_SCALE].reshape(-1, 1) if _SCALE in parts else None
        if not weight.is_sparse:
            return _Stored(parts[_WEIGHT], None, scales)
        with self._naming_file(tensor):
            packed = bitmask.from_bitmask(parts[bitmask.VALUES], parts[bitmask.MASK], tensor)
        return _Stored(packed.values, packed.metadata, scales)

    def _decode(self, tensor: str) -> Tensor:
        """The dense weight (N, K)."""
        weight, stored = self._weights[tensor], self._read(tensor)
        values = stored.values
        if stored.scales is not None:
            scales = stored.scales.to(weight.multiplied_in)
            if scales.shape[1] > 1:
                scales = scales.repeat_interleave(marlin24.SCALED_INPUTS // GROUP * KEPT, dim=1)
            values = (values.to(weight.multiplied_in) * scales).to(weight.dtype)
        if stored.metadata is None:
            return values
        packed = Packed24(values, stored.metadata)
        with self._naming_file(tensor):
            validate(packed, tensor)
        return packing.unpack(packed, tensor)

    def _decoded_entry(self, weight: _Weight) -> TensorEntry:
        stored = [self._entry(name) for name in weight.parts.values()]
        dtype = next(name for name in TORCH_DTYPES if TORCH_DTYPES[name] == weight.dtype)
        return TensorEntry(stored[0].shard, weight.shape, dtype, sum(entry.nbytes for entry in stored))


def _groups(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The `config_groups` of config.json. Raises CheckpointError when it is no object of objects."""
    groups = checkpoint.quantization.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(
        isinstance(group, dict) and isinstance(group.get("weights") or {}, dict) for group in groups.values()
    ):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: its config_groups is no object of schemes; put back the config.json "
            "that came with the weights"
        )
    return groups
