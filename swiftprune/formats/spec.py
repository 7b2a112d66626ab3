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

Specification, version 2: 8- and 4-bit values
---------------------------------------------
As version 1 but for the values, which are integers with scales:

    <module>.weight        (N, K/2)   int8    `int8`: the two stored values of each group
                           (N, K/4)   uint8   `int4`: their codes, the first one in the four low bits
    <module>.weight_meta   (N, ceil(K/8))           uint8      as in version 1
    <module>.weight_scale  (N, 1)                   bfloat16   `int8`: one a row
                           (N, ceil(K/128))         bfloat16   `int4`: one for each 128 inputs of a row

8.  W[n, k] at a stored position is the float32 product of its scale and its value, or of its scale and CODEBOOK[code].
    Both factors are exact in float32, and so is the product.
9.  The metadata is the mask: a stored value MAY be zero, and a writer chooses freely which positions it stores. Rules 4
    and 5 do not hold; groups of fewer than two non-zeros store a value of zero.
10. A value of -128 MUST NOT be written, and a reader MUST refuse it. Scales MUST be finite; they MAY be negative.
11. `int4` MAY be sliced along K at multiples of 128 only.

CODEBOOK is NF4 (Dettmers et al., arXiv 2305.14314) rounded to multiples of 1/127, in units of these.

Bits per weight: 5 for `int8`, 3.125 for `int4`.

Specification, version 3: output head and embeddings in 8 bits
--------------------------------------------------------------
As version 1, or 2 where values are declared, but for the weights (V, H) of the input embeddings and of the output head,
which are dense. Each of the two that a dense checkpoint stores (a tied head is not stored) is stored as

    <module>.weight        (V, H)   int8
    <module>.weight_scale  (V, 1)   bfloat16   one a row

12. W[v, h] is the float32 product of scale and value. Rule 10 holds for them too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swiftprune.errors import FormatError

KEPT = 2
GROUP = 4
FORMAT = "2:4"
QUANT_METHOD = "swiftprune"  # what config.json calls it
VERSION = 1
QUANTIZED_VERSION = 2
HEAD_VERSION = 3
VERSIONS = (VERSION, QUANTIZED_VERSION, HEAD_VERSION)
QUANTIZED_HEAD = "int8"  # the only type of a quantized head
SCALE_DTYPE = torch.bfloat16
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METADATA_SUFFIX = "_meta"  # <module>.weight -> <module>.weight_meta
SCALE_SUFFIX = "_scale"
Quantized = Literal["int8", "int4"]
QUANTIZED: tuple[Quantized, ...] = ("int8", "int4")
SCALED_INPUTS = 128  # that share a scale, of `int4`
CODEBOOK = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)


@dataclass(frozen=True)
class WeightSpec:
    """What a packed weight is stored in. Its `nbytes` is the one place that knows how many bits a weight takes."""

    shape: tuple[int, int]
    """(N, K) of the weight that is packed."""
    dtype: torch.dtype
    """The type that it multiplies in, and that values are stored in unless they are quantized."""
    quantized: Quantized | None = None

    @property
    def values(self) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and type of the tensor of values."""
        rows, cols = self.shape
        if self.quantized == "int4":
            return (rows, cols // GROUP), torch.uint8
        return (rows, cols // GROUP * KEPT), torch.int8 if self.quantized else self.dtype

    @property
    def metadata(self) -> tuple[int, int]:
        """Shape of the tensor of metadata."""
        return self.shape[0], metadata_width(self.shape[1])

    @property
    def scales(self) -> tuple[int, int] | None:
        """Shape of the tensor of scales."""
        if self.quantized is None:
            return None
        return self.shape[0], -(-self.shape[1] // SCALED_INPUTS) if self.quantized == "int4" else 1

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        values, dtype = self.values
        scales = math.prod(self.scales) * SCALE_DTYPE.itemsize if self.scales else 0
        return math.prod(values) * dtype.itemsize + math.prod(self.metadata) + scales

    @property
    def compression(self) -> float:
        """Bytes of the dense weight over `nbytes`."""
        return math.prod(self.shape) * self.dtype.itemsize / self.nbytes


@dataclass(frozen=True, eq=False)
class Packed24:
    """A packed weight: `values` (N, K/2), `metadata` (N, ceil(K/8)) uint8 and `scales`, as specified above."""

    values: Tensor
    metadata: Tensor
    scales: Tensor | None = None
    """Of 8- and 4-bit values."""

    @property
    def quantized(self) -> Quantized | None:
        if self.scales is None:
            return None
        return "int4" if self.values.dtype == torch.uint8 else "int8"

    def to(self, device: torch.device) -> Packed24:
        return Packed24(*(tensor.to(device) for tensor in self.tensors))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight this stands for."""
        rows, width = self.values.shape
        return rows, (4 if self.quantized == "int4" else 2) * width

    @property
    def spec(self) -> WeightSpec:
        """With float32 as the type of a quantized weight, which does not know in what it will multiply."""
        return WeightSpec(self.shape, torch.float32 if self.quantized else self.values.dtype, self.quantized)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values, self.metadata) if self.scales is None else (self.values, self.metadata, self.scales)


def find_quantized(name: str) -> Quantized | None:
    """The quantized type of values of that name, or None where it is another type's."""
    return next((quantized for quantized in QUANTIZED if quantized == name), None)


def check_declared(
    format: str | None,
    version: int | None,
    engine: str,
    versions: tuple[int, ...] = (VERSION,),
    values: object = None,
    head: object = None,
) -> None:
    """Raises FormatError when a checkpoint's config.json declares what `engine` cannot run."""
    if format != FORMAT:
        raise FormatError(
            f"this checkpoint has the format {format!r}; {engine} can run {FORMAT!r} only (export with --target packed)"
        )
    if type(version) is not int or version not in versions:
        known = f"{', '.join(map(str, versions[:-1]))} and {versions[-1]}" if len(versions) > 1 else versions[0]
        raise FormatError(
            f"this checkpoint has version {version!r} of the packed format, but {engine} reads {known} here; "
            "use a matching swiftprune or export again"
        )
    if (version == HEAD_VERSION) != (head == QUANTIZED_HEAD) or (head is not None and head != QUANTIZED_HEAD):
        raise FormatError(
            f"config.json declares version {version} of the packed format with head {head!r}; version {HEAD_VERSION}, "
            f"and no other, has {QUANTIZED_HEAD!r}: put back the config.json that came with the weights"
        )
    if values not in {VERSION: (None,), QUANTIZED_VERSION: QUANTIZED, HEAD_VERSION: (None, *QUANTIZED)}[version]:
        raise FormatError(
            f"config.json declares version {version} of the packed format with values {values!r}; version "
            f"{QUANTIZED_VERSION} has {' or '.join(QUANTIZED)}, version {VERSION} none, version {HEAD_VERSION} any of "
            "these: put back the config.json that came with the weights"
        )


def declaration(format: str, dense: list[str], quantized: Quantized | None = None) -> dict[str, Any]:
    """The quantization_config of a checkpoint of `format`, by which loaders know it; `dense` linears are not packed."""
    version = {"version": QUANTIZED_VERSION, "values": quantized} if quantized else {"version": VERSION}
    return {"quant_method": QUANT_METHOD, "format": format, **version, "ignore": dense}


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
    if packed.quantized == "int8" and (bad := values == -128).any():
        row, column = bad.nonzero()[0].tolist()
        raise FormatError(f"{name}: value ({row}, {column}) is -128; 8-bit values are -127 to 127")
    for what, numbers in (("value", values), ("scale", packed.scales)):
        if numbers is not None and not torch.isfinite(numbers).all():
            row, column = (~torch.isfinite(numbers)).nonzero()[0].tolist()
            raise FormatError(f"{name}: {what} ({row}, {column}) is {numbers[row, column].item()}; it must be finite")
    groups = packed.shape[1] // GROUP
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
    """Raises FormatError for tensors on different devices, or without numbers."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise FormatError(f"{name}: values and metadata are on different devices: {', '.join(map(str, devices))}")
    if any(tensor.is_meta for tensor in tensors):
        raise FormatError(f"{name}: is on the meta device, which holds no numbers; load the weights first")
    for tensor in tensors:
        if tensor.is_cpu and tensor.numel() and type(tensor) not in (Tensor, torch.nn.Parameter):
            raise FormatError(f"{name}: is a {type(tensor).__name__}; packing reads plain tensors only")


def check_shapes(packed: Packed24, name: str) -> None:
    """Raises FormatError when the two tensors do not belong together, whatever they hold."""
    values, metadata = packed.values, packed.metadata
    check_device(name, *packed.tensors)
    if packed.scales is not None:
        _check_quantized_shapes(packed, packed.scales, name)
        return
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


def _check_quantized_shapes(packed: Packed24, scales: Tensor, name: str) -> None:
    values, metadata = packed.values, packed.metadata
    if (
        values.ndim != 2
        or 0 in values.shape
        or values.dtype not in (torch.int8, torch.uint8)
        or packed.shape[1] % GROUP
    ):
        raise FormatError(
            f"{name}: quantized values must be (N, K/2) int8 or (N, K/4) uint8 with K a multiple of {GROUP}, "
            f"not {tuple(values.shape)} {values.dtype}"
        )
    for what, tensor, shape, dtype in (
        ("metadata", metadata, packed.spec.metadata, torch.uint8),
        ("scales", scales, packed.spec.scales, SCALE_DTYPE),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise FormatError(
                f"{name}: {what} must be {shape} {dtype} beside values {tuple(values.shape)} {values.dtype}, "
                f"not {tuple(tensor.shape)} {tensor.dtype}"
            )


def check_finite(weight: Tensor, name: str) -> None:
    """Raises FormatError with the index of the first element of `weight` that is NaN or infinite."""
    if weight.is_meta:
        raise FormatError(f"{name}: is on the meta device, which holds no numbers; load the weights first")
    if not weight.numel() or torch.isfinite(torch.stack(torch.aminmax(weight))).all():  # in one pass
        return
    index = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
    raise FormatError(f"{name}: weight {index} is {weight[index].item()}; NaN and infinities cannot be pruned")
