"""The weights of an ONNX model: constants that a MatMul, Gemm or Conv sums over, and along which axis.

They are looked for wherever exporters put them: in initializers and Constant nodes, of the main graph, of the branches
and bodies within it and of functions; behind a Transpose, a Cast, and quantization that is undone (Q/DQ); and as the
integers of quantized operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftprune.errors import CheckpointError, SettingsError, first_line
from swiftprune.formats.spec import QUANT_METHOD

PACK_OPSET = 18  # the first with BitwiseAnd, which the body of MatMul24 needs
_PRODUCTS = {"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"}
# Where an operator has what it multiplies, and beside each, where that has its zero point.
_OPERANDS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "MatMul": ((0, None), (1, None)),
    "Gemm": ((0, None), (1, None)),
    "Conv": ((1, None),),
    "ConvTranspose": ((1, None),),
    "MatMulInteger": ((0, 2), (1, 3)),
    "QLinearMatMul": ((0, 2), (3, 5)),
    "ConvInteger": ((1, 3),),
    "QLinearConv": ((3, 5),),
}
# Attributes that are read here, and onnx_ir's method for their type.
_ATTRIBUTES = {
    "Gemm": {"alpha": "as_float", "beta": "as_float", "transA": "as_int", "transB": "as_int"},
    "Transpose": {"perm": "as_ints"},
    "DequantizeLinear": {"axis": "as_int"},
    "Constant": {"value": "as_tensor"},
}
_QUANTIZED = "integers"
# Of weights in a layout of their own.
_OPAQUE = {"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE"}


@dataclass(frozen=True, eq=False)
class Weight:
    """One constant and the nodes that sum over it."""

    name: str
    op: str
    """`MatMul`, `Gemm` or `Conv`, or their quantized forms."""
    value: Any
    """The onnx_ir.Value."""
    tensor: Any
    """Its numbers, an onnx_ir tensor."""
    zero_point: Any
    """The onnx_ir tensor of what stands for 0 in quantized weights, or None where 0 does."""
    zero_axis: int
    """The axis along which `zero_point` runs."""
    nodes: list[Any]
    """The onnx_ir.Nodes that multiply by it."""
    shape: tuple[int, ...]
    axis: int
    """The axis that is summed over: the input channels."""
    unpackable: str | None
    """Why MatMul24 cannot take its place whatever the weights are, or None."""

    def read(self) -> Tensor:
        """The weight as a contiguous matrix (N, K), K the summed axis; all others are rows, in order.

        Quantized ones as integers, less their zero point.
        """
        numbers = as_tensor(self.tensor)
        if self.zero_point is not None:
            zero = as_tensor(self.zero_point).to(torch.int32)
            if zero.numel() > 1:
                zero = zero.view([-1 if axis == self.zero_axis else 1 for axis in range(numbers.ndim)])
            numbers = numbers.to(torch.int32) - zero
        return numbers.movedim(self.axis, -1).reshape(-1, self.shape[self.axis]).contiguous()


@dataclass(frozen=True)
class Weights:
    """What `find_weights` found."""

    found: list[Weight]
    quantized: dict[str, str]
    """Nodes that multiply by quantized weights in a layout of their own -> their kind."""


def load_graph(path: Path, *, oldest: int = 1) -> Any:
    """The onnx_ir.Model at `path`, its external data mapped, not read.

    Raises CheckpointError, naming the file and the tensor, when the file or its external data is missing, damaged or
    truncated, or of an opset older than `oldest` or newer than is known.
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
    if opset is None or not oldest <= opset <= newest:
        raise CheckpointError(
            f"{path}: has opset {opset} of the standard operators; {oldest} to {newest} are supported here"
            " (export again, or convert it with onnx.version_converter)"
        )
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise CheckpointError(f"{path}: the initializer {name} has no data")
            _check_tensor(path, name, value.const_value)
    for node in _nodes(model):
        _check_node(path, node)
    return model


def _nodes(model: Any) -> Iterator[Any]:
    """Every node of the main graph and of functions, branches and bodies included."""
    import onnx_ir

    for body in (model.graph, *model.functions.values()):
        yield from onnx_ir.traversal.RecursiveGraphIterator(body)


def _check_node(path: Path, node: Any) -> None:
    """Raises CheckpointError where the node is not what the standard says of those that are looked at here."""
    if node.domain not in ("", "ai.onnx"):
        return
    name = f"{path}: the node {node.name or '(unnamed)'} ({node.op_type})"
    required = max((index for index, _ in _OPERANDS.get(node.op_type, ())), default=-1)
    if required >= 0 and (len(node.inputs) <= required or not node.outputs):
        raise CheckpointError(f"{name} has {len(node.inputs)} inputs and {len(node.outputs)} outputs: damaged")
    for attribute, read in _ATTRIBUTES.get(node.op_type, {}).items():
        if attribute not in node.attributes:
            continue
        if node.attributes[attribute].is_ref():
            raise CheckpointError(
                f"{name}: its {attribute} comes from the caller of a function: inline functions first"
            )
        try:
            value = getattr(node.attributes[attribute], read)()
        except TypeError as error:
            raise CheckpointError(f"{name}: {first_line(error)}") from error
        if read == "as_tensor":
            _check_tensor(path, node.outputs[0].name, value)


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    """Raises CheckpointError where the tensor's numbers are not there, or fewer or more than its shape says."""
    import onnx_ir

    if any(size < 0 for size in tensor.shape.dims):
        raise CheckpointError(f"{path}: {name} has the shape {tuple(tensor.shape.dims)}")
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        try:
            tensor.numpy()  # a view
        except Exception as error:  # numpy's and onnx_ir's own, of several types
            raise CheckpointError(f"{path}: {name} is damaged ({first_line(error)})") from error
        return
    _check_external(path, name, tensor)


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
    """Every constant that a MatMul, Gemm or Conv multiplies by, in the order of the nodes."""
    found: dict[int, Weight] = {}
    quantized: dict[str, str] = {}
    inputs = {value.name for value in model.graph.inputs}
    for node in _nodes(model):
        if node.domain == QUANT_METHOD:
            raise CheckpointError(f"{node.name}: the model is packed already")
        if node.op_type in _OPAQUE:
            quantized[str(node.name or node.outputs[0].name)] = node.op_type
        if node.domain not in ("", "ai.onnx"):
            continue
        for place, (index, zero_index) in enumerate(_OPERANDS.get(node.op_type, ())):
            source = _source(node.inputs[index] if index < len(node.inputs) else None)
            if source is None or id(source.value) in found:
                continue
            zero_point = source.zero_point
            if zero_index is not None:
                zero_point = _constant(node.inputs[zero_index] if zero_index < len(node.inputs) else None)
            shape = tuple(int(size) for size in source.tensor.shape)
            # A convolution's weight is its second operand in any form, and counts as the right one.
            left = place == 0 and node.op_type in _PRODUCTS
            found[id(source.value)] = Weight(
                name=source.value.name,
                op=node.op_type if node.op_type != "ConvTranspose" else "Conv",
                value=source.value,
                tensor=source.tensor,
                zero_point=zero_point,
                zero_axis=source.zero_axis % len(shape),
                nodes=_readers(source.value),
                shape=shape,
                axis=_summed_axis(node, left, len(shape), source.transposed),
                unpackable=_unpackable(source, node, left, shape, inputs, model.graph),
            )
    return Weights(list(found.values()), quantized)


@dataclass
class _Source:
    """The constant behind an operand, and what stands between the two."""

    value: Any
    tensor: Any
    transposed: bool = False
    changed: str | None = None
    """The operator, other than Transpose, that its numbers go through."""
    zero_point: Any = None
    zero_axis: int = 1


def _source(value: Any) -> _Source | None:
    """The constant of two or more axes behind an operand, or None."""
    transposed, changed, zero_point, zero_axis = False, None, None, 1
    while value is not None:
        if (tensor := _constant(value)) is not None:
            if len(tensor.shape) < 2 or not _is_numeric(tensor):
                return None
            if not _is_float(tensor) and changed is None:  # a quantized operator's own
                changed = _QUANTIZED
            return _Source(value, tensor, transposed, changed, zero_point, zero_axis)
        producer = value.producer()
        if producer is None or producer.domain not in ("", "ai.onnx"):
            return None
        if producer.op_type == "Transpose":
            value = producer.inputs[0]
            rank = len(value.shape) if value.shape is not None else None
            if rank != 2 and tuple(producer.attributes.get_ints("perm", (1, 0))) != (1, 0):
                return None
            transposed = not transposed
        elif producer.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity"):
            changed = producer.op_type if "Linear" in producer.op_type else changed or producer.op_type
            if producer.op_type == "DequantizeLinear":
                zero_point = _constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
                zero_axis = producer.attributes.get_int("axis", 1)
            elif producer.op_type == "QuantizeLinear":  # what it starts from is float, where 0 stands for 0
                zero_point = None
            value = producer.inputs[0]
        else:
            return None
    return None


def _constant(value: Any) -> Any:
    """The tensor of an initializer or a Constant node, or None."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain not in ("", "ai.onnx"):
        return None
    attribute = producer.attributes.get("value")
    return attribute.as_tensor() if attribute is not None else None


def _initializer(value: Any) -> tuple[Any, bool]:
    """The initializer behind an operand, or None, and whether a Transpose of two axes stands between."""
    source = _source(value)
    plain = source is not None and source.changed is None and source.value.is_initializer()
    return (source.value, source.transposed) if source is not None and plain else (None, False)


def _readers(value: Any) -> list[Any]:
    """The nodes that read the initializer, those behind a Transpose in the place of the Transpose."""
    nodes: list[Any] = []
    for node, _ in value.uses():
        if node.op_type == "Transpose" and not node.domain:
            nodes.extend(reader for reader, _ in node.outputs[0].uses())
        else:
            nodes.append(node)
    return nodes


def _summed_axis(node: Any, left: bool, rank: int, transposed: bool) -> int:
    if node.op_type == "ConvTranspose":
        return 0  # (C, N / groups, ...)
    if node.op_type not in _PRODUCTS:
        return 1  # of a convolution: (N, C / groups, ...)
    last = left
    if node.op_type == "Gemm":
        last ^= bool(node.attributes.get_int("transA" if left else "transB", 0))
    last ^= transposed
    return rank - 1 if last else rank - 2


def _unpackable(
    source: _Source, node: Any, left: bool, shape: tuple[int, ...], inputs: Collection[str], main: Any
) -> str | None:
    value = source.value
    if source.changed is not None:
        quantized = source.changed == _QUANTIZED or "Linear" in source.changed
        return f"{'quantized' if quantized else 'converted'} ({source.changed})"
    if node.graph is not main or not value.is_initializer():
        return "it is not an initializer of the main graph"
    if value.name in inputs:
        return "it is an input of the graph too, which a caller may set"
    transposes = [node.outputs[0] for node, _ in value.uses() if node.op_type == "Transpose"]
    if value.is_graph_output() or any(output.is_graph_output() for output in transposes):
        return "it is an output of the graph"
    if len(shape) != 2:
        return f"it has {len(shape)} axes, not 2"
    if left:
        return "it is the left operand of its node"
    for reader in _readers(value):
        multiplies = not reader.domain and reader.op_type in ("MatMul", "Gemm")
        if (
            not multiplies
            or _initializer(reader.inputs[1])[0] is not value
            or _initializer(reader.inputs[0])[0] is value
        ):
            return f"it is shared: the node {reader.name or reader.op_type} ({reader.op_type}) reads it too"
        if reader.op_type == "Gemm" and (
            reader.attributes.get_int("transA", 0)
            or reader.attributes.get_float("alpha", 1.0) != 1.0
            or reader.attributes.get_float("beta", 1.0) != 1.0
        ):
            return f"the node {reader.name} scales or transposes its operands"
    axes = {_summed_axis(reader, False, 2, _initializer(reader.inputs[1])[1]) for reader in _readers(value)}
    return None if len(axes) == 1 else "it is shared by nodes that sum over different axes"


def _is_float(tensor: Any) -> bool:
    import onnx_ir

    return tensor.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)


def _is_numeric(tensor: Any) -> bool:
    """Whether it may be a weight: floats, or the integers of a quantized one."""
    import onnx_ir

    integers = ("INT4", "UINT4", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E5M2")
    return _is_float(tensor) or tensor.dtype in {getattr(onnx_ir.DataType, name) for name in integers}


def as_tensor(tensor: Any) -> Tensor:
    """The numbers of an onnx_ir tensor; those of a file stay mapped until they are used."""
    array = tensor.numpy()
    if array.dtype.name == "bfloat16":  # a type of numpy's that torch does not know
        array = array.view("uint16")
    elif array.dtype.name.startswith(("float8", "int4", "uint4")):
        array = array.astype("float32" if array.dtype.name.startswith("float8") else "int8")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes
        numbers = torch.from_numpy(array)
    return numbers.view(torch.bfloat16) if array.dtype.name == "uint16" else numbers
