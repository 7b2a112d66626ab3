"""A pruned torch module in memory, an encoder or a vision model say, as an ONNX file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from exporters.onnx.check import check_weights
from exporters.onnx.pack import check_replaceable, pack_model, written_aside
from exporters.onnx.trace import STANDARD_OPSET, trace
from swiftprune.errors import FormatError
from swiftprune.module import call_arguments, eval_mode
from swiftprune.progress import ProgressCallback, no_progress

_TOLERANCE = 1e-3  # of the largest output, in float32


class ModuleExport(BaseModel):
    """What `export_module` wrote."""

    model_config = ConfigDict(frozen=True)

    packed: dict[str, tuple[int, int]]
    """Weights stored packed -> (N, K)."""
    zeros_in_place: list[str]
    """Weights that are 2:4 and stored dense: convolutions, and all of them with `packed=False`."""
    dense: dict[str, str]
    """Weights that are not 2:4 along the summed axis -> why."""
    opset: int
    file_bytes: int
    max_difference: float
    """Between the outputs of the module and of the file in ONNX Runtime, on the example."""


def export_module(
    module: nn.Module,
    example: Any,
    out: Path,
    *,
    packed: bool = True,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> ModuleExport:
    """Writes `module` to the ONNX file `out`, its linears packed when they are 2:4, big tensors beside it.

    Prune it first with `swiftprune.prune_module`. `example` are inputs: a tensor, a tuple of positional arguments or a
    mapping of keyword arguments. The batch axis, the first of each tensor, stays open unless `dynamic_shapes`, as
    torch.export takes them, say otherwise. `packed=False` keeps all weights dense with their zeros in place, for
    TensorRT. Weights are float32.

    The file's answers on the example are compared with the module's. Raises CheckpointError when torch.onnx cannot
    export the module, FormatError when the answers differ, OutputError when `out` cannot be written,
    or exists and is not to be replaced (`overwrite`).
    """
    check_replaceable(out, overwrite=overwrite)
    arguments, keywords = call_arguments(example)
    if dynamic_shapes is None:
        dynamic_shapes = _open_batch(module, arguments, keywords)
    with eval_mode(module):
        program = trace(
            module,
            arguments,
            keywords,
            opset=STANDARD_OPSET,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
        )
        with torch.no_grad():
            expected = _tensors(module(*arguments, **keywords))
    with written_aside(out) as folder:
        dense = folder / "dense" / out.name
        dense.parent.mkdir()
        program.save(dense, external_data=True)
        checks = check_weights(dense, progress=progress)
        weights: dict[str, tuple[int, int]] = {}
        if packed and any(check.op != "Conv" and check.problem is None for check in checks):
            weights = pack_model(dense, folder / out.name, progress=progress).packed
        else:
            for path in dense.parent.iterdir():
                path.replace(folder / path.name)
    difference = _compare(out, _tensors((arguments, keywords)), expected)
    return ModuleExport(
        packed=weights,
        zeros_in_place=[check.name for check in checks if check.problem is None and check.name not in weights],
        dense={check.name: check.problem for check in checks if check.problem is not None},
        opset=STANDARD_OPSET,
        file_bytes=sum(path.stat().st_size for path in out.parent.glob(f"{out.name}*")),
        max_difference=difference,
    )


def _open_batch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Only the first axis of each tensor is open, one size for all, by parameter of forward for torch.export."""
    batch = torch.export.Dim("batch")
    bound = inspect.signature(module.forward).bind(*arguments, **keywords).arguments
    return tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.ndim else None, dict(bound))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _compare(path: Path, inputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of the file's outputs from `expected`. Raises FormatError when it is no rounding."""
    import swiftprune.serve.onnxruntime

    session = swiftprune.serve.onnxruntime.session(path)
    feeds = {value.name: leaf.numpy() for value, leaf in zip(session.get_inputs(), inputs, strict=True)}
    found = [torch.from_numpy(array) for array in session.run(None, feeds)]
    difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    largest = max(float(leaf.abs().max()) for leaf in expected)
    if not difference <= _TOLERANCE * largest:
        raise FormatError(
            f"{path}: its outputs differ from the module's by {difference:.3g} (the largest is {largest:.3g})"
        )
    return difference
