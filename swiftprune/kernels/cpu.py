"""The CPU kernels: native ones over the tiled layout, and the torch reference."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from swiftprune.formats import spec
from swiftprune.formats.spec import METADATA_SUFFIX, QUANTIZED, SCALE_SUFFIX, Packed24, Quantized, WeightSpec
from swiftprune.kernels import native, packing, reference
from swiftprune.kernels.base import LinearKernel
from swiftprune.kernels.dispatch import REFERENCE

METADATA, SCALES = f"weight{METADATA_SUFFIX}", f"weight{SCALE_SUFFIX}"


class NativeKernel(LinearKernel):
    """A kernel over one tensor in a layout of its own, which is checked as it is made."""

    buffer_names = ("tiled",)

    @abstractmethod
    def _tiled(self, packed: Packed24) -> Tensor | None:
        """`packed` in that layout; None when it breaks the format."""

    def prepare(self, packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
        tiled = self._tiled(packed)
        if tiled is None:
            spec.validate(packed, name)
            raise AssertionError(f"{name}: the native check and the slow one disagree")
        return {"tiled": tiled}


class TiledKernel(NativeKernel):
    """Of one instruction set, for values in the type of the inputs. All of them read one layout (csrc/tiled.h)."""

    def __init__(self, isa: str) -> None:
        self.name = isa

    def _tiled(self, packed: Packed24) -> Tensor | None:
        return native.to_tiled(packed.values, packed.metadata)

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        return native.linear24(self.name, x, buffers["tiled"], bias, out_features)

    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        return Packed24(*native.from_tiled(buffers["tiled"], spec.dtype, *spec.shape))


class QuantKernel(NativeKernel):
    """Of one instruction set, for quantized values (csrc/quantized.h). It rounds inputs to 8 bits."""

    quantized_values: Quantized

    def __init__(self, isa: str, quantized: Quantized) -> None:
        self.isa = isa
        self.quantized_values = quantized
        self.name = f"{isa}-{quantized}"

    def _tiled(self, packed: Packed24) -> Tensor | None:
        return native.to_quant_tiled(packed)

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        return native.quant24(self.isa, self.quantized_values, x, buffers["tiled"], bias, out_features)

    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        return native.from_quant_tiled(buffers["tiled"], spec)


class ReferenceKernel(LinearKernel):
    """Unpacks the weight for every call and multiplies densely: right on every device, faster nowhere."""

    def __init__(self, quantized: bool = False) -> None:
        self.name = f"{REFERENCE}-quantized" if quantized else REFERENCE
        self.buffer_names = ("weight", METADATA, SCALES) if quantized else ("weight", METADATA)

    def prepare(self, packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
        return dict(zip(self.buffer_names, packed.tensors, strict=True))

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        return F.linear(x, self.unpack(buffers, WeightSpec((out_features, x.shape[-1]), x.dtype)), bias)

    def unpack(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
        """Checked on the CPU; on other devices a check of every call would wait for them."""
        packed = self.restore(buffers, spec)
        weight = packing.unpack(packed) if packed.values.is_cpu else reference.unpack_unchecked(packed)
        return weight.to(spec.dtype)

    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        return Packed24(*(buffers[name] for name in self.buffer_names))


KERNELS: dict[str, LinearKernel] = {
    kernel.name: kernel
    for kernel in (
        *map(TiledKernel, native.LINEAR_ISAS),
        *(QuantKernel(isa, quantized) for isa in native.QUANT_ISAS for quantized in QUANTIZED),
        ReferenceKernel(),
        ReferenceKernel(quantized=True),
    )
}
