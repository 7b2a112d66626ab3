"""The CPU kernels: native ones over the tiled layout, and the torch reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from swiftprune.formats import spec
from swiftprune.formats.spec import METADATA_SUFFIX, Packed24, WeightSpec
from swiftprune.kernels import native, packing, reference
from swiftprune.kernels.base import LinearKernel
from swiftprune.kernels.dispatch import REFERENCE

METADATA = f"weight{METADATA_SUFFIX}"


class TiledKernel(LinearKernel):
    """The native kernel of one instruction set. All of them read one layout (csrc/tiled.h)."""

    buffer_names = ("tiled",)

    def __init__(self, isa: str) -> None:
        self.name = isa

    def prepare(self, packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
        """Checks the weight as it lays it out."""
        tiled = native.to_tiled(packed.values, packed.metadata)
        if tiled is None:
            spec.validate(packed, name)
            raise AssertionError(f"{name}: the native check and the slow one disagree")
        return {"tiled": tiled}

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        return native.linear24(self.name, x, buffers["tiled"], bias, out_features)

    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        return Packed24(*native.from_tiled(buffers["tiled"], spec.values, *spec.shape))


class ReferenceKernel(LinearKernel):
    """Unpacks the weight for every call and multiplies densely: right on every device, faster nowhere."""

    name = REFERENCE
    buffer_names = ("weight", METADATA)

    def prepare(self, packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
        return {"weight": packed.values, METADATA: packed.metadata}

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        return F.linear(x, self.unpack(buffers, WeightSpec((out_features, x.shape[-1]), x.dtype)), bias)

    def unpack(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        """Checked on the CPU; on other devices a check of every call would wait for them."""
        pair = self.restore(buffers, spec)
        return packing.unpack(pair) if pair.values.is_cpu else reference.unpack_unchecked(pair)

    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        return Packed24(buffers["weight"], buffers[METADATA])


KERNELS: dict[str, LinearKernel] = {
    kernel.name: kernel for kernel in (*map(TiledKernel, native.LINEAR_ISAS), ReferenceKernel())
}
