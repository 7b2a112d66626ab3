"""The GPU backends: what each holds of a packed weight, and how it multiplies.

A backend of the name `X-int8` or `X-fp8` holds the values in 8 bits with a scale for each row. It is never chosen by
itself, since its results are others. `triton-int8` multiplies by 16-bit inputs; the others quantize inputs as well,
each token by its largest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.formats import cutlass
from swiftprune.formats.spec import Packed24, WeightSpec
from swiftprune.kernels import packing, reference, semi_structured, triton_linear
from swiftprune.kernels.base import LinearKernel

TRITON, UNPACK, CUTLASS, CUSPARSELT = "triton", "unpack", "cutlass", "cusparselt"

CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (8, 0), torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}
"""The least compute capability that multiplies the type 2:4."""
_SUFFIX = {None: "", torch.int8: "-int8", torch.float8_e4m3fn: "-fp8"}


class GpuBackend(LinearKernel):
    """A way to multiply by a packed weight on a GPU.

    The backends of a plan share buffers of one name. `quantized` is the type of its 8-bit values, None where values
    stay as they are.
    """

    def __init__(self, kind: str, buffer_names: Collection[str], quantized: torch.dtype | None = None) -> None:
        self.quantized = quantized
        self.suffix = _SUFFIX[quantized]
        self.name = kind + self.suffix
        self.buffer_names = (*buffer_names, f"scale{self.suffix}") if quantized else tuple(buffer_names)

    def prepare(self, packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
        values, metadata = packed.values.detach(), packed.metadata.detach()
        buffers = {"values": values, "metadata": metadata}
        if self.quantized:
            values, scale = semi_structured.quantize_rows(values, self.quantized)
            buffers |= {f"values{self.suffix}": values, f"scale{self.suffix}": scale}
        buffers |= self._prepare(values, metadata)
        return {name: buffers[name] for name in self.buffer_names}

    def _prepare(self, values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
        """Buffers beyond values, metadata and scales, such as metadata in CUTLASS's order."""
        return {}

    def restore(self, buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
        return restore(buffers, spec)

    @abstractmethod
    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        """x W^T + bias: (..., N) in the dtype of `x` (..., K), of which there is at least one token."""

    @abstractmethod
    def unsupported_reason(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        """Why it cannot run a weight (N, K) of `dtype` on a device of this compute capability, or None."""

    def _common_reason(self, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{self.name} takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
        if capability < (least := CAPABILITY[self.quantized or dtype]):
            needed, have = (".".join(map(str, version)) for version in (least, capability))
            return f"{self.name} needs compute capability {needed}, and this is {have}"
        return None


class _Triton(GpuBackend):
    """Our kernels, which expand the values in registers."""

    def __init__(self, kind: str = TRITON, quantized: torch.dtype | None = None) -> None:
        super().__init__(kind, (f"values{_SUFFIX[quantized]}", "metadata"), quantized)

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        scale = buffers[f"scale{self.suffix}"] if self.quantized else None
        return triton_linear.linear24(x, buffers[f"values{self.suffix}"], buffers["metadata"], bias, scale)

    def unsupported_reason(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        return self._common_reason(dtype, capability) or triton_linear.unsupported_reason(shape, dtype)


class _Unpack(_Triton):
    """The weight unpacked by our kernel for every call, and a dense product."""

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        return F.linear(x, triton_linear.unpack24(buffers["values"], buffers["metadata"]), bias)


class _SemiStructured(GpuBackend):
    """One of torch's operators for 2:4 tensor cores."""

    def apply(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None, out_features: int) -> Tensor:
        flat = semi_structured.aligned_rows(x)
        if self.quantized is None:
            y = self._product(flat, buffers, bias)
        else:
            quantized, scale = semi_structured.quantize_rows(flat, self.quantized)
            sums = self._product(quantized, buffers, None)
            y = semi_structured.scaled(sums, scale, buffers[f"scale{self.suffix}"], bias, x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @abstractmethod
    def _product(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x W^T + bias of x (M, K) in the type of the values."""


class _Cutlass(_SemiStructured):
    def __init__(self, quantized: torch.dtype | None = None) -> None:
        names = (f"values{_SUFFIX[quantized]}", f"cutlass_metadata{_SUFFIX[quantized]}")
        super().__init__(CUTLASS, names, quantized)

    def _prepare(self, values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
        return {f"cutlass_metadata{self.suffix}": cutlass.to_cutlass(values, metadata)[1]}

    def _product(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        values, metadata = buffers[f"values{self.suffix}"], buffers[f"cutlass_metadata{self.suffix}"]
        return semi_structured.cutlass_linear(x, values, metadata, bias)

    def unsupported_reason(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        if reason := self._common_reason(dtype, capability):
            return reason
        if capability[0] != semi_structured.CUTLASS_MAJOR:
            return f"torch's cutlass needs compute capability {semi_structured.CUTLASS_MAJOR}.x"
        return semi_structured.unsupported_reason(CUTLASS, shape, self.quantized or dtype)


class _CuSparseLt(_SemiStructured):
    def __init__(self, quantized: torch.dtype | None = None) -> None:
        super().__init__(CUSPARSELT, (f"compressed{_SUFFIX[quantized]}",), quantized)

    def _prepare(self, values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
        return {f"compressed{self.suffix}": semi_structured.compress_cusparselt(values, metadata)}

    def _product(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return semi_structured.cusparselt_linear(x, buffers[f"compressed{self.suffix}"], bias)

    def unsupported_reason(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        if reason := self._common_reason(dtype, capability):
            return reason
        if not torch.backends.cusparselt.is_available():
            return "this torch has no cuSPARSELt, or finds no GPU for it"
        return semi_structured.unsupported_reason(CUSPARSELT, shape, self.quantized or dtype)


BACKENDS: dict[str, GpuBackend] = {
    backend.name: backend
    for backend in (
        _Triton(),
        _Cutlass(),
        _CuSparseLt(),
        _Unpack(UNPACK),
        _Triton(quantized=torch.int8),
        _Cutlass(torch.int8),
        _CuSparseLt(torch.int8),
        _CuSparseLt(torch.float8_e4m3fn),
    )
}
EXACT = tuple(name for name, backend in BACKENDS.items() if backend.quantized is None)


def restore(buffers: Mapping[str, Tensor], spec: WeightSpec) -> Packed24:
    """The packed weight that backends of GPUs laid `buffers` out from.

    Raises SettingsError where only quantized values are left.
    """
    if "values" in buffers and "metadata" in buffers:
        return Packed24(buffers["values"], buffers["metadata"])
    if "values" in buffers:
        return Packed24(*cutlass.from_cutlass(buffers["values"], buffers["cutlass_metadata"]))
    if "compressed" in buffers:
        packed = packing.pack(unpack(buffers, spec).cpu())
        device = buffers["compressed"].device
        return Packed24(packed.values.to(device), packed.metadata.to(device))
    raise SettingsError("this layer holds 8-bit values only; the weight that it was made of can no longer be had")


def unpack(buffers: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
    """The dense weight (N, K), on the device of `buffers`."""
    if "compressed" in buffers and "values" not in buffers:
        # Its layout is its own. A product with ones and zeros has one weight in each sum, so it is exact.
        one = torch.eye(spec.shape[1], dtype=buffers["compressed"].dtype, device=buffers["compressed"].device)
        return semi_structured.cusparselt_linear(one, buffers["compressed"]).t().contiguous()
    return reference.unpack_unchecked(restore(buffers, spec))


def unsupported_reasons(
    dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]
) -> dict[str, str | None]:
    """Why each backend cannot run a weight (N, K) of `dtype` on a device of this compute capability, or None."""
    return {name: backend.unsupported_reason(dtype, shape, capability) for name, backend in BACKENDS.items()}
