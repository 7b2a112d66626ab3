"""A linear layer over a packed 2:4 weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftprune.sparse24.format import GROUP, KEPT, Packed24, metadata_width, unpack


class Linear24(nn.Module):
    """y = x W^T + b with W (N, K) stored as the packed pair `weight` (N, K/2), `weight_meta` (N, ceil(K/8)).

    Backend `reference`: the weight is unpacked for every call and multiplied densely, so it is right everywhere and
    faster nowhere. Values and inputs are of one float dtype; x is (..., K), y is (..., N).
    """

    backend = "reference"

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        values = torch.empty(out_features, in_features // GROUP * KEPT, dtype=dtype, device=device)
        metadata = torch.empty(out_features, metadata_width(in_features), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.weight_meta = nn.Parameter(metadata, requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    @property
    def packed(self) -> Packed24:
        return Packed24(self.weight, self.weight_meta)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, unpack(self.packed), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"backend={self.backend}"
        )
