"""What each GPU backend holds of a weight, and how it multiplies.

A backend of the name `X-int8` or `X-fp8` holds the values in 8 bits with a scale for each row. It is never chosen by
itself, since its results are others. `triton-int8` multiplies by 16-bit inputs; the others quantize inputs as well,
each token by its largest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.sparse24.kernels import semi_structured, triton_linear

TRITON, UNPACK, CUTLASS, CUSPARSELT = "triton", "unpack", "cutlass", "cusparselt"
EXACT = (TRITON, CUTLASS, CUSPARSELT, UNPACK)
_EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
QUANTIZED = ("triton-int8", "cutlass-int8", "cusparselt-int8", "cusparselt-fp8")
BACKENDS = (*EXACT, *QUANTIZED)

CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (8, 0), torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}
"""The least compute capability that multiplies the type 2:4."""


def held_names(backends: Collection[str]) -> list[str]:
    """Names of the tensors that these backends hold together, in one order."""
    return sorted({name for backend in backends for name in _HELD[backend]})


def lay_out(backends: Collection[str], values: Tensor, metadata: Tensor) -> dict[str, Tensor]:
    """The tensors of `held_names` for a packed pair, on its device. Raises FormatError for unsuitable shapes."""
    held = {"values": values, "metadata": metadata}
    for name in sorted(backends):
        kind, dtype = _split(name)
        suffix = name.removeprefix(kind)
        if dtype is None:
            stored = values
        elif "values" + suffix not in held:
            stored, held["scale" + suffix] = semi_structured.quantize_rows(values, dtype)
            held["values" + suffix] = stored
        else:
            stored = held["values" + suffix]
        if kind == CUTLASS:
            _, held["cutlass_metadata" + suffix] = semi_structured.to_cutlass(stored, metadata)
        elif kind == CUSPARSELT:
            held["compressed" + suffix] = semi_structured.compress_cusparselt(stored, metadata)
    return {name: held[name] for name in held_names(backends)}


def pair_of(held: Mapping[str, Tensor], rows: int, cols: int) -> tuple[Tensor, Tensor] | Tensor:
    """The packed pair that was laid out, or the dense weight (N, K) where only cuSPARSELt's form of it is held.

    Raises SettingsError where only quantized values are.
    """
    if "values" in held and "metadata" in held:
        return held["values"], held["metadata"]
    if "values" in held:
        return semi_structured.from_cutlass(held["values"], held["cutlass_metadata"])
    if "compressed" in held:
        # Its layout is its own. A product with ones and zeros has one weight in each sum, so it is exact.
        one = torch.eye(cols, dtype=held["compressed"].dtype, device=held["compressed"].device)
        return semi_structured.cusparselt_linear(one, held["compressed"]).t().contiguous()
    raise SettingsError("this layer holds 8-bit values only; the weight that it was made of can no longer be had")


def multiply(backend: str, x: Tensor, held: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
    """x W^T + bias: (..., N) in the dtype of `x` (..., K), of which there is at least one token."""
    kind, dtype = _split(backend)
    if kind == TRITON:
        suffix = backend.removeprefix(kind)
        scale = held["scale" + suffix] if dtype else None
        return triton_linear.linear24(x, held["values" + suffix], held["metadata"], bias, scale)
    if kind == UNPACK:
        return F.linear(x, triton_linear.unpack24(held["values"], held["metadata"]), bias)
    flat = x.reshape(-1, x.shape[-1])
    run = _cutlass if kind == CUTLASS else _cusparselt
    if dtype is None:
        y = run(flat, held, "", bias)
    else:
        suffix = backend.removeprefix(kind)
        quantized, scale = semi_structured.quantize_rows(flat, dtype)
        y = semi_structured.scaled(run(quantized, held, suffix, None), scale, held["scale" + suffix], bias, x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def refusals(dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> dict[str, str | None]:
    """Why each backend cannot run a weight (N, K) of `dtype` on a device of this compute capability, or None."""
    return {backend: _refusal(backend, dtype, shape, capability) for backend in BACKENDS}


def _refusal(backend: str, dtype: torch.dtype, shape: tuple[int, int], capability: tuple[int, int]) -> str | None:
    kind, quantized = _split(backend)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{backend} takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if capability < (least := CAPABILITY[quantized or dtype]):
        return f"{backend} needs compute capability {least[0]}.{least[1]}, and this is {capability[0]}.{capability[1]}"
    if kind in (TRITON, UNPACK):
        return triton_linear.unsuitable_reason(shape, dtype)
    if kind == CUTLASS and capability[0] != semi_structured.CUTLASS_MAJOR:
        return f"torch's cutlass needs compute capability {semi_structured.CUTLASS_MAJOR}.x"
    if kind == CUSPARSELT and not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt, or finds no GPU for it"
    return semi_structured.unsuitable_reason(kind, shape, quantized or dtype)


def _split(backend: str) -> tuple[str, torch.dtype | None]:
    kind, _, bits = backend.partition("-")
    return kind, _EIGHT_BITS.get(bits)


def _cutlass(x: Tensor, held: Mapping[str, Tensor], suffix: str, bias: Tensor | None) -> Tensor:
    return semi_structured.cutlass_linear(x, held["values" + suffix], held["cutlass_metadata" + suffix], bias)


def _cusparselt(x: Tensor, held: Mapping[str, Tensor], suffix: str, bias: Tensor | None) -> Tensor:
    return semi_structured.cusparselt_linear(x, held["compressed" + suffix], bias)


_HELD: dict[str, tuple[str, ...]] = {
    TRITON: ("values", "metadata"),
    UNPACK: ("values", "metadata"),
    CUTLASS: ("values", "cutlass_metadata"),
    CUSPARSELT: ("compressed",),
    "triton-int8": ("values-int8", "metadata", "scale-int8"),
    "cutlass-int8": ("values-int8", "cutlass_metadata-int8", "scale-int8"),
    "cusparselt-int8": ("compressed-int8", "scale-int8"),
    "cusparselt-fp8": ("compressed-fp8", "scale-fp8"),
}
