"""What calibration collects of the inputs of a linear, for methods to go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Needs = Literal["nothing", "input_sq_sum", "group_gram", "gram", "drift"]
"""What calibration must collect, each more than the one before: `drift` is the Gram matrix and the drift."""


@dataclass
class InputStats:
    """What calibration saw at the input of one linear with K in_features."""

    token_count: int
    on_all_tokens: bool = False
    """Of an expert: whether all tokens were taken, as too few were routed to it."""
    input_sq_sum: Tensor | None = None
    """(K,) fp32: sum of squares of every input channel."""
    group_gram: Tensor | None = None
    """(K/4, 4, 4) fp32: the blocks of X^T X on its diagonal, one a group of four."""
    gram: Tensor | None = None
    """(K, K) fp32: X^T X."""
    input_drift: Tensor | None = None
    """(K, K) fp32: (X_dense - X)^T X, with the inputs of the dense model on the same tokens."""
    residual_drift: Tensor | None = None
    """(H, K) fp32: (R_dense - R)^T X, R the residual stream that the block starts from. Of linears that write to it."""
    sample: Tensor | None = None
    """(S, K) fp32: some of the inputs themselves, for the output error of the report."""

    @property
    def channel_energy(self) -> Tensor:
        """(K,) fp32: `input_sq_sum`, from whatever was collected."""
        if self.gram is not None:
            return self.gram.diagonal()
        if self.group_gram is not None:
            return self.group_gram.diagonal(dim1=1, dim2=2).flatten()
        assert self.input_sq_sum is not None, "the pipeline collects what METHODS says a method needs"
        return self.input_sq_sum

    @property
    def gram_of_groups(self) -> Tensor:
        """(K/4, 4, 4) fp32: `group_gram`, or those blocks of `gram` where that was collected for a later stage."""
        if self.group_gram is not None:
            return self.group_gram
        assert self.gram is not None, "the pipeline collects what METHODS says a method needs"
        groups = len(self.gram) // 4
        return self.gram.view(groups, 4, groups, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def drift(self, weight: Tensor) -> Tensor | None:
        """(N, K) fp32: (Y_dense - X W^T)^T X, where Y_dense is what the linear should add to the residual stream.

        That is its own output in the dense model and, where it writes to the residual stream, what that lacks.
        """
        if self.input_drift is None:
            return None
        drift = weight.float() @ self.input_drift
        return drift if self.residual_drift is None else drift + self.residual_drift
