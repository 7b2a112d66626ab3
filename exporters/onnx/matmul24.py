"""The operator of packed weights: `swiftprune::MatMul24(x, values, metadata)`, defined in each model that uses it.

y (..., N) = x (..., K) W^T, with W the 2:4 weight (N, K) that the pair holds by the specification in
swiftprune/formats/spec.py: values (N, K/2) in float32, float16 or bfloat16, metadata (N, ceil(K/8)) uint8. x and y
are of one float type; the values are cast to it.

The body is made of standard operators, so any runtime that reads ONNX functions runs the model. Since the pair is
constant, runtimes fold the body into a dense MatMul when they load it. Where a kernel of the operator's name is
registered (swiftprune.serve.onnxruntime), ONNX Runtime takes that in the body's place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swiftprune.formats.spec import GROUP, KEPT, QUANT_METHOD

DOMAIN = QUANT_METHOD
DOMAIN_VERSION = 1
NAME = "MatMul24"


def matmul24(opset: int) -> Any:
    """The model-local function as an onnx_ir.Function, over standard operators of version `opset` (18 or later)."""
    import onnx
    import onnx_ir
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []

    def add(op: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(name: str, value: Any, dtype: type = np.int64) -> str:
        return add("Constant", out=name, value=numpy_helper.from_array(np.asarray(value, dtype), name))

    last, first, start, rows = (
        constant("last", [-1]),
        constant("first", [1]),
        constant("start", [0]),
        constant("rows", [0, -1]),
    )
    # One nibble a group: the low half of a byte, then the high half. Of an odd number of groups one half is unused.
    low = add("BitwiseAnd", "metadata", constant("low_bits", 0xF, np.uint8), out="low")
    high = add("BitShift", "metadata", constant("half_byte", 4, np.uint8), out="high", direction="RIGHT")
    halves = add(
        "Concat",
        add("Unsqueeze", low, last, out="low_column"),
        add("Unsqueeze", high, last, out="high_column"),
        out="halves",
        axis=-1,
    )
    pairs = add("Reshape", "values", constant("by_group", [0, -1, KEPT]), out="pairs")  # (N, K/4, 2)
    groups = add("Shape", pairs, out="groups", start=1, end=2)
    nibbles = add("Slice", add("Reshape", halves, rows, out="all_nibbles"), start, groups, first, out="nibbles")
    # A nibble is pos0 | pos1 << 2.
    pos0 = add("BitwiseAnd", nibbles, constant("position_bits", 0b11, np.uint8), out="pos0")
    pos1 = add("BitShift", nibbles, constant("position_width", 2, np.uint8), out="pos1", direction="RIGHT")
    positions = add(
        "Cast",
        add(
            "Concat",
            add("Unsqueeze", pos0, last, out="pos0_column"),
            add("Unsqueeze", pos1, last, out="pos1_column"),
            out="narrow_positions",
            axis=-1,
        ),
        out="positions",
        to=TensorProto.INT64,
    )
    shape = add(
        "Concat", add("Shape", pairs, out="rows_and_groups", end=2), constant("group", [GROUP]), out="shape", axis=0
    )
    zeros = add("CastLike", add("ConstantOfShape", shape, out="float_zeros"), "x", out="zeros")
    kept = add("CastLike", pairs, "x", out="kept")
    weight = add("Reshape", add("ScatterElements", zeros, positions, kept, out="grouped", axis=-1), rows, out="weight")
    add("MatMul", "x", add("Transpose", weight, out="columns", perm=[1, 0]), out="y")
    proto = helper.make_function(
        DOMAIN,
        NAME,
        ["x", "values", "metadata"],
        ["y"],
        nodes,
        [onnx.helper.make_opsetid("", opset)],
        doc_string="y = x W^T, W 2:4 sparse: the two kept values of each group of four inputs, and their places",
    )
    return onnx_ir.serde.deserialize_function(proto)
