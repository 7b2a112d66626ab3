"""Output heads and embeddings in 8 bits: dense, a scale for each row (version 3 of the format).

A token reads the whole head, which in 16 bits is more than all packed linears of a model with quantized values. On CPUs
the head's product is torch's own, of weights in 8 bits and inputs as they are, which are not rounded. Elsewhere both
are to be made dense once loaded (`to_dense`): there is no such product here that would be faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftprune.errors import FormatError
from swiftprune.formats.spec import SCALE_DTYPE, check_finite
from swiftprune.kernels.levels import LARGEST, to_values
from swiftprune.kernels.quantize import scales_of

BACKEND = "int8-dense"
"""What is reported of a head in 8 bits."""
# torch's operator reads past the ends of rows of other widths: wrong results and crashes, of 2.13 in bfloat16.
_OPERATOR_INPUTS = 32
# It crashes on numbers at other addresses, too, and where a file is mapped they may stand anywhere.
_OPERATOR_BYTES = 64
_PART_WEIGHTS = 1 << 20
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def quantize_rows(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """(V, H) int8 and (V, 1) bfloat16 scales of `weight` (V, H), to nearest. Raises FormatError for NaN or infinity."""
    check_finite(weight, name)
    wide = weight.float()
    scale = scales_of(wide, "int8")
    return to_values(wide, scale, "int8"), scale


def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight (V, H): exact in float32, rounded to `dtype`."""
    return (values.float() * scale.float()).to(dtype)


def check_rows(values: Tensor, scale: Tensor, name: str = "weight") -> None:
    """Raises FormatError, with `name`, for numbers that rules 10 and 12 of the format do not allow."""
    if values.numel() and int(values.min()) < -LARGEST:
        raise FormatError(f"{name}: holds -128, which the packed format does not have; the file is damaged")
    if not torch.isfinite(scale).all():
        raise FormatError(f"{name}: a scale is not finite; the file is damaged")


def multiply_rows(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: (..., V) in the dtype of `x` (..., H), from `values` (V, H) int8 and `scale` (V,) in that dtype."""
    plain = x.is_cpu and x.dtype in _FLOATS and not (torch.is_grad_enabled() and x.requires_grad)
    if plain and x.shape[-1] % _OPERATOR_INPUTS == 0:
        y: Tensor = torch.ops.swiftprune.rows8(x.reshape(-1, x.shape[-1]), values, scale)
        y = y.view(*x.shape[:-1], len(values))
    else:
        y = (F.linear(x.float(), values.float()) * scale.float()).to(x.dtype)  # float16 has no room for unscaled sums
    return y if bias is None else y + bias


# An operator of our own around torch's, since a compiler knows no addresses. The library lives as long as the process.
_library = torch.library.Library("swiftprune", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("rows8(Tensor x, Tensor values, Tensor scale) -> Tensor")  # type: ignore[no-untyped-call]


@torch.library.impl(_library, "rows8", "CPU")
def _rows8(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and len(x) == 1):
        product: Any = torch.ops.aten._weight_int8pack_mm
        y: Tensor = product(aligned(x.contiguous()), aligned(values), scale)
        return y
    return _by_parts(x, values, scale)


def _by_parts(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """The product through dense weights in float32, a part at a time so that caches hold it.

    torch's operator computes one number after another in types other than bfloat16: 30 times as long for a prompt.
    """
    y, x, scale = x.new_empty(len(x), len(values)), x.float(), scale.float()
    step = max(1, _PART_WEIGHTS // values.shape[1])
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        y[:, part] = F.linear(x, values[part].float()) * scale[part]
    return y


@torch.library.register_fake("swiftprune::rows8")  # type: ignore[untyped-decorator]
def _rows8_fake(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(values))


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous, where torch's operator can read it: itself, or a copy."""
    return tensor if tensor.data_ptr() % _OPERATOR_BYTES == 0 else tensor.clone()


class _Rows8(nn.Module):
    """Rows in 8 bits, for modules that compute in a float type.

    It is no nn.Embedding and no nn.Linear, so that what changes weights, as adapters and resizing do, refuses it.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    _like: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in: what the module is moved to."""
        return self._like.dtype

    @property
    def scale(self) -> Tensor:
        """(V, 1) bfloat16."""
        return self.weight_scale

    def _hold(self, rows: int, cols: int, device: torch.device | str) -> None:
        values = torch.empty(rows, cols, dtype=torch.int8, device=device)
        scale = torch.empty(rows, 1, dtype=SCALE_DTYPE, device=device)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The format fixes the type of scales, whatever type the module computes in."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if "weight_scale" in self._parameters:
            self.weight_scale.data = self.weight_scale.data.to(SCALE_DTYPE)
        return self


class Embedding8(_Rows8):
    """Embeddings whose rows are stored in 8 bits; what comes out is of type `dtype`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dtype, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._hold(num_embeddings, embedding_dim, device)

    def forward(self, ids: Tensor) -> Tensor:
        return dequantize_rows(F.embedding(ids, self.weight), F.embedding(ids, self.weight_scale), self.dtype)

    def to_dense(self) -> nn.Embedding:
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        weight = dequantize_rows(self.weight, self.weight_scale, self.dtype)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


class Head8(_Rows8):
    """An output head whose rows are stored in 8 bits. `tied` embeddings share theirs, scales included."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        tied: Embedding8 | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.in_features, self.out_features = in_features, out_features
        self.backend = BACKEND
        self._tied = [tied] if tied else []  # a list, so that it is no part of this module
        if tied:
            self.weight = tied.weight
        else:
            self._hold(out_features, in_features, device)
        empty = torch.empty(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty, requires_grad=False) if bias else None)

    @property
    def scale(self) -> Tensor:
        return self._tied[0].scale if self._tied else super().scale

    def forward(self, x: Tensor) -> Tensor:
        return multiply_rows(x, self.weight, self.scale[:, 0].to(x.dtype), self.bias)

    def to_dense(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = dequantize_rows(self.weight, self.scale, self.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8"
