"""torch.onnx, quietly: a module traced into an ONNX program whose weights are named as in the module."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from swiftprune.errors import CheckpointError, SettingsError, first_line

STANDARD_OPSET = 18
"""What torch.onnx writes without converting; TensorRT 10 reads opsets 9 to 20."""


def require_packages() -> None:
    """Raises SettingsError when a package that every export to ONNX needs is missing."""
    needed = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    if missing := [package for package in needed if find_spec(package) is None]:
        raise SettingsError(f"exporting to ONNX needs {' and '.join(missing)}: pip install 'swiftprune[onnx]'")


@torch.no_grad()
def trace(
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    *,
    opset: int,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    prefix: str = "",
) -> Any:
    """The torch.onnx.ONNXProgram of `module`; `prefix` is dropped from the names of its weights.

    Raises SettingsError as `require_packages`, and CheckpointError when torch.onnx cannot export the module.
    """
    require_packages()
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                arguments,
                kwargs=dict(keywords),
                dynamic_shapes=dynamic_shapes,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever the module's code and its translation raise
        root = _root(error)
        raise CheckpointError(f"torch.onnx cannot export {type(module).__name__}: {first_line(root)}") from error
    assert program is not None  # with dynamo=True it is not written to a file
    _clean(program.model, prefix)
    return program


def _clean(model: Any, prefix: str) -> None:
    """Gives weights their names in the module, and drops what the export notes of this machine's files."""
    for value in list(model.graph.initializers.values()):
        value.name = value.name.removeprefix(prefix)
    for node in model.graph:
        if node.op_type == "MatMul" and (weight := node.inputs[1]).is_initializer():
            # Transposing it cost the weight its name, but the node knows its module: ["", ..., module, operation].
            module = ast.literal_eval(node.metadata_props["pkg.torch.onnx.name_scopes"])[-2]
            weight.name = f"{module.removeprefix(prefix)}.weight"
        node.metadata_props.clear()
    model.graph.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's warnings and notes, which are for its own developers, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _root(error: BaseException) -> BaseException:
    """The error that started it: torch.onnx wraps it in advice."""
    return error if error.__cause__ is None else _root(error.__cause__)
