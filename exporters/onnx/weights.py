"""The weights of an ONNX graph: initializers that a MatMul, Gemm or Conv sums over, and along which axis."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftprune.errors import CheckpointError, SettingsError, first_line
from swiftprune.sparse24.format import QUANT_METHOD

OLDEST_OPSET = 18  # the first with BitwiseAnd, which the body of MatMul24 needs
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_QUANTIZED = {"MatMulNBits", "MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv", "DequantizeLinear"}


@dataclass(frozen=True, eq=False)
class Weight:
    """One initializer and the nodes that sum over it."""

    name: str
    op: str
    """`MatMul`, `Gemm` or `Conv`."""
    value: Any
    """The onnx_ir.Value."""
    nodes: list[Any]
    """The onnx_ir.Nodes that multiply by it."""
    shape: tuple[int, ...]
    axis: int
    """The axis that is summed over: the input channels."""
    unpackable: str | None
    """Why MatMul24 cannot take its place whatever the weights are, or None."""

    def read(self) -> Tensor:
        """The weight as a contiguous matrix (N, K), K the summed axis; all others are rows, in order."""
        return as_tensor(self.value.const_value).movedim(self.axis, -1).reshape(-1, self.shape[self.axis]).contiguous()


@dataclass(frozen=True)
class Weights:
    """What `find_weights` found."""

    found: list[Weight]
    quantized: dict[str, str]
    """Nodes that multiply by quantized weights -> their kind."""


def load_graph(path: Path) -> Any:
    """The onnx_ir.Model at `path`, its external data mapped, not read.

    Raises CheckpointError, naming the file and the tensor, when the file or its external data is missing, damaged or
    truncated, or of an opset that is not supported.
    """
    try:
        import onnx
        import onnx_ir
    except ImportError:
        raise SettingsError("ONNX files need: pip install 'swiftprune[onnx]'") from None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's own, of many types
        raise CheckpointError(f"{path}: is not a readable ONNX model ({first_line(error)})") from error
    newest = onnx.defs.onnx_opset_version()
    opset = model.opset_imports.get("")
    if opset is None or not OLDEST_OPSET <= opset <= newest:
        raise CheckpointError(
            f"{path}: has opset {opset} of the standard operators; {OLDEST_OPSET} to {newest} are supported here"
            " (export again, or convert it with onnx.version_converter)"
        )
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise CheckpointError(f"{path}: the initializer {name} has no data")
        _check_external(path, name, value.const_value)
    return model


def _check_external(path: Path, name: str, tensor: Any) -> None:
    import onnx_ir

    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return
    file = path.parent / tensor.location
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise CheckpointError(f"{path}: {name} has its data outside of the model's folder, in {tensor.location}")
    if not file.is_file():
        raise CheckpointError(f"{file}: missing, though {path.name} has {name} in it")
    begin, length, size = tensor.offset or 0, tensor.length, file.stat().st_size
    if length is not None and length != tensor.nbytes:
        raise CheckpointError(
            f"{path}: {name} is {tensor.nbytes:,} bytes by its shape, but {length:,} of {file.name} are named for it"
        )
    if begin + tensor.nbytes > size:
        raise CheckpointError(
            f"{file}: truncated: {name} is at bytes {begin:,} to {begin + tensor.nbytes:,}, the file has {size:,}"
        )


def find_weights(model: Any) -> Weights:
    """Every initializer that a MatMul, Gemm or Conv of the main graph multiplies by, in the order of the nodes.

    A Transpose between the initializer and a MatMul is looked through.
    """
    found: dict[str, Weight] = {}
    quantized: dict[str, str] = {}
    inputs = {value.name for value in model.graph.inputs}
    for node in model.graph:
        if node.domain == QUANT_METHOD:
            raise CheckpointError(f"{node.name}: the model is packed already")
        if node.op_type in _QUANTIZED:
            quantized[node.name] = node.op_type
        if node.domain or node.op_type not in ("MatMul", "Gemm", *_CONVOLUTIONS):
            continue
        for place, operand in enumerate(node.inputs[:2]):
            source, transposed = _initializer(operand)
            if source is None or source.name in found:
                continue
            shape = tuple(int(size) for size in source.const_value.shape)
            if len(shape) < 2 or not _is_float(source.const_value):
                continue
            found[source.name] = Weight(
                source.name,
                "Conv" if node.op_type in _CONVOLUTIONS else node.op_type,
                source,
                _readers(source),
                shape,
                _summed_axis(node, place, len(shape), transposed),
                _unpackable(source, place, shape, inputs),
            )
    return Weights(list(found.values()), quantized)


def _initializer(value: Any) -> tuple[Any, bool]:
    """The initializer behind an operand, or None, and whether a Transpose of two axes stands between."""
    transposed = False
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose" and not producer.domain:
        value, transposed = producer.inputs[0], True
        if value.shape is None or len(value.shape) != 2:
            return None, False
    return (value if value is not None and value.is_initializer() else None), transposed


def _readers(value: Any) -> list[Any]:
    """The nodes that read the initializer, those behind a Transpose in the place of the Transpose."""
    nodes: list[Any] = []
    for node, _ in value.uses():
        if node.op_type == "Transpose" and not node.domain:
            nodes.extend(reader for reader, _ in node.outputs[0].uses())
        else:
            nodes.append(node)
    return nodes


def _summed_axis(node: Any, place: int, rank: int, transposed: bool) -> int:
    if node.op_type == "ConvTranspose":
        return 0  # (C, N / groups, ...)
    if node.op_type == "Conv":
        return 1  # (N, C / groups, ...)
    last = place == 0
    if node.op_type == "Gemm":
        last ^= bool(node.attributes.get_int("transB" if place else "transA", 0))
    last ^= transposed
    return rank - 1 if last else rank - 2


def _unpackable(value: Any, place: int, shape: tuple[int, ...], inputs: Collection[str]) -> str | None:
    if value.name in inputs:
        return "it is an input of the graph too, which a caller may set"
    if value.is_graph_output():
        return "it is an output of the graph"
    if len(shape) != 2:
        return f"it has {len(shape)} axes, not 2"
    if place == 0:
        return "it is the left operand of its node"
    for node in _readers(value):
        multiplies = not node.domain and node.op_type in ("MatMul", "Gemm")
        if not multiplies or _initializer(node.inputs[1])[0] is not value or _initializer(node.inputs[0])[0] is value:
            return f"it is shared: the node {node.name or node.op_type} ({node.op_type}) reads it too"
        if node.op_type == "Gemm" and (
            node.attributes.get_int("transA", 0)
            or node.attributes.get_float("alpha", 1.0) != 1.0
            or node.attributes.get_float("beta", 1.0) != 1.0
        ):
            return f"the node {node.name} scales or transposes its operands"
    axes = {_summed_axis(node, 1, 2, _initializer(node.inputs[1])[1]) for node in _readers(value)}
    return None if len(axes) == 1 else "it is shared by nodes that sum over different axes"


def _is_float(tensor: Any) -> bool:
    import onnx_ir

    return tensor.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)


def as_tensor(tensor: Any) -> Tensor:
    """The numbers of an onnx_ir tensor; those of a file stay mapped until they are used."""
    array = tensor.numpy()
    if array.dtype.name == "bfloat16":  # a type of numpy's that torch does not know
        array = array.view("uint16")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes
        numbers = torch.from_numpy(array)
    return numbers.view(torch.bfloat16) if numbers.dtype == torch.uint16 else numbers
