"""Where and in which type products are computed: a device, and the faster type there."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from swiftprune.errors import SettingsError
from swiftprune.ranks import local_device

ComputeName = Literal["float32", "bfloat16"]
_SHAPE = (512, 1024, 1024)
_CALLS = 4
# bfloat16 has to win by this much: some machines emulate it, and there it loses.
_WORTHWHILE = 1.2
_BFLOAT16_CAPABILITY = (8, 0)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Compute:
    """Where a run computes, and in which type it multiplies. All else is float32.

    Tensors come onto the device where blocks and models are loaded, and leave it where a block is finished: what stages
    keep and hand on is on the CPU.
    """

    device: torch.device = _CPU
    dtype: torch.dtype = torch.float32

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def here(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device."""
        return tensor.to(self.device, non_blocking=True)

    def autocast(self, dtype: torch.dtype | None = None) -> torch.autocast:
        """Products in `dtype`, by default the run's, within, of float32 tensors too.

        Weights may change meanwhile: no cast of one is kept.
        """
        chosen = self.dtype if dtype is None else dtype
        return torch.autocast(self.device.type, chosen, enabled=chosen != torch.float32, cache_enabled=False)

    def wait(self) -> None:
        """Until the device has done what it was given: clocks are read after that."""
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)

    def free_bytes(self) -> int:
        """Of the device's own memory; not of a CPU's, for which see `stages.memory`."""
        return int(torch.cuda.mem_get_info(self.device)[0])


def find_device(name: str) -> torch.device:
    """`auto` (this process's NVIDIA GPU, the first one where it is alone, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises SettingsError for another name, and for a GPU that is not there or that this torch does not see.
    """
    if name == "auto":
        return local_device() if torch.cuda.is_available() else _CPU
    if name == "cpu":
        return _CPU
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise SettingsError(f"--device {name!r}: give auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise SettingsError(f"--device {name}: torch {torch.__version__}, {built}, finds no NVIDIA GPU")
    index = device.index or 0
    if index >= (count := torch.cuda.device_count()):
        raise SettingsError(f"--device {name}: torch finds {count} GPU{'s' * (count > 1)}, counted from cuda:0")
    return torch.device("cuda", index)


def faster_type(device: torch.device = _CPU) -> ComputeName:
    """bfloat16 where a matrix product in it takes clearly less time than in float32, else float32.

    On a CPU that is measured; NVIDIA GPUs have units for it from compute capability 8.0 on.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= _BFLOAT16_CAPABILITY else "float32"
    return _faster_type_of_cpu()


@functools.cache
def _faster_type_of_cpu() -> ComputeName:
    seconds = {dtype: _fastest_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bfloat16" if seconds[torch.bfloat16] * _WORTHWHILE < seconds[torch.float32] else "float32"


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Moves the buffers of `model` that hold numbers, as rotary tables do, and leaves parameters on the meta device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and buffer.device != device:
                setattr(module, name, buffer.to(device))


def _fastest_product(dtype: torch.dtype) -> float:
    m, k, n = _SHAPE
    left, right = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        times.append(time.perf_counter() - start)
    return min(times)
