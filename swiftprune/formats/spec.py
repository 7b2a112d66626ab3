"""The packed 2:4 format: its specification, and checks of what claims to follow it.

Specification, version 1
------------------------
A weight W of shape (N, K) = (out_features, in_features), K a multiple of 4 and N, K > 0, is split along K into groups
of four consecutive weights. At most two weights of a group are non-zero. It is stored as two tensors:

    <module>.weight       (N, K/2)         bfloat16 | float16 | float32   the two stored values of each group
    <module>.weight_meta  (N, ceil(K/8))   uint8                          one nibble per group

1. A nibble is ``pos0 | pos1 << 2`` with 0 <= pos0 < pos1 <= 3; only 0x4, 0x8, 0xC, 0x9, 0xD, 0xE are valid. A reader
   MUST refuse any other value.
2. Group g of a row has its nibble in byte g // 2: the low half when g is even, the high half when it is odd. When K/4
   is odd, the high half of the last byte MUST be 0.
3. ``weight[n, 2g]`` is W[n, 4g + pos0] and ``weight[n, 2g + 1]`` is W[n, 4g + pos1]; the other two are zero.
4. A writer MUST fill groups that have fewer than two non-zeros with these positions (the choice of CUTLASS and torch,
   so that metadata can be compared word for word): none or only 2 or only 3 -> (2, 3); only 0 -> (0, 2);
   only 1 -> (1, 2). The stored value of a filled-in position MUST be +0.
5. -0.0 counts as zero and becomes +0. NaN and infinities MUST be refused.
6. A writer MUST NOT choose what to drop: a group with three or four non-zeros is an error.
7. Rows are independent and bytes hold two groups, so the pair of tensors MAY be sliced along N anywhere, and along K at
   multiples of 8.

The values keep the name ``weight`` on purpose: a loader that does not know the format meets a wrong shape and stops.

Worked example, one row of K = 8::

    W           =  0   0.5   0  -1.0  |  2.0   0    0    0
    positions   =      (1, 3)         |  (0, 2)            second group: only 0 is non-zero
    nibbles     =  0b11_01 = 0xD      |  0b10_00 = 0x8
    weight      =  [0.5, -1.0, 2.0, 0.0]
    weight_meta =  [0x8D]

Bits per weight: 16 -> 9 for 16-bit types (1.78x smaller), 32 -> 17 for fp32 (1.88x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swiftprune.errors import FormatError

KEPT = 2
GROUP = 4
FORMAT = "2:4"
QUANT_METHOD = "swiftprune"  # what config.json calls it
VERSION = 1
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METADATA_SUFFIX = "_meta"  # <module>.weight -> <module>.weight_meta


@dataclass(frozen=True)
class WeightSpec:
    """What a packed weight is stored in. Its `nbytes` is the one place that knows how many bits a weight takes."""

    shape: tuple[int, int]
    """(N, K) of the weight that is packed."""
    values: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        rows, cols = self.shape
        return rows * (cols // GROUP * KEPT * self.values.itemsize + metadata_width(cols))

    @property
    def compression(self) -> float:
        """Bytes of the dense weight in the type of the values, over `nbytes`."""
        rows, cols = self.shape
        return rows * cols * self.values.itemsize / self.nbytes


@dataclass(frozen=True, eq=False)
class Packed24:
    """A packed weight: `values` (N, K/2) and `metadata` (N, ceil(K/8)) uint8, as specified above."""

    values: Tensor
    metadata: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        rows, half = self.values.shape
        return rows, 2 * half

    @property
    def spec(self) -> WeightSpec:
        return WeightSpec(self.shape, self.values.dtype)


def check_declared(format: str | None, version: int | None, engine: str) -> None:
    """Raises FormatError when a checkpoint's config.json declares a format or version that `engine` cannot run."""
    if format != FORMAT:
        raise FormatError(
            f"this checkpoint has the format {format!r}; {engine} can run {FORMAT!r} only (export with --target packed)"
        )
    if version != VERSION:
        raise FormatError(
            f"this checkpoint has version {version} of the packed format, but this swiftprune reads version {VERSION}; "
            "use a matching swiftprune or export again"
        )


def declaration(format: str, dense: list[str]) -> dict[str, Any]:
    """The quantization_config of a checkpoint of `format`, by which loaders know it; `dense` linears are not packed."""
    return {"quant_method": QUANT_METHOD, "format": format, "version": VERSION, "ignore": dense}


def unpackable_reason(shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why a weight of this shape and dtype cannot be packed, or None when it can."""
    if len(shape) != 2:
        return f"it has {len(shape)} dimensions, not 2"
    if 0 in shape:
        return "it is empty"
    if shape[1] % GROUP:
        return f"in_features = {shape[1]} is not a multiple of {GROUP}"
    if dtype not in VALUE_DTYPES:
        return f"its dtype is {dtype}, not one of {', '.join(map(str, VALUE_DTYPES))}"
    return None


def metadata_width(in_features: int) -> int:
    """Bytes of metadata in a row of K = `in_features`."""
    return (in_features // GROUP + 1) // 2


def validate(packed: Packed24, name: str = "weight") -> None:
    """Checks every MUST of the specification that a reader can check. Raises FormatError."""
    check_shapes(packed, name)
    values, metadata = packed.values, packed.metadata
    if not torch.isfinite(values).all():
        row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise FormatError(f"{name}: value ({row}, {column}) is {values[row, column].item()}; values must be finite")
    groups = values.shape[1] // KEPT
    nibbles = torch.stack((metadata & 15, metadata >> 4), dim=-1).flatten(1)
    if groups % 2 and (padding := nibbles[:, groups]).any():
        row = int(padding.nonzero()[0])
        raise FormatError(f"{name}: the unused high half of the last metadata byte of row {row} is not 0")
    nibbles = nibbles[:, :groups]
    bad = (nibbles & 3) >= (nibbles >> 2)
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: metadata of row {row}, group {group} is {int(nibbles[row, group]):#x}, "
            "not a pair of ascending positions; the file is damaged or of another format"
        )


def check_device(name: str, *tensors: Tensor) -> None:
    """Raises FormatError for tensors on different devices, or on the meta device."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise FormatError(f"{name}: values and metadata are on different devices: {', '.join(map(str, devices))}")
    if any(tensor.is_meta for tensor in tensors):
        raise FormatError(f"{name}: is on the meta device, which holds no numbers; load the weights first")


def check_shapes(packed: Packed24, name: str) -> None:
    """Raises FormatError when the two tensors do not belong together, whatever they hold."""
    values, metadata = packed.values, packed.metadata
    check_device(name, values, metadata)
    if values.ndim != 2 or 0 in values.shape or values.shape[1] % KEPT or values.dtype not in VALUE_DTYPES:
        raise FormatError(
            f"{name}: values must be (N, K/2) in a 16- or 32-bit float type with K a multiple of {GROUP}, "
            f"not {tuple(values.shape)} {values.dtype}"
        )
    expected = (values.shape[0], metadata_width(2 * values.shape[1]))
    if metadata.dtype != torch.uint8 or tuple(metadata.shape) != expected:
        raise FormatError(
            f"{name}: metadata must be {expected} torch.uint8 beside values {tuple(values.shape)}, "
            f"not {tuple(metadata.shape)} {metadata.dtype}"
        )


def check_finite(weight: Tensor, name: str) -> None:
    """Raises FormatError with the index of the first element of `weight` that is NaN or infinite."""
    if weight.is_meta:
        raise FormatError(f"{name}: is on the meta device, which holds no numbers; load the weights first")
    if not weight.numel() or torch.isfinite(torch.stack(torch.aminmax(weight))).all():  # in one pass
        return
    index = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
    raise FormatError(f"{name}: weight {index} is {weight[index].item()}; NaN and infinities cannot be pruned")
