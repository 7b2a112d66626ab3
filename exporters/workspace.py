"""The folder an export is built in, beside its destination, so that an unfinished output never looks finished.

`OUT.partial` holds one shard per unit of work and, once a shard is complete, `SHARD.done.json` with its layer results.
Shards are written under a temporary name and renamed. `finish` removes the marks and renames the folder to `OUT`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from swiftprune.errors import OutputError
from swiftprune.pruning.checkpoint import Orders

_STATE = "export-state.json"
_TOKENS = "calibration-tokens.safetensors"
_ORDERS = "permutations.safetensors"
_DENSE = "dense-linears.json"
_TRAINING = "training.safetensors"
_DONE = ".done.json"
# What only an unfinished export needs.
_PASSING = {_STATE, _TOKENS, _ORDERS, _DENSE, _TRAINING}


class Workspace:
    """The place of one export. Raises OutputError when `out` exists, or when a partial export is in the way."""

    def __init__(self, out: Path, *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.training = self.folder / _TRAINING
        """Where distillation keeps what it continues from."""
        self._resume = resume and self.folder.exists()
        if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
            raise OutputError(f"{out}: exists; give another --out, or --overwrite to replace it")
        if self.folder.exists() and not (resume or overwrite):
            raise OutputError(f"{self.folder}: an export was interrupted here; continue it with --resume, "
                              "or start anew with --overwrite")  # fmt: skip

    def begin(self, state: Mapping[str, Any]) -> None:
        """Makes the partial folder, or, resuming, checks that it was made for the same `state`.

        `state` is all that the output depends on: source hashes, settings, versions.
        """
        if self._resume:
            self._check_same(state)
            return
        with disk_errors(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self.write_json(_STATE, state)

    def _check_same(self, state: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.folder / _STATE).read_text())
        except (OSError, json.JSONDecodeError):
            raise OutputError(f"{self.folder}: holds no readable {_STATE}; start anew with --overwrite") from None
        now = json.loads(json.dumps(state))
        for key in sorted(set(before) | set(now)):
            if before.get(key) != now.get(key):
                raise OutputError(
                    f"{self.folder}: was started with {key} = {json.dumps(before.get(key))}, now it is "
                    f"{json.dumps(now.get(key))}; use the same settings, or start anew with --overwrite"
                )

    def done(self, shard: str) -> list[dict[str, Any]] | None:
        """The layer results of a finished shard, or None when it is not finished."""
        try:
            results: list[dict[str, Any]] = json.loads((self.folder / (shard + _DONE)).read_text())
            return results
        except (OSError, json.JSONDecodeError):
            return None

    def read_shard(self, shard: str) -> dict[str, Tensor]:
        return load_file(self.folder / shard)

    def write_shard(self, shard: str, tensors: Mapping[str, Tensor], results: list[dict[str, Any]]) -> None:
        """Writes a shard, then its mark. Raises OutputError when the disk is full or fails."""
        with disk_errors(self.folder):
            self._write_tensors(shard, tensors)
            self.write_json(shard + _DONE, results)

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        temporary = self.folder / (name + ".tmp")
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self.folder / name)

    def write_json(self, name: str, value: Any) -> None:
        with disk_errors(self.folder):
            temporary = self.folder / (name + ".tmp")
            temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")
            temporary.rename(self.folder / name)

    def tokens(self) -> Tensor | None:
        """The calibration tokens that an interrupted run stored, so that resuming sees the same ones."""
        path = self.folder / _TOKENS
        return load_file(path)["tokens"] if path.exists() else None

    def keep_tokens(self, tokens: Tensor) -> None:
        with disk_errors(self.folder):
            self._write_tensors(_TOKENS, {"tokens": tokens})

    def orders(self) -> Orders | None:
        """The permutations that an interrupted run found."""
        path = self.folder / _ORDERS
        if not path.exists():
            return None
        orders: dict[str, dict[int, Tensor]] = {}
        for key, order in load_file(path).items():
            axis, _, name = key.partition(" ")
            orders.setdefault(name, {})[int(axis)] = order
        return orders

    def keep_orders(self, orders: Orders) -> None:
        stored = {f"{axis} {name}": order.clone() for name, axes in orders.items() for axis, order in axes.items()}
        with disk_errors(self.folder):
            self._write_tensors(_ORDERS, stored)

    def dense_linears(self) -> list[str] | None:
        """The linears that an interrupted run decided to leave dense."""
        path = self.folder / _DENSE
        names: list[str] | None = json.loads(path.read_text()) if path.exists() else None
        return names

    def keep_dense_linears(self, names: list[str]) -> None:
        self.write_json(_DENSE, names)

    def copy(self, source: Path) -> None:
        with disk_errors(self.folder):
            shutil.copyfile(source, self.folder / source.name)

    def finish(self, part: str | None = None) -> None:
        """Puts the folder in its place, without what only an unfinished export needs; or, of it, the folder `part`."""
        with disk_errors(self.folder):
            for path in self.folder.iterdir() if part is None else ():
                if path.name.endswith((_DONE, ".tmp")) or path.name in _PASSING:
                    path.unlink()
            replaced = self.out.with_name(self.out.name + ".replaced")
            if self.out.exists():
                self.out.rename(replaced)
            (self.folder / part if part else self.folder).rename(self.out)
            for left in (self.folder, replaced):
                if left.exists():
                    shutil.rmtree(left)

    def check_space(self, needed: int) -> None:
        """Raises OutputError before any work when `needed` bytes do not fit beside what is there already."""
        present = sum(path.stat().st_size for path in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        if needed - present > free:
            raise OutputError(
                f"{self.folder}: the export needs {_gigabytes(needed - present)}, the disk has {_gigabytes(free)} free"
            )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns failures to write into OutputError that says what is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else str(error)
        raise OutputError(
            f"{folder}: cannot be written: {reason}; finished blocks are kept, continue with --resume"
        ) from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
