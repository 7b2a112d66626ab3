"""Packs the 2:4 weights of a dense ONNX model: each MatMul by one becomes `swiftprune::MatMul24`."""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.onnx import matmul24
from exporters.onnx.packed_rows import PackedRows
from exporters.onnx.weights import PACK_OPSET, Weight, find_weights, load_graph
from exporters.workspace import disk_errors
from swiftprune.errors import FormatError, OutputError
from swiftprune.formats import spec
from swiftprune.formats.spec import SCALE_DTYPE, Packed24, Quantized, WeightSpec
from swiftprune.kernels import packing
from swiftprune.models.ignore import DEFAULT_IGNORE, Ignore, compile_ignore
from swiftprune.progress import ProgressCallback, no_progress

_OLDEST_IR = 8  # the first with functions in models
# Each tensor on a page of its own, so that runtimes map it and the packed values are aligned.
_ALIGNMENT = 4096
_PARTS = ("values", "metadata", "scales")


@dataclass(frozen=True)
class PackReport:
    """What `pack` did."""

    packed: dict[str, tuple[int, int]]
    """Initializer -> (N, K)."""
    dense: dict[str, str]
    """Initializers that a MatMul, Gemm or Conv multiplies by and that stay dense, with the reason."""
    opset: int
    ir_version: int
    weight_bytes_before: int
    """Of the packed weights alone, as they were."""
    weight_bytes_after: int


def pack_model(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    ignore: str | None = None,
    overwrite: bool = False,
    rows_of: PackedRows | None = None,
    progress: ProgressCallback = no_progress,
) -> PackReport:
    """Writes the ONNX model `source` to `out` with its 2:4 weights packed, big tensors beside it in `out`.data.

    `dtype` is the type of the packed values, by default that of each weight; it must hold every weight exactly.
    Weights whose names match `ignore` (see `Ignore`), that are not 2:4, or that other nodes read too stay dense and
    are listed. Weights that are among `rows_of` are written as they stand there. Reads one weight at a time.

    Raises CheckpointError for a damaged source, FormatError when nothing can be packed or a weight does not fit
    `dtype`, and OutputError when `out` cannot be written, which then is as it was: when it exists and is not to be
    replaced (`overwrite`), or holds what `source` is read from.
    """
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    check_replaceable(out, overwrite=overwrite)
    model = load_graph(source, oldest=PACK_OPSET)
    LiftConstantsToInitializersPass()(model)  # whose data may stand in files too
    _check_apart(out, source, model)
    found = find_weights(model)
    ignored = compile_ignore(ignore) if ignore is not None else None
    if ignored is not None and ignore != DEFAULT_IGNORE:
        ignored.check(weight.name for weight in found.found)
    dense = {name: f"quantized ({kind})" for name, kind in found.quantized.items()}
    packed: dict[str, tuple[int, int]] = {}
    before = after = 0

    @functools.lru_cache(maxsize=1)  # values and metadata are written one after the other
    def pack(weight: Weight, stored: WeightSpec) -> Packed24:
        if stored.quantized and rows_of:
            return rows_of.find(weight.read(), weight.name)
        return packing.pack(weight.read().to(stored.dtype), weight.name)

    kinds: set[Quantized | None] = set()

    for index, weight in enumerate(found.found):
        progress("pack", index, len(found.found))
        if reason := _exempt(weight, ignored):
            dense[weight.name] = reason
            continue
        rows = weight.read()
        if reason := _not_2of4(rows):
            dense[weight.name] = reason
            continue
        quantized = rows_of.quantized if rows_of and rows_of.holds(rows) else None
        stored = WeightSpec((rows.shape[0], rows.shape[1]), dtype or rows.dtype, quantized)
        if not quantized:
            _check_fits(weight.name, rows, stored.dtype)
        before += rows.nbytes
        after += stored.nbytes
        packed[weight.name] = stored.shape
        kinds.add(quantized)
        _replace(model, weight, stored, functools.partial(pack, weight, stored))
    progress("pack", len(found.found), len(found.found))
    if not packed:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:5]) or "it multiplies by none"
        raise FormatError(f"{source}: no weight can be packed: {listed}")
    opset = model.opset_imports[""]
    for kind in kinds:
        function = matmul24.matmul24(opset, kind)
        model.functions[function.identifier()] = function
    model.opset_imports[matmul24.DOMAIN] = matmul24.DOMAIN_VERSION
    model.ir_version = max(model.ir_version, _OLDEST_IR)
    with written_aside(out) as folder:
        save_model(model, folder / out.name, progress)
    return PackReport(packed, dense, opset, model.ir_version, before, after)


def save_model(model: Any, path: Path, progress: ProgressCallback = no_progress) -> None:
    """Writes the onnx_ir.Model with its tensors in one file beside it."""
    import onnx_ir

    onnx_ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        alignment=_ALIGNMENT,
        align_threshold=0,
        callback=lambda _, info: progress("write", info.index + 1, info.total),
    )


def _exempt(weight: Weight, ignore: Ignore | None) -> str | None:
    """Why the weight stays dense whatever its numbers are, or None."""
    if ignore is not None and ignore.search(weight.name):
        return f"matches --ignore {ignore.pattern}"
    if "Conv" in weight.op:
        return "a convolution, for which there is no packed operator"
    return weight.unpackable


def _not_2of4(rows: Tensor) -> str | None:
    if reason := spec.unpackable_reason(tuple(rows.shape), rows.dtype):
        return reason
    try:
        packing.pack(rows, "not 2:4")
    except FormatError as error:
        return str(error)
    return None


def _check_fits(name: str, rows: Tensor, dtype: torch.dtype) -> None:
    if dtype == rows.dtype:
        return
    changed = rows.to(dtype).to(rows.dtype) != rows
    if changed.any():
        row, column = changed.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: weight ({row}, {column}) is {float(rows[row, column])!r}, which {dtype} does not hold exactly; "
            "choose a wider type with --dtype"
        )


def _replace(model: Any, weight: Weight, stored: WeightSpec, pack: Callable[[], Packed24]) -> None:
    """Puts MatMul24 in the place of the nodes of `weight`; `pack` is called when it is written."""
    import onnx_ir

    graph = model.graph
    stem = _unused_stem(graph, weight.name)
    parts = [stored.values, (stored.metadata, torch.uint8)] + ([(stored.scales, SCALE_DTYPE)] if stored.scales else [])
    tensors = [
        _lazy(f"{stem}.{part}", dtype, shape, functools.partial(_part, pack, index))
        for index, (part, (shape, dtype)) in enumerate(zip(_PARTS, parts, strict=False))
    ]
    values = [add_initializer(graph, tensor) for tensor in tensors]
    for node in weight.nodes:
        tail = []
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        packed = onnx_ir.node(
            matmul24.NAMES[stored.quantized], [node.inputs[0], *values], domain=matmul24.DOMAIN, name=node.name
        )
        if bias is not None:
            tail = [onnx_ir.node("Add", [packed.outputs[0], bias], name=f"{node.name}/bias")]
        replace_node(graph, node, [packed, *tail])
    for node, _ in list(weight.value.uses()):  # a Transpose that nothing reads any more
        graph.remove(node, safe=True)
    del graph.initializers[weight.name]


def add_initializer(graph: Any, tensor: Any) -> Any:
    """The onnx_ir.Value of a new initializer of the graph, by the name of its tensor."""
    import onnx_ir

    value = onnx_ir.Value(
        name=tensor.name, type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace_node(graph: Any, node: Any, new: Sequence[Any]) -> None:
    """Puts the nodes `new` in the place of `node`; the only output of the last is the one that `node` had, by name."""
    import onnx_ir

    before, after = node.outputs[0], new[-1].outputs[0]
    after.shape, after.type, name = before.shape, before.type, before.name
    before.name, after.name = None, name
    graph.insert_before(node, new)
    onnx_ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _part(pack: Callable[[], Packed24], index: int) -> Tensor:
    return pack().tensors[index]


def _unused_stem(graph: Any, name: str) -> str:
    """`name`, or that and a number where the graph has values of the names that are made of it."""
    import onnx_ir

    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken |= {value.name for node in onnx_ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs}
    stems = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(1)))
    return next(stem for stem in stems if not taken & {f"{stem}.{part}" for part in _PARTS})


def _lazy(name: str, dtype: torch.dtype, shape: tuple[int, int], make: Any) -> Any:
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

    return onnx_ir.LazyTensor(
        lambda: TorchTensor(make(), name=name), dtype=from_torch_dtype(dtype), shape=onnx_ir.Shape(shape), name=name
    )


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Raises OutputError when the file `out` or its data exists and may not be replaced."""
    for path in _files(out):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give another --out")
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists; give another --out, or --overwrite to replace it")


def _check_apart(out: Path, source: Path, model: Any) -> None:
    """Raises OutputError when writing `out` would replace what the model at `source` is read from."""
    import onnx_ir

    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    needed = {source} | {
        source.parent / tensor.location for tensor in tensors if isinstance(tensor, onnx_ir.ExternalTensor)
    }
    for path in _files(out):
        if path.resolve() in {file.resolve() for file in needed}:
            raise OutputError(f"{path}: {source} is read from it; give another --out")


def _files(out: Path) -> list[Path]:
    """What writing `out` writes: the model and its data."""
    return [out, out.with_name(f"{out.name}.data")]


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` in which to write it and its data; both are put in place when all went well."""
    model, data = _files(out)
    with disk_errors(out, kept="nothing was changed"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield folder
            model.unlink(missing_ok=True)  # an old model never names new data
            data.unlink(missing_ok=True)
            for path in (data, model):  # the data first: a model never names missing data
                if (folder / path.name).exists():
                    (folder / path.name).replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
