"""The output head and the embeddings of a decoder in 8 bits, by ONNX Runtime's own operators.

A token reads the whole head, which in float32 is more than all packed linears of a small model. `MatMulNBits` and
`GatherBlockQuantized` share one tensor where the model ties the two: uint8 around 128, and a float32 scale for each
block of inputs of a row. Rounding inputs to 8 bits is part of the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.onnx.pack import add_initializer, replace_node, save_model, written_aside
from exporters.onnx.weights import load_graph

_DOMAIN = "com.microsoft"
_ZERO, _LARGEST = 128, 127
_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 16
_INT8_INPUTS = 4  # `accuracy_level` of MatMulNBits
_HEAD, _EMBEDDINGS, _SCALES = "head.int8", "embeddings.int8", "scales"


def quantize_head(path: Path) -> bool:
    """Rounds the head and the embeddings of the decoder at `path` to 8 bits, and writes it anew.

    False, and nothing is written, where the file has none of ONNX Runtime's operators yet, so that other runtimes run
    it, or no head that is a MatMul by a float32 weight (H, V) with H a multiple of 16.
    """
    import onnx_ir

    model = load_graph(path)
    head = model.graph.outputs[0].producer()
    if _DOMAIN not in model.opset_imports or head is None or head.op_type != "MatMul":
        return False
    weight = _matrix(head.inputs[1])
    if weight is None or not (block := _block(weight.shape[0])):
        return False
    rows = np.ascontiguousarray(weight.T)
    values, scales = _rounded(rows, block)
    graph = model.graph
    initializers: dict[str, NDArray[Any]] = {
        _HEAD: values.reshape(len(values), -1, block),
        f"{_HEAD}.{_SCALES}": scales,
    }
    attributes = {
        "K": rows.shape[1],
        "N": rows.shape[0],
        "bits": 8,
        "block_size": block,
        "accuracy_level": _INT8_INPUTS,
    }
    gathers = ((node, _matrix(node.inputs[0])) for node in graph if node.op_type == "Gather")
    gather, table = next(
        ((node, table) for node, table in gathers if table is not None and table.shape == rows.shape), (None, None)
    )
    tied = table is not None and np.array_equal(table, rows)
    if table is not None and not tied:
        own, own_scales = _rounded(table, block)
        initializers |= {_EMBEDDINGS: own, f"{_EMBEDDINGS}.{_SCALES}": own_scales}
    made = {name: add_initializer(graph, onnx_ir.tensor(array, name=name)) for name, array in initializers.items()}
    if tied:
        made[_EMBEDDINGS] = onnx_ir.Value(name=_EMBEDDINGS)  # the head's own bytes: see below
    _replace(graph, head, "MatMulNBits", [head.inputs[0], made[_HEAD], made[f"{_HEAD}.{_SCALES}"]], attributes)
    if gather is not None:
        scales_value = made[f"{_HEAD if tied else _EMBEDDINGS}.{_SCALES}"]
        attributes = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        operands = [made[_EMBEDDINGS], gather.inputs[1], scales_value]
        _replace(graph, gather, "GatherBlockQuantized", operands, attributes)
    with written_aside(path) as folder:
        save_model(model, folder / path.name)
        if tied:
            _share(folder / path.name, rows.shape)
    return True


def _block(inputs: int) -> int | None:
    """How many inputs share a scale: a power of two, as the operators want it, that divides them."""
    block = _LARGEST_BLOCK
    while inputs % block and block > _SMALLEST_BLOCK:
        block //= 2
    return block if inputs % block == 0 else None


def _rounded(weight: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(V, H) uint8 around 128, to nearest, and (V, H / block) scales that reach the largest weight of each block."""
    parts = weight.reshape(len(weight), -1, block)
    scales = (np.abs(parts).max(-1) / _LARGEST).astype(np.float32)
    safe = np.where(scales == 0, 1, scales)
    values = (np.rint(parts / safe[..., None]) + _ZERO).astype(np.uint8)
    return values.reshape(weight.shape), scales


def _matrix(value: Any) -> NDArray[np.float32] | None:
    """The constant float32 matrix behind an operand, which may be a Transpose of it, or None."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":
        inner = _matrix(producer.inputs[0])
        return None if inner is None else inner.T
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None or len(tensor.shape) != 2:
        return None
    numbers: NDArray[np.float32] = tensor.numpy()
    return numbers if numbers.dtype == np.float32 else None


def _replace(graph: Any, node: Any, op: str, operands: list[Any], attributes: dict[str, int]) -> None:
    """Puts an operator of ONNX Runtime in the place of `node`, whose constant operand goes with it."""
    import onnx_ir

    constant = next(value for value in node.inputs if _matrix(value) is not None)
    replace_node(graph, node, [onnx_ir.node(op, operands, attributes, domain=_DOMAIN, name=node.name)])
    while constant is not None and not constant.uses():  # and the Transpose that it comes from
        producer = constant.producer()
        if producer is None:
            del graph.initializers[constant.name]
            break
        constant = producer.inputs[0]
        graph.remove(producer, safe=True)


def _share(path: Path, shape: tuple[int, ...]) -> None:
    """Makes the embeddings an initializer over the same bytes of the data file as the head."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    head = next(tensor for tensor in model.graph.initializer if tensor.name == _HEAD)
    shared = model.graph.initializer.add()
    shared.CopyFrom(head)
    shared.name = _EMBEDDINGS
    del shared.dims[:]
    shared.dims.extend(shape)
    onnx.save(model, path)
