"""The command with which TensorRT builds an engine that may use 2:4 kernels."""

from __future__ import annotations

import shlex
from pathlib import Path

from swiftprune.errors import CheckpointError

# Least, typical and largest size of an open axis, by its name in the file.
_SIZES = {
    "batch": (1, 1, 8),
    "batch_size": (1, 1, 8),
    "sequence_length": (1, 1, 512),
    "past_sequence_length": (0, 512, 2048),
    "total_sequence_length": (1, 513, 2560),
}
_OTHER_SIZES = (1, 64, 512)


def trtexec_command(path: Path) -> str:
    """`trtexec` with sparsity enabled and the shapes of every input of the ONNX file `path` that has open axes.

    Change the sizes to what will be served; total_sequence_length is the sum of past and sequence.
    Raises CheckpointError when the file is not readable.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise CheckpointError(f"{path}: is not a readable ONNX model ({error})") from error
    elements = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    elements |= {tensor.data_type for tensor in model.graph.initializer}
    narrow = "bf16" if onnx.TensorProto.BFLOAT16 in elements else "fp16"
    profiles: list[list[str]] = [[], [], []]
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if all(dimension.HasField("dim_value") for dimension in dimensions):
            continue
        for place, profile in enumerate(profiles):
            sizes = (
                dimension.dim_value
                if dimension.HasField("dim_value")
                else _SIZES.get(dimension.dim_param, _OTHER_SIZES)[place]
                for dimension in dimensions
            )
            profile.append(f"{value.name}:{'x'.join(map(str, sizes))}")
    options = [f"--onnx={path}", f"--{narrow}", "--sparsity=enable", "--verbose"]
    if profiles[0]:
        names = ("min", "opt", "max")
        options += [f"--{name}Shapes={','.join(profile)}" for name, profile in zip(names, profiles, strict=True)]
    return shlex.join(["trtexec", *options])
