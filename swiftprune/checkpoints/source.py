"""A source checkpoint on disk: its shards, read lazily, one tensor at a time."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftprune.checkpoints.shards import TensorEntry, open_shard, shard_entries, tensor_bytes
from swiftprune.errors import CheckpointError, SettingsError, first_line
from swiftprune.progress import ProgressCallback, no_progress

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# How weights may lie in a folder: one file, or the index of several. What transformers would choose comes first.
_LAYOUTS = ((SINGLE_NAME, INDEX_NAME), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_LONGEST_NAME = 255  # bytes, of one file, wherever Python runs
# Of a hub repository, all but its weights.
_SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

Orders = Mapping[str, Mapping[int, Tensor]]
"""By tensor and axis, the int64 indices in the order in which the entries along that axis are to stand."""


@dataclass(frozen=True)
class Part:
    """A weight as (out, in), or a bias, inside a tensor that stores it in another way."""

    tensor: str
    index: int | None
    """Of the expert, where the tensor stacks those of many."""
    rows: slice
    """Of its outputs."""
    transposed: bool
    """Whether weights are stored as (in, out)."""

    def of(self, stacked: Any) -> Tensor:
        """The part of `stacked`, a tensor or a slice of a file."""
        whole: Tensor = stacked[:] if self.index is None else stacked[self.index]
        return (whole.T if self.transposed and whole.ndim == 2 else whole)[self.rows]


@dataclass(frozen=True)
class Decoded:
    """A tensor that is made, as it is read, of those that stand for it in the files."""

    stored: tuple[str, ...]
    """Their names."""
    entry: TensorEntry
    """What it is once decoded; its bytes are those of the files."""
    read: Callable[[], Tensor]


class Checkpoint:
    """A local folder in the Hugging Face layout. Opening it reads and checks headers only, no weights.

    Raises CheckpointError naming the file when something is missing, damaged, or not a safetensors checkpoint.
    """

    def __init__(self, folder: Path, name: str | None = None, *, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        """Whether transformers may run Python code that the checkpoint brings along."""
        self.name = name or folder.resolve().name
        """The hub id, or the name of the folder."""
        _refuse_adapter(folder)
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.tensors: dict[str, TensorEntry] = _read_headers(folder)
        self._orders: Orders = {}
        self._parts: Mapping[str, Part] = {}
        self._decoded: Mapping[str, Decoded] = {}
        self.made: Mapping[str, Decoded] = {}
        """Parameters of the model that are made of tensors as they are read, and have none of their own."""

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
        """Opens a local folder, or downloads a hub id (`owner/name`) to the hub cache and opens that.

        `revision` is a branch, tag or commit of the hub repository.
        """
        folder = Path(model)
        if folder.is_dir():
            if revision is not None:
                raise SettingsError(f"--revision {revision}: {model} is a local folder, which has no revisions")
            return cls(folder, trust_remote_code=trust_remote_code)
        if folder.exists():
            raise CheckpointError(f"{model}: is a file; give the folder that holds config.json and *.safetensors")
        return cls(_download(str(model), revision), str(model), trust_remote_code=trust_remote_code)

    def permuted(self, orders: Orders) -> Checkpoint:
        """The same checkpoint with the entries of its tensors reordered as they are read."""
        other = copy.copy(self)
        other._orders = orders
        return other

    def split(self, parts: Mapping[str, Part]) -> Checkpoint:
        """The same checkpoint with `parts`, by their names, in the place of the tensors that hold them."""
        other = copy.copy(self)
        other._parts = parts
        held = {part.tensor for part in parts.values()}
        other.tensors = {name: entry for name, entry in self.tensors.items() if name not in held}
        for name, part in parts.items():
            entry = self.tensors[part.tensor]
            shape = tuple(part.of(torch.empty(entry.shape, device="meta")).shape)
            other.tensors[name] = TensorEntry(
                entry.shard, shape, entry.dtype_name, tensor_bytes(shape, entry.dtype_name)
            )
        return other

    @property
    def is_split(self) -> bool:
        return bool(self._parts)

    def with_decoded(self, decoded: Mapping[str, Decoded], left_out: Iterable[str] = ()) -> Checkpoint:
        """The same checkpoint with `decoded`, by name, in the place of what they are made of, and without `left_out`.

        What is decoded is not split.
        """
        other = copy.copy(self)
        other._decoded = decoded
        gone = {name for one in decoded.values() for name in one.stored} | set(left_out)
        other.tensors = {name: entry for name, entry in self.tensors.items() if name not in gone}
        other.tensors |= {name: one.entry for name, one in decoded.items()}
        return other

    def with_made(self, made: Mapping[str, Decoded]) -> Checkpoint:
        """The same checkpoint that reads `made` as well, by name; `tensors` still lists what these are made of."""
        other = copy.copy(self)
        other.made = made
        return other

    def entry(self, name: str) -> TensorEntry:
        """Of a tensor, or of what is made of several."""
        return self.made[name].entry if name in self.made else self.tensors[name]

    @property
    def is_permuted(self) -> bool:
        return bool(self._orders)

    def refuse_quantized(self) -> None:
        """Raises CheckpointError for a checkpoint whose weights are quantized or packed already."""
        quantization = self.quantization
        if quantization and not stores_plain_weights(quantization):
            method = quantization.get("quant_method", "an unnamed method")
            raise CheckpointError(
                f"{self.folder}: already quantized or packed by {method!r}; prune the original checkpoint"
            )

    @property
    def quantization(self) -> dict[str, Any]:
        """The `quantization_config` of config.json; empty where there is none."""
        value = self.config.get("quantization_config") or {}
        if not isinstance(value, dict) or not isinstance(value.get("sparsity_config") or {}, dict):
            raise CheckpointError(f"{self.folder / 'config.json'}: its quantization_config is no object that says how")
        return value

    @property
    def declared_pattern(self) -> str | None:
        """The pattern, as `2:4`, that the checkpoint itself says its weights have."""
        declared = (self.quantization.get("sparsity_config") or {}).get("sparsity_structure")
        if declared is None and (self.folder / "swiftprune.json").is_file():  # of an export with zeros in place
            declared = (read_json(self.folder / "swiftprune.json").get("settings") or {}).get("pattern")
        return declared if isinstance(declared, str) else None

    @property
    def shards(self) -> list[str]:
        return sorted({entry.shard for entry in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def parameter_count(self) -> int:
        return sum(torch.Size(entry.shape).numel() for entry in self.tensors.values())

    def fingerprint(self, progress: ProgressCallback = no_progress) -> dict[str, str]:
        """Shard name -> SHA-256 of its bytes, in hex. Reads every shard once."""
        hashes: dict[str, str] = {}
        for index, shard in enumerate(self.shards):
            progress("hash source", index, len(self.shards))
            with open(self.folder / shard, "rb") as file:
                hashes[shard] = hashlib.file_digest(file, "sha256").hexdigest()
        progress("hash source", len(self.shards), len(self.shards))
        return hashes

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, as read-only views of the mapped file: their pages go when the tensors go.

        Tensors that are permuted, parts of others and those that are decoded are copies.
        """
        by_shard: dict[str, list[str]] = {}
        tensors = {}
        for name in names:
            if decoded := self._decoded.get(name) or self.made.get(name):
                tensors[name] = self._ordered(name, decoded.read())
                continue
            by_shard.setdefault(self.tensors[name].shard, []).append(name)
        for shard, members in by_shard.items():
            with open_shard(self.folder / shard) as file:
                for name in members:
                    part = self._parts.get(name)
                    tensor = part.of(file.get_slice(part.tensor)).contiguous() if part else file.get_tensor(name)
                    tensors[name] = self._ordered(name, tensor)
        return tensors

    def _ordered(self, name: str, tensor: Tensor) -> Tensor:
        for axis, order in self._orders.get(name, {}).items():
            tensor = tensor.index_select(axis, order)
        return tensor


def _refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError for what peft saves of an adapter alone."""
    path = folder / "adapter_config.json"
    if path.is_file() and not (folder / "config.json").exists():
        base = read_json(path).get("base_model_name_or_path") or "a model that it does not name"
        raise CheckpointError(
            f"{folder}: is a peft adapter of {base}, not a model; merge it first (peft.AutoPeftModelForCausalLM."
            "from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER), the tokenizer beside it), or prune "
            "the base model and load the adapter on top"
        )


def stores_plain_weights(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` only says that compressed-tensors pruned weights, which are stored as ever."""
    sparsity = quantization.get("sparsity_config") or {}
    return sparsity.get("format") == "dense" and not quantization.get("config_groups")


def _download(name: str, revision: str | None) -> Path:
    """The folder of a hub repository's newest or given revision: first its small files, then the weights they name."""
    folder = from_hub(name, revision)
    _refuse_adapter(folder)
    for single, index in _LAYOUTS:
        is_indexed = (folder / index).exists()
        shards = set(read_json(folder / index).get("weight_map", {}).values()) if is_indexed else {single}
        folder = from_hub(name, revision, *sorted(shards))
        if is_indexed or (folder / single).exists():
            return folder
    raise CheckpointError(
        f"{name}: the repository holds no weights that transformers loads: neither {SINGLE_NAME} nor "
        f"{INDEX_NAME}, nor these of {_LAYOUTS[1][0]}"
    )


def from_hub(name: str, revision: str | None, *weights: str) -> Path:
    """The local folder of the hub repository `name` with its small files and those that match `weights`.

    Raises CheckpointError when `name` is no hub id (`owner/name`), or the hub cannot be read.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder, and not a hub id of the form owner/name")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*_SMALL_FILES, *weights])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}: no such folder here, and the hub could not be read{at}: {first_line(error)}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError that names the file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; is {path.parent} a model folder?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({first_line(error)})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def _read_headers(folder: Path) -> dict[str, TensorEntry]:
    for single, index in _LAYOUTS:
        index_path = folder / index
        if (folder / single).exists():  # as transformers chooses, whatever an index says
            if index_path.exists():
                logger.warning(
                    "%s: holds %s and %s; the first is read, as transformers reads it, and the shards of the "
                    "second are left out: delete what is stale",
                    folder,
                    single,
                    index,
                )
            return shard_entries(folder / single)
        if index_path.exists():
            return _read_indexed(index_path)
    other = next((p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"}), None)
    hint = f"; it holds {other}: convert it first with save_pretrained" if other else ""
    raise CheckpointError(f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")


def _read_indexed(index_path: Path) -> dict[str, TensorEntry]:
    folder = index_path.parent
    weight_map = read_json(index_path).get("weight_map")
    if not weight_map:
        raise CheckpointError(f"{index_path}: has no weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_path}: its weight_map does not name a file for each tensor")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index_path}: names the shard {shard!r}, which is not a plain file name")
        if len(os.fsencode(shard)) > _LONGEST_NAME or not (folder / shard).exists():
            raise CheckpointError(f"{folder / shard}: missing, though {index_path.name} names it; download it again")
        tensors.update(shard_entries(folder / shard))
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise CheckpointError(f"{index_path}: places {name} in {shard}, which does not hold it")
    return tensors
