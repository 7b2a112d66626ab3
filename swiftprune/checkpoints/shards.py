"""One file of a checkpoint: safetensors, or what torch.save wrote of tensors and nothing else."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from swiftprune.errors import CheckpointError, first_line

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The float types of safetensors that a checkpoint to be pruned may use; all others only for tensors left alone."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is and what it is, from the header of its shard."""

    shard: str
    shape: tuple[int, ...]
    dtype_name: str
    nbytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype when it is one that can be pruned, else None."""
        return TORCH_DTYPES.get(self.dtype_name)


def shard_entries(path: Path) -> dict[str, TensorEntry]:
    """What the header of one file lists, by tensor name in order."""
    entries = {}
    with open_shard(path) as file:
        for name in sorted(file.keys()):
            view = file.get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            entries[name] = TensorEntry(path.name, shape, dtype, tensor_bytes(shape, dtype))
    return entries


def tensor_bytes(shape: tuple[int, ...], dtype_name: str) -> int:
    bits = re.search(r"\d+", dtype_name)  # the first number: F8_E4M3 has 8
    return torch.Size(shape).numel() * (int(bits[0]) if bits else 8) // 8


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """The file, mapped, as safetensors' `safe_open` gives it. Raises CheckpointError that names it where damaged."""
    if path.suffix == ".bin":
        yield _PickledShard(path)
        return
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    size = path.stat().st_size if path.exists() else 0
    return CheckpointError(f"{path}: truncated or damaged ({first_line(error)}; {size:,} bytes on disk)")


class _PickledShard:
    """Tensors by name from a pickle, of which nothing else is run or made."""

    def __init__(self, path: Path) -> None:
        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: is no pickle of tensors alone, and reading more would run code that it holds "
                f"({first_line(error)}); use the model's safetensors"
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            if "mmap can only be used" in str(error):
                raise CheckpointError(
                    f"{path}: is not as torch.save has written since 1.6: damaged, or older; download it again, or "
                    "load it and save it once more"
                ) from error
            raise _damaged(path, error) from error
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise CheckpointError(f"{path}: is no dictionary of tensors by name, as save_pretrained writes")
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in found.items()}
        held = Counter(tensor.untyped_storage().data_ptr() for tensor in self._tensors.values())
        self._shared = {n for n, t in self._tensors.items() if held[t.untyped_storage().data_ptr()] > 1}
        """Those that lie in one piece of memory with others, as tied weights do; writers want each by itself."""

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.clone(memory_format=torch.contiguous_format) if name in self._shared else tensor.contiguous()

    def get_slice(self, name: str) -> _PickledSlice:
        return _PickledSlice(self._tensors[name])


class _PickledSlice:
    """A tensor that is there, as safetensors gives a slice of one that is not."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        dtype = self._tensor.dtype
        return _NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]
