"""The output head and the embeddings of a decoder in 8 or 4 bits, by ONNX Runtime's own operators.

A token reads the whole head, which in float32 is more than all packed linears of a small model. `MatMulNBits` and
`GatherBlockQuantized` share one tensor where the model ties the two: uint8 around 128, or two uint4 around 8 to a byte,
the first in the low half, and a float32 scale for each block of inputs of a row. Rounding inputs to 8 bits is part of
the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporters.onnx.decoder import builder_covers
from exporters.onnx.pack import add_initializer, replace_node, save_model, written_aside
from exporters.onnx.weights import load_graph
from swiftprune.models.load import read_config

_DOMAIN = "com.microsoft"
_INT8_INPUTS = 4  # `accuracy_level` of MatMulNBits
_HEAD, _EMBEDDINGS, _SCALES = "head", "embeddings", "scales"
_SMALLEST_BLOCK = 16
_CHUNK = 4096  # rows

HeadName = Literal["int8", "int4", "keep"]
"""How the output head and the embeddings are stored; `keep`: as they are."""


@dataclass(frozen=True)
class _Width:
    """How numbers of so many bits are stored."""

    bits: int
    largest_block: int
    """The most inputs that share a scale."""
    shrink: tuple[float, ...]
    """Of the scale that reaches the largest weight of a block: what is tried, so that the others lose less."""

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)


_WIDTHS = {"int8": _Width(8, 128, (1.0,)), "int4": _Width(4, 32, (1.0, 0.95, 0.9, 0.85, 0.8, 0.75))}


def unsupported_reason(checkpoint: Path) -> str | None:
    """Why the head of the ONNX file of a causal LM in the folder `checkpoint` stays in float32, or None."""
    config = read_config(checkpoint)
    if not builder_covers(checkpoint, config):
        return (
            f"{(config.architectures or ['the model'])[0]} is written with standard operators, which runtimes other "
            "than ONNX Runtime run too"
        )
    if config.hidden_size % _SMALLEST_BLOCK:
        return f"its {config.hidden_size} inputs are no multiple of {_SMALLEST_BLOCK}"
    return None


def quantize_head(path: Path, name: HeadName) -> bool:
    """Rounds the head and the embeddings of the decoder at `path` to `name`, and writes it anew.

    False, and nothing is written, where the file has none of ONNX Runtime's operators yet, so that other runtimes run
    it, or no head that is a MatMul by a float32 weight (H, V) with H a multiple of 16.
    """
    import onnx_ir

    model = load_graph(path)
    head = model.graph.outputs[0].producer()
    if _DOMAIN not in model.opset_imports or head is None or head.op_type != "MatMul":
        return False
    weight = _matrix(head.inputs[1])
    width = _WIDTHS[name]
    if weight is None or not (block := _block(weight.shape[0], width)):
        return False
    rows = np.ascontiguousarray(weight.T)
    values, scales = _rounded(rows, width, block)
    graph = model.graph
    stored_head, stored_embeddings = f"{_HEAD}.{name}", f"{_EMBEDDINGS}.{name}"
    initializers: dict[str, NDArray[Any]] = {
        stored_head: values.reshape(*scales.shape, -1),
        f"{stored_head}.{_SCALES}": scales,
    }
    shared: dict[str, int] = {"bits": width.bits, "block_size": block}
    attributes = shared | {"K": rows.shape[1], "N": rows.shape[0], "accuracy_level": _INT8_INPUTS}
    gathers = ((node, _matrix(node.inputs[0])) for node in graph if node.op_type == "Gather")
    gather, table = next(
        ((node, table) for node, table in gathers if table is not None and table.shape == rows.shape), (None, None)
    )
    tied = table is not None and np.array_equal(table, rows)
    if table is not None and not tied:
        own, own_scales = _rounded(table, width, block)
        initializers |= {stored_embeddings: own, f"{stored_embeddings}.{_SCALES}": own_scales}
    made = {name: add_initializer(graph, onnx_ir.tensor(array, name=name)) for name, array in initializers.items()}
    if tied:
        made[stored_embeddings] = onnx_ir.Value(name=stored_embeddings)  # the head's own bytes: see below
    operands = [head.inputs[0], made[stored_head], made[f"{stored_head}.{_SCALES}"]]
    _replace(graph, head, "MatMulNBits", operands, attributes)
    if gather is not None:
        scales_value = made[f"{stored_head if tied else stored_embeddings}.{_SCALES}"]
        operands = [made[stored_embeddings], gather.inputs[1], scales_value]
        _replace(graph, gather, "GatherBlockQuantized", operands, shared | {"gather_axis": 0, "quantize_axis": 1})
    with written_aside(path) as folder:
        save_model(model, folder / path.name)
        if tied:
            _share(folder / path.name, stored_head, stored_embeddings, values.shape)
    return True


def _block(inputs: int, width: _Width) -> int | None:
    """How many inputs share a scale: a power of two, as the operators want it, that divides them."""
    block = width.largest_block
    while inputs % block and block > _SMALLEST_BLOCK:
        block //= 2
    return block if inputs % block == 0 else None


def _rounded(weight: NDArray[np.float32], width: _Width, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(V, H bits / 8) bytes, to nearest, and (V, H / block) scales, of those tried the ones of the least square error.

    The largest weight of a block becomes the largest number there is in its direction: of 4 bits, -8.
    """
    chunks = [_round_rows(weight[start : start + _CHUNK], width, block) for start in range(0, len(weight), _CHUNK)]
    return np.concatenate([values for values, _ in chunks]), np.concatenate([scales for _, scales in chunks])


def _round_rows(
    weight: NDArray[np.float32], width: _Width, block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    parts = weight.reshape(len(weight), -1, block)
    farthest = np.abs(parts).argmax(-1)[..., None]
    signed = np.take_along_axis(parts, farthest, -1)[..., 0]
    reach = signed / -width.zero if width.bits == 4 else np.abs(signed) / (width.zero - 1)
    best = np.full(reach.shape, np.inf, np.float32)
    values, scales = np.zeros(parts.shape, np.int8), np.zeros(reach.shape, np.float32)
    for factor in width.shrink:
        tried = (reach * factor).astype(np.float32)
        safe = np.where(tried == 0, 1, tried)[..., None]
        rounded = np.clip(np.rint(parts / safe), -width.zero, width.zero - 1)
        error = np.square(rounded * safe - parts).sum(-1)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, tried, scales)
        values = np.where(better[..., None], rounded, values).astype(np.int8)
    stored: NDArray[np.uint8] = (values.astype(np.int16) + width.zero).astype(np.uint8).reshape(weight.shape)
    if width.bits == 4:
        stored = (stored[:, 0::2] | stored[:, 1::2] << 4).astype(np.uint8)
    return stored, scales


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


def _share(path: Path, head: str, embeddings: str, shape: tuple[int, ...]) -> None:
    """Makes the embeddings an initializer of `shape` over the same bytes of the data file as the head."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == head)
    shared = model.graph.initializer.add()
    shared.CopyFrom(stored)
    shared.name = embeddings
    del shared.dims[:]
    shared.dims.extend(shape)
    onnx.save(model, path)
