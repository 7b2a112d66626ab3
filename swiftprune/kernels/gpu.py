"""The GPU backends: what each holds of a packed weight, and how it multiplies.

A backend of the name `X-int8` or `X-fp8` holds the values in 8 bits with a scale for each row. It is never chosen by
itself, since its results are others. `triton-int8` multiplies by 16-bit inputs; the others quantize inputs as well,
each token by its largest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.formats import cutlass
from swiftprune.kernels import semi_structured, triton_linear

TRITON, UNPACK, CUTLASS, CUSPARSELT = "triton", "unpack", "cutlass", "cusparselt"

CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (8, 0), torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}
"""The least compute capability that multiplies the type 2:4."""
_SUFFIX = {None: "", torch.int8: "-int8", torch.float8_e4m3fn: "-fp8"}


class GpuBackend(ABC):
    """A way to multiply by a packed weight on a GPU.

    `holds` names the tensors that it keeps of one; the backends of a plan share those of one name. `quantized` is the
    type of its 8-bit values, None where values stay as they are.
    """

    def __init__(self, kind: str, holds: Collection[str], quantized: torch.dtype | None = None) -> None:
        self.quantized = quantized
        self.suffix = _SUFFIX[quantized]
        self.name = kind + self.suffix
        self.holds = (*holds, f"scale{self.suffix}") if quantized else tuple(holds)

    def lay_out(self, values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
        """What it alone holds of a packed pair, whose values are in its type. The pair and scales are not its task."""
        return {}

    @abstractmethod
    def multiply(self, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x W^T + bias: (..., N) in the dtype of `x` (..., K), of which there is at least one token."""

    @abstractmethod
    def refusal(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        """Why it cannot run a weight (N, K) of `dtype` on a device of this compute capability, or None."""

    def _common_refusal(self, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
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

    def multiply(self, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        scale = held[f"scale{self.suffix}"] if self.quantized else None
        return triton_linear.linear24(x, held[f"values{self.suffix}"], held["metadata"], bias, scale)

    def refusal(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        return self._common_refusal(dtype, capability) or triton_linear.unsupported_reason(shape, dtype)


class _Unpack(_Triton):
    """The weight unpacked by our kernel for every call, and a dense product."""

    def multiply(self, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, triton_linear.unpack24(held["values"], held["metadata"]), bias)


class _SemiStructured(GpuBackend):
    """One of torch's operators for 2:4 tensor cores."""

    def multiply(self, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        flat = semi_structured.aligned_rows(x)
        if self.quantized is None:
            y = self._product(flat, held, bias)
        else:
            quantized, scale = semi_structured.quantize_rows(flat, self.quantized)
            sums = self._product(quantized, held, None)
            y = semi_structured.scaled(sums, scale, held[f"scale{self.suffix}"], bias, x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @abstractmethod
    def _product(self, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """x W^T + bias of x (M, K) in the type of the values."""


class _Cutlass(_SemiStructured):
    def __init__(self, quantized: torch.dtype | None = None) -> None:
        names = (f"values{_SUFFIX[quantized]}", f"cutlass_metadata{_SUFFIX[quantized]}")
        super().__init__(CUTLASS, names, quantized)

    def lay_out(self, values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
        return {f"cutlass_metadata{self.suffix}": cutlass.to_cutlass(values, metadata)[1]}

    def _product(self, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        values, metadata = held[f"values{self.suffix}"], held[f"cutlass_metadata{self.suffix}"]
        return semi_structured.cutlass_linear(x, values, metadata, bias)

    def refusal(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        if reason := self._common_refusal(dtype, capability):
            return reason
        if capability[0] != semi_structured.CUTLASS_MAJOR:
            return f"torch's cutlass needs compute capability {semi_structured.CUTLASS_MAJOR}.x"
        return semi_structured.unsupported_reason(CUTLASS, shape, self.quantized or dtype)


class _CuSparseLt(_SemiStructured):
    def __init__(self, quantized: torch.dtype | None = None) -> None:
        super().__init__(CUSPARSELT, (f"compressed{_SUFFIX[quantized]}",), quantized)

    def lay_out(self, values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
        return {f"compressed{self.suffix}": semi_structured.compress_cusparselt(values, metadata)}

    def _product(self, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return semi_structured.cusparselt_linear(x, held[f"compressed{self.suffix}"], bias)

    def refusal(self, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
        if reason := self._common_refusal(dtype, capability):
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


def held_names(backends: Collection[str]) -> list[str]:
    """Names of the tensors that these backends hold together, in one order."""
    return sorted({name for backend in backends for name in BACKENDS[backend].holds})


def lay_out(backends: Collection[str], values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
    """The tensors of `held_names` for a packed pair, on its device. Raises FormatError for unsuitable shapes."""
    held = {"values": values, "metadata": metadata}
    for backend in (BACKENDS[name] for name in sorted(backends)):
        of_values, of_scale = f"values{backend.suffix}", f"scale{backend.suffix}"
        if backend.quantized and of_values not in held:
            held[of_values], held[of_scale] = semi_structured.quantize_rows(values, backend.quantized)
        held |= backend.lay_out(held[of_values], metadata)
    return {name: held[name] for name in held_names(backends)}


def pair_of(held: Mapping[str, Tensor], rows: int, cols: int) -> tuple[Tensor, Tensor] | Tensor:
    """The packed pair that was laid out, or the dense weight (N, K) where only cuSPARSELt's form of it is held.

    Raises SettingsError where only quantized values are.
    """
    if "values" in held and "metadata" in held:
        return held["values"], held["metadata"]
    if "values" in held:
        return cutlass.from_cutlass(held["values"], held["cutlass_metadata"])
    if "compressed" in held:
        # Its layout is its own. A product with ones and zeros has one weight in each sum, so it is exact.
        one = torch.eye(cols, dtype=held["compressed"].dtype, device=held["compressed"].device)
        return semi_structured.cusparselt_linear(one, held["compressed"]).t().contiguous()
    raise SettingsError("this layer holds 8-bit values only; the weight that it was made of can no longer be had")


def refusals(dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> dict[str, str | None]:
    """Why each backend cannot run a weight (N, K) of `dtype` on a device of this compute capability, or None."""
    return {name: backend.refusal(dtype, shape, capability) for name, backend in BACKENDS.items()}
