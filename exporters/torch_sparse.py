"""The `torch` target: weights in the CUTLASS layout of torch's own semi-structured sparse tensors.

`swiftprune.formats.cutlass` specifies it. `load` rebuilds `SparseSemiStructuredTensorCUTLASS` of it, on the device that
they are to stay on: torch moves no such tensor. Multiplying needs a CUDA device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from swiftprune.checkpoints.source import Checkpoint
from swiftprune.errors import FormatError
from swiftprune.formats.cutlass import FORMAT
from swiftprune.formats.spec import METADATA_SUFFIX


def load(folder: str | Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a `--target torch` export by name, on `device`, linears as `SparseSemiStructuredTensorCUTLASS`.

    Raises CheckpointError for a damaged folder and FormatError for one of another format.
    """
    checkpoint = Checkpoint(Path(folder))
    found = checkpoint.config.get("quantization_config", {}).get("format")
    if found != FORMAT:
        raise FormatError(f"{folder}: has the format {found!r}, not {FORMAT!r}; export with --target torch")
    tensors: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        tensors.update(load_file(checkpoint.folder / shard, device=str(device)))
    for name in [name for name in tensors if name + METADATA_SUFFIX in tensors]:
        values, metadata = tensors[name], tensors.pop(name + METADATA_SUFFIX)
        shape = torch.Size((values.shape[0], 2 * values.shape[1]))
        tensors[name] = SparseSemiStructuredTensorCUTLASS(shape, values, metadata, None, None, None)
    return tensors
