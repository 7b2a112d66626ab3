"""The operators of packed weights: `swiftprune::MatMul24(x, values, metadata)`, defined in each model that uses it,
and `MatMul24Int8` and `MatMul24Int4`, which have scales as a fourth input.

y (..., N) = x (..., K) W^T, with W the 2:4 weight (N, K) that these tensors hold by the specification in
swiftprune/formats/spec.py. Of MatMul24: values (N, K/2) in float32, float16 or bfloat16, metadata (N, ceil(K/8)) uint8.
The others are version 2 of the format. x and y are of one float type; the stored weights are cast to it.

The body is made of standard operators, so any runtime that reads ONNX functions runs the model. Since the pair is
constant, runtimes fold the body into a dense MatMul when they load it. Where a kernel of the operator's name is
registered (swiftprune.serve.onnxruntime), ONNX Runtime takes that in the body's place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from swiftprune.formats.spec import CODEBOOK, GROUP, KEPT, QUANT_METHOD, SCALED_INPUTS, Quantized

DOMAIN = QUANT_METHOD
DOMAIN_VERSION = 1
NAMES: dict[Quantized | None, str] = {None: "MatMul24", "int8": "MatMul24Int8", "int4": "MatMul24Int4"}
"""By how values are stored."""


def matmul24(opset: int, quantized: Quantized | None = None) -> Any:
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
    low_bits, half_byte = constant("low_bits", 0xF, np.uint8), constant("half_byte", 4, np.uint8)

    def nibbles_of(bytes_: str) -> str:
        """(N, w) uint8 -> (N, w, 2): the low half of each byte, then the high half."""
        low = add("BitwiseAnd", bytes_, low_bits, out=f"{bytes_}_low")
        high = add("BitShift", bytes_, half_byte, out=f"{bytes_}_high", direction="RIGHT")
        columns = [add("Unsqueeze", half, last, out=f"{half}_column") for half in (low, high)]
        return add("Concat", *columns, out=f"{bytes_}_halves", axis=-1)

    def stored() -> str:
        """(N, K/4, 2): what stands in the kept positions of each group, in the type that it is computed in."""
        if quantized is None:
            return add("Reshape", "values", constant("by_group", [0, -1, KEPT]), out="pairs")
        scales = add("Cast", "scales", out="wide_scales", to=TensorProto.FLOAT)  # (N, 1) or (N, ceil(K/128))
        if quantized == "int8":
            pairs = add("Reshape", "values", constant("by_group", [0, -1, KEPT]), out="integers")
            numbers = add("Cast", pairs, out="numbers", to=TensorProto.FLOAT)
        else:
            codes = add("Cast", nibbles_of("values"), out="codes", to=TensorProto.INT64)
            numbers = add("Gather", constant("codebook", CODEBOOK, np.float32), codes, out="numbers")
            count = add("Shape", "values", out="count", start=1, end=2)
            zero, one = constant("zero", 0), constant("one", 1)
            groups = add("Range", zero, add("Squeeze", count, start, out="group_count"), one, out="each_group")
            of_group = add("Div", groups, constant("sharing", SCALED_INPUTS // GROUP), out="scale_of_group")
            scales = add("Gather", scales, of_group, out="scale_by_group", axis=1)
        return add("Mul", numbers, add("Unsqueeze", scales, last, out="scale_column"), out="scaled")

    # One nibble a group. Of an odd number of groups the last half of a byte is unused.
    halves = nibbles_of("metadata")
    pairs = stored()
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
        NAMES[quantized],
        ["x", "values", "metadata", *(["scales"] if quantized else [])],
        ["y"],
        nodes,
        [onnx.helper.make_opsetid("", opset)],
        doc_string="y = x W^T, W 2:4 sparse: the two kept values of each group of four inputs, and their places",
    )
    return onnx_ir.serde.deserialize_function(proto)
