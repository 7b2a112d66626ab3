"""The command with which TensorRT builds an engine that may use 2:4 kernels."""

from __future__ import annotations

import shlex
from pathlib import Path

from exporters.onnx.weights import load_graph

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
    Raises CheckpointError as `load_graph`.
    """
    graph = load_graph(path).graph
    elements = {value.dtype.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    narrow = "bf16" if "BFLOAT16" in elements else "fp16"
    profiles: list[list[str]] = [[], [], []]
    for value in graph.inputs:
        if value.shape is None or value.shape.is_static():
            continue
        for place, profile in enumerate(profiles):
            sizes = (
                size if isinstance(size, int) else _SIZES.get(size.value, _OTHER_SIZES)[place] for size in value.shape
            )
            profile.append(f"{value.name}:{'x'.join(map(str, sizes))}")
    options = [f"--onnx={path}", f"--{narrow}", "--sparsity=enable", "--verbose"]
    if profiles[0]:
        names = ("min", "opt", "max")
        options += [f"--{name}Shapes={','.join(profile)}" for name, profile in zip(names, profiles, strict=True)]
    return shlex.join(["trtexec", *options])
