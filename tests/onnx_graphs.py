"""Small ONNX models made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from swiftprune.formats.spec import Packed24

FloatArray = NDArray[np.float32]


def sparse(outputs: int, inputs: int, seed: int = 0) -> FloatArray:
    """A random 2:4 weight (N, K); some groups have fewer than two non-zeros. All values are exact in bfloat16."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(1, 128, (outputs, inputs // 4, 4)) / 64 * rng.choice((-1, 1), (outputs, inputs // 4, 4))
    order = rng.random(weight.shape).argsort(axis=-1)
    kept = order < rng.choice((0, 1, 2, 2, 2, 2), (outputs, inputs // 4, 1))
    return np.where(kept, weight, 0).reshape(outputs, inputs).astype(np.float32)


def linear(weight: FloatArray, *, form: str = "MatMul", bias: FloatArray | None = None) -> Any:
    """y = x weight^T + bias as torch and others write it: `MatMul`, `Transpose`, `Gemm` or `GemmT`."""
    outputs, inputs = weight.shape
    stored = weight if form in ("Transpose", "GemmT") else np.ascontiguousarray(weight.T)
    initializers = {"w": stored} | ({} if bias is None else {"b": bias})
    rank = 2 if form.startswith("Gemm") else 3
    if form.startswith("Gemm"):
        operands = ["x", "w"] + ([] if bias is None else ["b"])
        nodes = [helper.make_node("Gemm", operands, ["y"], name="lin", transB=int(form == "GemmT"))]
    else:
        nodes = [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0])] if form == "Transpose" else []
        product = "y" if bias is None else "xw"
        nodes.append(helper.make_node("MatMul", ["x", "wt" if form == "Transpose" else "w"], [product], name="lin"))
        if bias is not None:
            nodes.append(helper.make_node("Add", ["xw", "b"], ["y"]))
    lead = ["batch", "time"][: rank - 1]
    return model(nodes, initializers, {"x": [*lead, inputs]}, {"y": [*lead, outputs]})


def model(
    nodes: Sequence[Any],
    initializers: dict[str, NDArray[Any]],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    opset: int = 20,
) -> Any:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def save(proto: Any, path: Path, *, external: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def packed(
    path: Path, *, dtype: str = "FLOAT", x_dtype: str = "FLOAT", outputs: int, inputs: int, seed: int = 0
) -> FloatArray:
    """Writes a model of one MatMul24 from the specification in format.py alone; returns the dense weight."""
    weight = sparse(outputs, inputs, seed)
    values, nibbles = [], []
    for row in weight:
        for group in row.reshape(-1, 4):
            kept = tuple(np.flatnonzero(group).tolist())
            low, high = {(): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3)}.get(kept, kept)
            values += [group[low], group[high]]
            nibbles.append(low | high << 2)
    groups = inputs // 4
    rows = np.array(nibbles, np.uint8).reshape(outputs, groups)
    if groups % 2:
        rows = np.concatenate((rows, np.zeros((outputs, 1), np.uint8)), axis=1)
    metadata = (rows[:, 0::2] | rows[:, 1::2] << 4).astype(np.uint8)
    write_packed(path, np.array(values, np.float32).reshape(outputs, inputs // 2), metadata, dtype, x_dtype)
    return weight


def write_quantized(path: Path, packed: Packed24, x_dtype: str = "FLOAT") -> Path:
    """y = x W^T by the operator of quantized values."""
    import onnx_ir

    from exporters.onnx.matmul24 import NAMES, matmul24

    element = TensorProto.DataType.Value(x_dtype)
    assert packed.scales is not None
    graph = helper.make_graph(
        [helper.make_node(NAMES[packed.quantized], ["x", "v", "m", "s"], ["y"], domain="swiftprune", name="lin")],
        "graph",
        [helper.make_tensor_value_info("x", element, ["batch", "time", "inputs"])],
        [helper.make_tensor_value_info("y", element, ["batch", "time", packed.values.shape[0]])],
        [
            numpy_helper.from_array(packed.values.numpy(), "v"),
            numpy_helper.from_array(packed.metadata.numpy(), "m"),
            helper.make_tensor("s", TensorProto.BFLOAT16, packed.scales.shape, packed.scales.float().numpy().ravel()),
        ],
    )
    function = onnx_ir.serde.serialize_function(matmul24(20, packed.quantized))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("swiftprune", 1)]
    return save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10), path)


def write_packed(
    path: Path, values: FloatArray, metadata: NDArray[np.uint8], dtype: str = "FLOAT", x_dtype: str = "FLOAT"
) -> None:
    import onnx_ir

    from exporters.onnx.matmul24 import matmul24

    outputs, inputs = values.shape[0], 2 * values.shape[1]
    element, x_element = TensorProto.DataType.Value(dtype), TensorProto.DataType.Value(x_dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul24", ["x", "v", "m"], ["y"], domain="swiftprune", name="lin")],
        "graph",
        [helper.make_tensor_value_info("x", x_element, ["batch", "time", "inputs"])],
        [helper.make_tensor_value_info("y", x_element, ["batch", "time", outputs])],
        [helper.make_tensor("v", element, values.shape, values.ravel()), numpy_helper.from_array(metadata, "m")],
    )
    function = onnx_ir.serde.serialize_function(matmul24(20))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("swiftprune", 1)]
    save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10), path)
    assert inputs % 4 == 0
