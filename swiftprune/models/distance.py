"""How far what a pruned model predicts is from what its dense original does."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.nn import functional as F

_LOWEST = -6e4
_TEMPORARIES = 6  # float32 tensors of a window's tokens by the vocabulary, at once


class Distance:
    """Between two models on the same windows, all predictions of the dense one first, then those of the pruned one.

    Both are given as log probabilities (T, V) fp32 of a window at a time, in the same order. The first `limit` windows
    count, and others are let pass.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._dense: deque[tuple[Tensor, Tensor]] = deque()
        self._tokens = 0
        self.windows = 0
        """That both models have read."""
        self._divergence = 0.0
        self._agreed = 0

    @staticmethod
    def nbytes(windows: int, seqlen: int, vocabulary: int) -> int:
        """About what is kept of the dense model, and what is made of one window at a time."""
        return seqlen * vocabulary * (windows * torch.float16.itemsize + _TEMPORARIES * torch.float32.itemsize)

    def add_dense(self, log_probabilities: Tensor) -> None:
        if not self._left:
            return
        self._left -= 1
        # Where logits are masked, as low as float16 goes.
        self._dense.append((log_probabilities.clamp_min(_LOWEST).half(), log_probabilities.argmax(-1)))

    def add_pruned(self, log_probabilities: Tensor) -> None:
        if not self._dense:
            return
        dense, likeliest = self._dense.popleft()
        self._tokens += len(dense)
        self.windows += 1
        self._divergence += float(F.kl_div(log_probabilities, dense.float(), reduction="sum", log_target=True))
        self._agreed += int((log_probabilities.argmax(-1) == likeliest).sum())

    @property
    def divergence(self) -> float:
        """Kullback-Leibler, from the dense model, in nats a token."""
        return self._divergence / self._tokens

    @property
    def agreement(self) -> float:
        """The share of tokens for which both find the same one likeliest."""
        return self._agreed / self._tokens
