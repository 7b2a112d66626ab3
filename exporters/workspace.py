"""The folder an export is built in, beside its destination, so that an unfinished output never looks finished.

`OUT.partial` holds one shard per unit of work and, once a shard is complete, `SHARD.done.json` with its layer results.
Shards are written under a temporary name and renamed. `finish` renames the folder to `OUT` and removes the marks.
`OUT.lock` names the process that works on it. What stands at `OUT` already is replaced only if an export wrote it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from swiftprune.calibration.data import CalibrationData
from swiftprune.checkpoints.source import Orders
from swiftprune.errors import OutputError, and_more, first_line
from swiftprune.progress import Notify, ignore_message

MANIFEST = "swiftprune.json"
"""What an export leaves in its output: settings, results, and under `files` the names of all that it wrote."""
_STATE = "export-state.json"
_TOKENS = "calibration-tokens.safetensors"
_ORDERS = "permutations.safetensors"
_DENSE = "dense-linears.json"
_FITTED = "fitted-samples.json"
_TRAINING = "training.safetensors"
_DONE = ".done.json"
_LEAVING = ".swiftprune-replaced"
"""In a former output that is being replaced: by it alone `OUT.replaced` is known to be one, and may be deleted."""
# What only an unfinished export needs.
_PASSING = {_STATE, _TOKENS, _ORDERS, _DENSE, _FITTED, _TRAINING}
# What goes on whatever the user does but choosing another place.
_UNWRITABLE = {errno.EACCES, errno.EEXIST, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


class Workspace:
    """The folder of one export, locked while it is open (a context manager).

    Opening it decides, before any work, whether `out` may be written. Raises OutputError when it may not: when another
    export works on it, when something is in the way that no export wrote or that is not to be replaced, or when `out`
    contains `source`, the working folder or a home.
    """

    def __init__(
        self, out: Path, source: Path, *, resume: bool, overwrite: bool, notify: Notify = ignore_message
    ) -> None:
        self.out = out
        with disk_errors(out, kept="nothing was changed"):
            try:
                self._place = out.resolve()  # a link is followed: what it points at is what gets replaced
            except RuntimeError:  # as Python up to 3.12 says it
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
            _check_place(out, self._place, source)
            self.folder = self._beside(".partial")
            self._replaced = self._beside(".replaced")
            self._replaced.exists()  # OSError where the name has no room for the suffix
        self._resume = resume
        self._overwrite = overwrite
        self._lock = _Lock(self._beside(".lock"), out, notify)

    def _beside(self, suffix: str) -> Path:
        return self._place.with_name(self._place.name + suffix)

    def __enter__(self) -> Self:
        self._lock.acquire()
        try:
            self._check_in_the_way()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if _holds_no_work(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _check_in_the_way(self) -> None:
        self._check_replaceable()
        if self._replaced.exists() and not (self._replaced / _LEAVING).exists():
            raise OutputError(
                f"{self._replaced}: is in the way of replacing {self.out}; move it, or give another --out"
            )
        if not self.folder.exists() or _holds_no_work(self.folder):
            self._resume = False
            return
        if not (self._resume or self._overwrite):
            raise OutputError(
                f"{self.folder}: an export was interrupted here; continue it with --resume, "
                "or start anew with --overwrite"
            )
        if not self._resume and not _is_partial(self.folder):
            raise OutputError(
                f"{self.folder}: is not an unfinished export, so --overwrite does not replace it; "
                "move it, or give another --out"
            )

    def _check_replaceable(self) -> None:
        """Raises OutputError unless nothing stands at `out`, or with `overwrite` only what an export wrote."""
        place = self._place
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return
        if not place.is_dir():
            raise OutputError(f"{self.out}: is a file, which --overwrite does not replace; give another --out")
        if not self._overwrite:
            raise OutputError(f"{self.out}: exists; give another --out, or --overwrite to replace it")
        if not _is_output(place):
            raise OutputError(
                f"{self.out}: no export wrote it (it has no {MANIFEST} that lists its files), "
                "so --overwrite does not replace it; give another --out"
            )
        listed = set(_manifest(place)["files"])
        written = (place / MANIFEST).stat().st_mtime_ns
        others = sorted(
            name
            for name in _files(place) - listed - {_LEAVING}
            # Marks that an export had no time to remove are older than its last file.
            if not (_is_mark(name) and (place / name).lstat().st_mtime_ns <= written)
        )
        if others:
            more = and_more(others)
            raise OutputError(
                f"{self.out}: holds {others[0]}{more}, which no export wrote and --overwrite would "
                "delete; move it, or give another --out"
            )

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
            self.folder.mkdir()
            self.write_json(_STATE, state)

    def _check_same(self, state: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.folder / _STATE).read_text())
            if not isinstance(before, dict):
                raise ValueError(f"{_STATE} is no object")
        except (OSError, ValueError, RecursionError):
            raise OutputError(f"{self.folder}: holds no readable {_STATE}; start anew with --overwrite") from None
        now = json.loads(json.dumps(state))
        for key in sorted(set(before) | set(now)):
            was, is_now = before.get(key), now.get(key)
            if was == is_now:
                continue
            if key == "inputs_sha256" and was and is_now:
                changed = next(name for name in sorted(set(was) | set(is_now)) if was.get(name) != is_now.get(name))
                raise OutputError(
                    f"{self.folder}: {changed} has changed since the export was started; put back what "
                    "it was, or start anew with --overwrite"
                )
            raise OutputError(
                f"{self.folder}: was started with {key} = {json.dumps(was)}, now it is {json.dumps(is_now)}; "
                "use the same settings, or start anew with --overwrite"
            )

    def done(self, shard: str) -> list[dict[str, Any]] | None:
        """The layer results of a finished shard, or None when it is not finished, or was damaged since."""
        try:
            results = json.loads((self.folder / (shard + _DONE)).read_text())
            with safe_open(self.folder / shard, framework="pt"):  # its header, and whether all it lists is there
                return results if isinstance(results, list) else None
        except (OSError, ValueError, SafetensorError):
            return None

    def read_shard(self, shard: str) -> dict[str, Tensor]:
        with _reading(self.folder / shard):
            return load_file(self.folder / shard)

    def write_shard(self, shard: str, tensors: Mapping[str, Tensor], results: list[dict[str, Any]]) -> None:
        """Writes a shard, then its mark. Raises OutputError when the disk is full or fails."""
        with disk_errors(self.folder):
            self._write_tensors(shard, tensors)
            self.write_json(shard + _DONE, results)

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor], **metadata: str) -> None:
        temporary = self.folder / (name + ".tmp")
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt"} | metadata)
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self.folder / name)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, sort_keys=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        with disk_errors(self.folder):
            temporary = self.folder / (name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(self.folder / name)

    def data(self) -> CalibrationData | None:
        """The calibration tokens that an interrupted run stored, so that resuming sees the same ones."""
        path = self.folder / _TOKENS
        with _reading(path):
            return CalibrationData(**load_file(path)) if path.exists() else None

    def keep_data(self, data: CalibrationData) -> None:
        with disk_errors(self.folder):
            self._write_tensors(_TOKENS, dict(vars(data)))

    def orders(self) -> Orders | None:
        """The permutations that an interrupted run found."""
        path = self.folder / _ORDERS
        if not path.exists():
            return None
        orders: dict[str, dict[int, Tensor]] = {}
        with _reading(path):
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
        with _reading(path):
            return [str(name) for name in json.loads(path.read_text())] if path.exists() else None

    def keep_dense_linears(self, names: list[str]) -> None:
        self.write_json(_DENSE, names)

    def fitted_samples(self) -> int | None:
        """How many calibration sequences an interrupted run found to fit its minutes."""
        path = self.folder / _FITTED
        with _reading(path):
            return int(json.loads(path.read_text())) if path.exists() else None

    def keep_fitted_samples(self, samples: int) -> None:
        self.write_json(_FITTED, samples)

    def load_training(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What distillation continues from."""
        path = self.folder / _TRAINING
        if not path.exists():
            return None
        with _reading(path), safe_open(path, framework="pt") as file:
            return load_file(path), json.loads(file.metadata()["progress"])

    def save_training(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        with disk_errors(self.folder):
            self._write_tensors(_TRAINING, tensors, progress=json.dumps(progress))

    def copy(self, source: Path, name: str) -> None:
        """Copies the file `source` to `name`, which may be in a sub-folder."""
        with disk_errors(self.folder):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.folder / name)

    def finish(self, part: str | None = None) -> None:
        """Puts the folder in its place, without what only an unfinished export needs; or, of it, the folder `part`.

        Raises OutputError when something that may not be replaced has come to `out` since the export began.
        """
        with disk_errors(self.folder):
            self._check_replaceable()
            made = self.folder / part if part else self.folder
            self.write_json(
                str((made / MANIFEST).relative_to(self.folder)),
                _manifest(made) | {"files": sorted(name for name in _files(made) if not _is_temporary(name))},
            )
            if self._replaced.exists():  # of an export that was stopped right here
                shutil.rmtree(self._replaced)
            if self._place.exists():
                if any(self._place.iterdir()):
                    (self._place / _LEAVING).touch()
                self._place.rename(self._replaced)
            made.rename(self._place)
            for path in self._place.iterdir():
                if _is_temporary(path.name):
                    path.unlink()
            for left in (self.folder, self._replaced):
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


_LOCK_BEGINS = '{"pid": '
_OWNER = {"pid", "host", "started"}


class _Lock:
    """`OUT.lock`: held by the operating system for as long as its process lives, and naming that process."""

    def __init__(self, path: Path, out: Path, notify: Notify) -> None:
        self._path = path
        self._out = out
        self._notify = notify
        self._file = FileLock(path)

    def acquire(self) -> None:
        """Raises OutputError when another process has it. One that a dead process left is taken over with a word.

        A file of that name that is no lock of an export is left alone: other tools have some.
        """
        if self._path.exists() and not self._is_lock():
            raise OutputError(f"{self._path}: is in the way, and no lock of an export; give another --out")
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._file.acquire(blocking=False)
            except Timeout:
                owner = self._owner()
                raise OutputError(
                    f"{self._out}: another export is writing it ({_described(owner) if owner else 'it just began'}); "
                    "wait for that, or give another --out"
                ) from None
        if owner := self._owner():
            # A network file system may not carry the operating system's lock from one host to another.
            if owner["host"] != socket.gethostname():
                self._file.release()
                raise OutputError(
                    f"{self._out}: another export may be writing it ({_described(owner)}), which this machine cannot "
                    f"see; if that has ended, delete {self._path}"
                )
            self._notify(f"{self._out}: taking over from an export that was stopped ({_described(owner)}).")
        with disk_errors(self._path):
            self._path.write_text(
                json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}) + "\n"
            )

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.release()

    def _is_lock(self) -> bool:
        """Whether an export wrote the file that is there, be it empty or cut short."""
        if self._owner():
            return True
        try:
            found = self._path.read_text()
        except (OSError, ValueError):
            return False
        return "}" not in found and (found.startswith(_LOCK_BEGINS) or _LOCK_BEGINS.startswith(found))

    def _owner(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return owner if isinstance(owner, dict) and set(owner) == _OWNER else None


def _described(owner: Mapping[str, Any]) -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["started"]))
    return f"process {owner['pid']} on {owner['host']}, since {started}"


def _check_place(out: Path, place: Path, source: Path) -> None:
    """Raises OutputError when `place` holds what no export may replace, whatever it is told."""
    if place.parent == place or os.path.ismount(place):
        raise OutputError(f"{out}: is the root of a file system; give a folder within it as --out")
    if place == source.resolve():
        raise OutputError(f"{out}: is the model itself; give another --out")
    for what, path in (("the model", source), ("the working folder", Path.cwd()), *_homes()):
        if path.resolve().is_relative_to(place):
            raise OutputError(f"{out}: is or contains {what} ({path}); give another --out")


def _homes() -> list[tuple[str, Path]]:
    homes = {Path.home()}
    try:
        import pwd

        homes |= {Path(user.pw_dir) for user in pwd.getpwall()}
    except ImportError:  # not on Windows
        pass
    return [("a home folder", home) for home in sorted(homes) if home.is_dir()]


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`, or an empty one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _is_output(folder: Path) -> bool:
    return folder.is_dir() and isinstance(_manifest(folder).get("files"), list)


def _is_partial(folder: Path) -> bool:
    return folder.is_dir() and (folder / _STATE).is_file()


def _holds_no_work(folder: Path) -> bool:
    """Whether an export that made it ended before it did anything: it is empty, or says for what it was made."""
    if not folder.is_dir() or any(path.is_dir() for path in folder.iterdir()):
        return False
    return _files(folder) <= {_STATE, _STATE + ".tmp"}


def _files(folder: Path) -> set[str]:
    """Names of all files within, relative to `folder`."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _is_mark(name: str) -> bool:
    """Whether only an unfinished export needs the file."""
    return name.endswith(_DONE) or name in _PASSING


def _is_temporary(name: str) -> bool:
    return name.endswith(".tmp") or _is_mark(name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what a damaged file of an unfinished export raises into OutputError."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise OutputError(f"{path}: damaged ({first_line(error)}); start anew with --overwrite") from error


_KEPT = "finished blocks are kept, continue with --resume"


@contextmanager
def disk_errors(place: Path, kept: str = _KEPT) -> Iterator[None]:
    """Turns failures to write to `place` into OutputError that says what is kept, or that it can never be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number == errno.ENOSPC or "No space left" in str(error):
            reason = f"the disk is full; {kept}"
        elif number in _UNWRITABLE:
            reason = f"{error.strerror if isinstance(error, OSError) else error}; give another --out"
        else:
            reason = f"{error}; {kept}"
        raise OutputError(f"{place}: cannot be written: {reason}") from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
