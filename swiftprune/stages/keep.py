"""Method `keep`: the weights stay as they are, where they fit the pattern already or a mask from elsewhere makes them.

Checkpoints that were pruned and trained by other tools come with their zeros in place. Masks alone come as one file:
MaskLLM's (arXiv 2409.17481) and those of its successors are .npz files with `<tensor>.mask`, the bits of the flattened
(N, K) mask packed by `numpy.packbits`, 1 = kept. Those, and plain bool or 0/1 arrays in .npz or .safetensors, are read.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import SettingsError, and_more, first_line
from swiftprune.methods.mask import Pattern, violation
from swiftprune.models.plan import Linear
from swiftprune.progress import ProgressCallback

_SUFFIXES = ("", ".mask", "_mask")
_WEIGHT = ".weight"


class KeepMasks:
    """The masks of a file, read one at a time. Raises SettingsError for a file that is no such."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: Mapping[str, Any] = _open(path)

    def check(self, tensors: Iterable[str]) -> None:
        """Raises SettingsError for a mask that belongs to none of `tensors`, the weights that can be pruned."""
        known = list(tensors)
        expected = {name for tensor in known for name in _names(tensor)}
        for tensor in known:
            if len(several := [name for name in _names(tensor) if name in self._arrays]) > 1:
                raise SettingsError(f"--mask {self.path}: {several[0]!r} and {several[1]!r} are both masks of {tensor}")
        if unknown := [name for name in self._arrays if name not in expected]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            raise SettingsError(
                f"--mask {self.path}: {unknown[0]!r}{and_more(unknown)} is of no linear that is pruned"
                + (f"; near is {near[0]!r}" if near else "")
            )

    def read(self, tensor: str, shape: tuple[int, int], pattern: Pattern) -> Tensor | None:
        """The bool (N, K) keep_mask of the weight `tensor`, or None. Raises SettingsError when it is no such mask."""
        name = next((name for name in _names(tensor) if name in self._arrays), None)
        if name is None:
            return None
        where = f"--mask {self.path}: {name}"
        try:
            array = np.asarray(self._arrays[name])
        except Exception as error:  # of many types, all meaning that the file is damaged
            raise SettingsError(f"{where} cannot be read: {first_line(error)}") from error
        count = shape[0] * shape[1]
        if array.shape == shape:
            if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
                raise SettingsError(f"{where} holds other values than 0 and 1")
            mask = array.astype(np.bool_)
        elif array.dtype == np.uint8 and array.shape == (shape[0], (shape[1] + 7) // 8):
            mask = np.unpackbits(array, axis=1, count=shape[1]).astype(np.bool_)
        elif array.dtype == np.uint8 and array.size == (count + 7) // 8:
            mask = np.unpackbits(array.ravel(), count=count).astype(np.bool_).reshape(shape)
        else:
            raise SettingsError(
                f"{where} has shape {array.shape} and type {array.dtype}, which is no mask of a weight {shape}: "
                f"give bool {shape}, or its bits as {(count + 7) // 8} uint8"
            )
        keep = torch.from_numpy(mask)
        if reason := violation(keep, pattern):
            raise SettingsError(f"{where} is not {pattern.name}: {reason}")
        return keep


def violations(
    checkpoint: Checkpoint,
    linears: Iterable[Linear],
    pattern: Pattern,
    masks: KeepMasks | None,
    progress: ProgressCallback,
) -> Iterator[tuple[str, str]]:
    """Name of each linear that neither fits `pattern` nor has a mask, and why. Reads one weight at a time."""
    todo = list(linears)
    for index, linear in enumerate(todo):
        progress("check", index, len(todo))
        weight = checkpoint.read([linear.tensor])[linear.tensor]
        shape = (weight.shape[0], weight.shape[1])
        if masks is not None and masks.read(linear.tensor, shape, pattern) is not None:
            continue
        if reason := violation(weight, pattern):
            none = f" and {masks.path.name} has no mask of it" if masks is not None else ""
            yield linear.name, f"not {pattern.name}: {reason}{none}"
    progress("check", len(todo), len(todo))


def _names(tensor: str) -> list[str]:
    """What the mask of a weight may be called."""
    module = tensor.removesuffix(_WEIGHT)
    return [f"{stem}{suffix}" for stem in (tensor, module) for suffix in _SUFFIXES]


def _open(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise SettingsError(f"--mask {path}: no such file")
    try:
        if path.suffix == ".npz":
            arrays: Mapping[str, Any] = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            arrays = _Safetensors(path)
        else:
            raise SettingsError(f"--mask {path}: give a .npz or .safetensors file")
    except SettingsError:
        raise
    except Exception as error:  # of many types, all meaning that the file is damaged
        raise SettingsError(f"--mask {path}: cannot be read: {first_line(error)}") from error
    if not len(arrays):
        raise SettingsError(f"--mask {path}: holds no masks")
    return arrays


class _Safetensors(Mapping[str, Any]):
    """The tensors of a file as numpy arrays, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        self._file = file
        self._names: list[str] = list(file.keys())

    def __getitem__(self, name: str) -> Any:
        tensor = self._file.get_tensor(name)
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
