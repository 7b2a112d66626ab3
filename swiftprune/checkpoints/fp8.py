"""Checkpoints that store weights as fp8 (E4M3) with a scale for each block: DeepSeek V3's, Qwen's and Mistral's own.

`NAME.weight` (N, K) stands for its values times `NAME.weight_scale_inv`: one number for the tensor, or (N/128, K/128),
rounded up, of blocks of 128 x 128 (`weight_block_size` of config.json). They are read as plain weights in the type of
the model, multiplied in float32 and rounded once; scales of activations are left out.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swiftprune.checkpoints.shards import TORCH_DTYPES, TensorEntry
from swiftprune.checkpoints.source import Checkpoint, Decoded
from swiftprune.errors import CheckpointError

METHOD = "fp8"
_VALUES = "F8_E4M3"
_SCALE_SUFFIX = "_scale_inv"
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_OF_ACTIVATIONS = (".activation_scale", ".input_scale")
_BLOCK = (128, 128)


def with_plain_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with each fp8 weight as a plain one, decoded as it is read.

    Raises CheckpointError, naming file and tensor, for weights without scales and for scales of another shape or type.
    """
    name = str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))).removeprefix("torch.")
    kinds = {str(dtype).removeprefix("torch."): kind for kind, dtype in TORCH_DTYPES.items()}
    kind = kinds.get(name, "BF16")
    block = _block(checkpoint)
    decoded: dict[str, Decoded] = {}
    for tensor, entry in checkpoint.tensors.items():
        if entry.dtype_name == _VALUES and not tensor.endswith(_SCALE_SUFFIX):
            scale = _scale(checkpoint, tensor, block)
            nbytes = entry.nbytes + checkpoint.tensors[scale].nbytes
            made = TensorEntry(entry.shard, entry.shape, kind, nbytes)
            decoded[tensor] = Decoded((tensor, scale), made, partial(_decode, checkpoint, tensor, scale, block, kind))
    left_out = [tensor for tensor in checkpoint.tensors if tensor.endswith(_OF_ACTIVATIONS)]
    return checkpoint.with_decoded(decoded, left_out)


def check_loads_whole(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where a weight ends within a block, which transformers takes for smaller blocks.

    So it does up to 5.23, which takes the size of blocks from the number of scales.
    """
    block = _block(checkpoint)
    for tensor, entry in checkpoint.tensors.items():
        scale = checkpoint.tensors.get(tensor + _SCALE_SUFFIX)
        if scale is None or torch.Size(scale.shape).numel() == 1:
            continue
        if any(size % by for size, by in zip(entry.shape, block, strict=True)):
            raise CheckpointError(
                f"{checkpoint.folder / entry.shard}: {tensor} is {entry.shape} in fp8, no whole number of blocks of "
                f"{block[0]} x {block[1]}, so transformers cannot load the whole model rightly: prune with "
                "--calibration FILE and --no-check, without distillation"
            )


def _block(checkpoint: Checkpoint) -> tuple[int, int]:
    given: Any = checkpoint.quantization.get("weight_block_size") or _BLOCK
    if not (isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given)):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: weight_block_size of its quantization_config is {given!r}, not two "
            "positive whole numbers"
        )
    return given[0], given[1]


def _scale(checkpoint: Checkpoint, tensor: str, block: tuple[int, int]) -> str:
    """The tensor that holds the scales of a weight."""
    name = tensor + _SCALE_SUFFIX
    weight, scale = checkpoint.tensors[tensor], checkpoint.tensors.get(name)
    file = checkpoint.folder / (scale or weight).shard
    if scale is None:
        raise CheckpointError(f"{file}: holds {tensor} in fp8 without {name}; download it again")
    grid = tuple(math.ceil(size / by) for size, by in zip(weight.shape, block, strict=False))
    if len(weight.shape) != 2 or scale.shape not in ((), (1,), (1, 1), grid):
        raise CheckpointError(
            f"{file}: {name} is {scale.shape} beside a weight {weight.shape}; one scale for the tensor, or of a matrix "
            f"one for each block of {block[0]} x {block[1]}, can be read"
        )
    if scale.dtype_name not in _SCALES:
        raise CheckpointError(f"{file}: {name} is {scale.dtype_name}, not {', '.join(_SCALES[:-1])} or {_SCALES[-1]}")
    values = checkpoint.read([name])[name].float()
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{file}: {name} holds a scale that is not finite; download it again")
    return name


def _decode(checkpoint: Checkpoint, tensor: str, scale: str, block: tuple[int, int], kind: str) -> Tensor:
    read = checkpoint.read([tensor, scale])
    values, scales = read[tensor].float(), read[scale].float()
    if scales.numel() > 1:
        rows, cols = values.shape
        scales = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
    return values.mul_(scales).to(TORCH_DTYPES[kind])
