"""In which type products are computed, and in which this machine is faster."""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch

ComputeName = Literal["float32", "bfloat16"]
_SHAPE = (512, 1024, 1024)
_CALLS = 4
# bfloat16 has to win by this much: some machines emulate it, and there it loses.
_WORTHWHILE = 1.2


@functools.cache
def faster_type() -> ComputeName:
    """bfloat16 where a matrix product in it takes clearly less time than in float32, measured here, else float32."""
    seconds = {dtype: _fastest_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bfloat16" if seconds[torch.bfloat16] * _WORTHWHILE < seconds[torch.float32] else "float32"


def autocast(compute: torch.dtype, device: str = "cpu") -> torch.autocast:
    """Products in `compute` within, of float32 tensors too. Weights may change meanwhile: no cast of one is kept."""
    return torch.autocast(device, compute, enabled=compute != torch.float32, cache_enabled=False)


def _fastest_product(dtype: torch.dtype) -> float:
    m, k, n = _SHAPE
    left, right = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - start)
    return min(times)
