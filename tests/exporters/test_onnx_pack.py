"""Packing ONNX models and checking them, on graphs made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import swiftprune.serve.onnxruntime
from exporters.onnx import check_weights, pack_model
from exporters.onnx.cli import app
from swiftprune.errors import CheckpointError, FormatError, OutputError, SwiftpruneError
from swiftprune.formats.spec import Packed24
from swiftprune.kernels.packing import unpack
from tests import onnx_graphs
from tests.onnx_graphs import FloatArray, linear, save, sparse

FORMS = ("MatMul", "Transpose", "Gemm", "GemmT")


def both(dense: Path, packed: Path, x: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """What the dense model, the packed model as any runtime reads it, and the packed model on our kernels answer."""
    sessions = (
        onnxruntime.InferenceSession(dense),
        onnxruntime.InferenceSession(packed),
        swiftprune.serve.onnxruntime.session(packed),
    )
    first, second, third = (session.run(None, {"x": x})[0] for session in sessions)
    return first, second, third


@settings(max_examples=30)
@given(
    form=st.sampled_from(FORMS),
    outputs=st.integers(1, 40),
    groups=st.integers(1, 20),
    biased=st.booleans(),
    dtype=st.sampled_from([None, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_packed_models_answer_as_before(
    tmp_path_factory: pytest.TempPathFactory,
    form: str,
    outputs: int,
    groups: int,
    biased: bool,
    dtype: torch.dtype | None,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    weight = sparse(outputs, 4 * groups, seed)
    bias = np.arange(outputs, dtype=np.float32) if biased else None
    dense = save(linear(weight, form=form, bias=bias), folder / "dense.onnx", external=seed % 2 == 0)
    report = pack_model(dense, folder / "out" / "packed.onnx", dtype=dtype)
    assert report.packed == {"w": (outputs, 4 * groups)}
    assert report.dense == {}
    onnx.checker.check_model(str(folder / "out" / "packed.onnx"), full_check=True)
    rank = 2 if form.startswith("Gemm") else 3
    x = np.random.default_rng(seed).standard_normal((2, 3, 4 * groups)[-rank:]).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T + (0 if bias is None else bias)
    for y in both(dense, folder / "out" / "packed.onnx", x):
        assert np.allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_what_the_file_holds(tmp_path: Path) -> None:
    """The pair is the packed format, aligned so that it can be mapped, at 17 bits a weight in fp32 and 9 in bf16."""
    weight = sparse(64, 128)
    dense = save(linear(weight), tmp_path / "dense.onnx")
    for dtype, bits in ((torch.float32, 17), (torch.bfloat16, 9)):
        report = pack_model(dense, tmp_path / "packed.onnx", dtype=dtype, overwrite=True)
        assert report.weight_bytes_before == weight.nbytes
        assert report.weight_bytes_after * 8 == bits * weight.size
        model = onnx.load(tmp_path / "packed.onnx", load_external_data=False)
        assert [(node.domain, node.op_type) for node in model.graph.node] == [("swiftprune", "MatMul24")]
        assert [function.name for function in model.functions] == ["MatMul24"]
        assert {node.domain for node in model.functions[0].node} == {""}
        places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer]
        assert all(int(place["offset"]) % 4096 == 0 and place["location"] == "packed.onnx.data" for place in places)
        values, metadata = onnx.load(tmp_path / "packed.onnx").graph.initializer
        raw = torch.frombuffer(bytearray(values.raw_data), dtype=dtype).view(64, 64)
        packed = Packed24(raw, torch.from_numpy(numpy_helper.to_array(metadata).copy()))
        assert torch.equal(unpack(packed).float(), torch.from_numpy(weight))


def shared(kind: str) -> Any:
    """Two uses of one weight."""
    weight = np.ascontiguousarray(sparse(16, 16).T)
    first = helper.make_node("MatMul", ["x", "w"], ["h"], name="first")
    second = {
        "matmul": helper.make_node("MatMul", ["h", "w"], ["y"], name="second"),
        "gather": helper.make_node("Add", ["h", "w"], ["y"], name="second"),
        "other axis": helper.make_node("Gemm", ["h", "w"], ["y"], name="second", transB=1),
    }[kind]
    return onnx_graphs.model([first, second], {"w": weight}, {"x": [16, 16]}, {"y": [16, 16]})


def test_a_weight_of_two_products_is_packed_once(tmp_path: Path) -> None:
    dense = save(shared("matmul"), tmp_path / "dense.onnx")
    assert pack_model(dense, tmp_path / "packed.onnx").packed == {"w": (16, 16)}
    assert len(onnx.load(tmp_path / "packed.onnx").graph.initializer) == 2
    x = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    expected, plain, fast = both(dense, tmp_path / "packed.onnx", x)
    assert np.allclose(plain, expected, atol=1e-4)
    assert np.allclose(fast, expected, atol=1e-4)
    assert swiftprune.serve.onnxruntime.session(tmp_path / "packed.onnx").linears.popitem()[1] == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gather", r"w: it is shared: the node second \(Add\) reads it too"),
        ("other axis", "w: it is shared by nodes that sum over different axes"),
    ],
)
def test_a_weight_that_is_shared_otherwise_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        pack_model(save(shared(kind), tmp_path / "dense.onnx"), tmp_path / "packed.onnx")
    assert not (tmp_path / "packed.onnx").exists()


def one(op: str, **attributes: Any) -> Any:
    return helper.make_node(op, ["x", "w"], ["y"], name="lin", **attributes)


SQUARE = np.ascontiguousarray(sparse(16, 16).T)
REFUSED: dict[str, tuple[Any, str]] = {
    "scaled": (
        onnx_graphs.model([one("Gemm", alpha=2.0)], {"w": SQUARE}, {"x": [2, 16]}, {"y": [2, 16]}),
        "w: the node lin scales or transposes its operands",
    ),
    "left operand": (
        onnx_graphs.model(
            [helper.make_node("MatMul", ["w", "x"], ["y"])],
            {"w": SQUARE.T.copy()},
            {"x": [16, 2]},
            {"y": [16, 2]},
        ),
        "w: it is the left operand",
    ),
    "batched": (
        onnx_graphs.model([one("MatMul")], {"w": np.stack((SQUARE, SQUARE))}, {"x": [2, 3, 16]}, {"y": [2, 3, 16]}),
        "w: it has 3 axes, not 2",
    ),
    "convolution": (
        onnx_graphs.model(
            [one("Conv")],
            {"w": sparse(8, 16).reshape(8, 16, 1, 1)},
            {"x": [1, 16, 4, 4]},
            {"y": [1, 8, 4, 4]},
        ),
        "w: a convolution",
    ),
    "input too": (
        onnx_graphs.model([one("MatMul")], {"w": SQUARE}, {"x": [2, 16], "w": [16, 16]}, {"y": [2, 16]}),
        "w: it is an input of the graph too",
    ),
    "output too": (
        onnx_graphs.model([one("MatMul")], {"w": SQUARE}, {"x": [2, 16]}, {"y": [2, 16], "w": [16, 16]}),
        "w: it is an output of the graph",
    ),
    "transposed output": (
        onnx_graphs.model(
            [helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]), helper.make_node("MatMul", ["x", "wt"], ["y"])],
            {"w": SQUARE.T.copy()},
            {"x": [2, 16]},
            {"y": [2, 16], "wt": [16, 16]},
        ),
        "w: it is an output of the graph",
    ),
    "dense": (linear(np.ones((4, 8), np.float32)), r"w: not 2:4: row 0, group 0 \(inputs 0..3\) has 4 non-zeros"),
    "not finite": (linear(np.full((4, 8), np.nan, np.float32)), "w: not 2:4: .*NaN"),
    "odd": (linear(np.ones((4, 6), np.float32)), "w: in_features = 6 is not a multiple of 4"),
    "no weights": (
        onnx_graphs.model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": [2]}, {"y": [2]}),
        "it multiplies by none",
    ),
    "quantized": (
        onnx_graphs.model(
            [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], name="dequantize"), one("MatMul")],
            {"q": np.zeros((16, 16), np.int8), "s": np.array(0.5, np.float32)},
            {"x": [2, 16]},
            {"y": [2, 16]},
        ),
        r"q: quantized \(DequantizeLinear\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_says_why(tmp_path: Path, name: str) -> None:
    model, message = REFUSED[name]
    with pytest.raises(FormatError, match=f"no weight can be packed: {message}"):
        pack_model(save(model, tmp_path / "dense.onnx"), tmp_path / "packed.onnx")


def test_values_must_fit_the_type(tmp_path: Path) -> None:
    weight = sparse(4, 8)
    weight[weight != 0] += 1e-3
    dense = save(linear(weight), tmp_path / "dense.onnx")
    with pytest.raises(FormatError, match=r"w: weight \(0, \d\) is .*bfloat16 does not hold exactly"):
        pack_model(dense, tmp_path / "packed.onnx", dtype=torch.bfloat16)
    assert pack_model(dense, tmp_path / "packed.onnx").packed


def test_the_rest_stays_dense_with_its_reason(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "sparse"], ["h"]),
        helper.make_node("MatMul", ["h", "dense"], ["g"]),
        helper.make_node("MatMul", ["g", "head"], ["y"]),
    ]
    weights = {"sparse": SQUARE, "dense": np.ones((16, 16), np.float32), "head": SQUARE}
    model = onnx_graphs.model(nodes, weights, {"x": [2, 16]}, {"y": [2, 16]})
    report = pack_model(save(model, tmp_path / "dense.onnx"), tmp_path / "packed.onnx", ignore="head")
    assert report.packed == {"sparse": (16, 16)}
    assert report.dense["head"] == "matches --ignore head"
    assert "has 4 non-zeros" in report.dense["dense"]
    # float32 weights, one of them packed: 17 bits instead of 32
    assert swiftprune.serve.onnxruntime.session(tmp_path / "packed.onnx").linears["dense"] == 2


def damaged(folder: Path, how: str) -> Path:
    path = save(linear(sparse(16, 32)), folder / "m.onnx", external=True)
    data = folder / "m.onnx.data"
    model = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry for entry in model.graph.initializer[0].external_data}
    match how:
        case "truncated":
            data.write_bytes(data.read_bytes()[:-1])
        case "missing":
            data.unlink()
        case "elsewhere":
            entries["location"].value = "../secret"
        case "length":
            entries["length"].value = "100"
        case "offset":
            entries["offset"].value = "4096"
        case "old opset":
            model.opset_import[0].version = 17
        case "new opset":
            model.opset_import[0].version = 99
        case "no opset":
            del model.opset_import[:]
        case "negative":
            model.graph.initializer[0].dims[0] = -32
        case "no outputs":
            del model.graph.node[0].output[:]
        case "no inputs":
            del model.graph.node[0].input[:]
    onnx.save(model, path)
    if how == "garbage":
        path.write_bytes(b"\x08garbage")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:40])
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"m\.onnx\.data: truncated: w is at bytes 0 to 2,048, the file has 2,047"),
        ("missing", r"m\.onnx\.data: missing, though m\.onnx has w in it"),
        ("elsewhere", r"w has its data outside of the model's folder"),
        ("length", r"w is 2,048 bytes by its shape, but 100 of m\.onnx\.data are named for it"),
        ("offset", r"m\.onnx\.data: truncated: w is at bytes 4,096 to 6,144"),
        ("old opset", r"has opset 17 of the standard operators; 18 to \d+ are supported"),
        ("new opset", "has opset 99 of the standard operators"),
        ("no opset", "has opset None of the standard operators"),
        ("negative", r"m\.onnx: w has the shape \(-32, 16\)"),
        ("no outputs", r"the node lin \(MatMul\) has 2 inputs and 0 outputs: damaged"),
        ("no inputs", r"the node lin \(MatMul\) has 0 inputs and 1 outputs: damaged"),
        ("garbage", "not a readable ONNX model"),
        ("cut", "not a readable ONNX model"),
    ],
)
def test_damaged_models_say_where(tmp_path: Path, how: str, message: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    path = damaged(tmp_path / "m", how)
    with pytest.raises(CheckpointError, match=message):
        pack_model(path, tmp_path / "out.onnx")
    if how != "old opset":  # which is only too old for the packed operator
        with pytest.raises(CheckpointError, match=message.replace("18 to", "1 to")):
            check_weights(path)


@pytest.mark.parametrize("where", ["initializer", "Constant"])
def test_tensors_of_other_sizes_than_their_shape_are_damaged(tmp_path: Path, where: str) -> None:
    proto = linear(sparse(16, 32))
    proto.graph.initializer[0].dims[0] = 33
    if where == "Constant":
        constant = helper.make_node("Constant", [], ["w"], value=proto.graph.initializer.pop())
        proto.graph.node.insert(0, constant)
    with pytest.raises(CheckpointError, match=r"m\.onnx: w is damaged \("):
        check_weights(save(proto, tmp_path / "m.onnx"))


def test_attributes_of_another_type_are_damage(tmp_path: Path) -> None:
    proto = linear(sparse(16, 32), form="Gemm")
    proto.graph.node[0].attribute.append(helper.make_attribute("alpha", 1))
    with pytest.raises(CheckpointError, match=r"the node lin \(Gemm\): .*alpha.* not of type FLOAT"):
        check_weights(save(proto, tmp_path / "m.onnx"))


def test_names_that_are_taken_are_not_used_again(tmp_path: Path) -> None:
    weight = sparse(16, 16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["w.values"]),
        helper.make_node("Add", ["w.values", "w.1.metadata"], ["y"]),
    ]
    bias = np.arange(16, dtype=np.float32)
    proto = onnx_graphs.model(
        nodes, {"w": np.ascontiguousarray(weight.T), "w.1.metadata": bias}, {"x": [2, 16]}, {"y": [2, 16]}
    )
    assert pack_model(save(proto, tmp_path / "m.onnx"), tmp_path / "p.onnx").packed == {"w": (16, 16)}
    x = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    for y in both(tmp_path / "m.onnx", tmp_path / "p.onnx", x):
        assert np.allclose(y, x @ weight.T + bias, atol=1e-4)


def test_packing_twice_is_refused(tmp_path: Path) -> None:
    pack_model(save(linear(sparse(16, 32)), tmp_path / "a.onnx"), tmp_path / "b.onnx")
    with pytest.raises(CheckpointError, match="lin: the model is packed already"):
        pack_model(tmp_path / "b.onnx", tmp_path / "c.onnx")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save(linear(sparse(16, 32)), tmp_path / "dense.onnx")
    out = tmp_path / "packed.onnx"
    pack_model(dense, out)
    before = (out.read_bytes(), (tmp_path / "packed.onnx.data").read_bytes())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(OutputError, match="the disk is full"):
        pack_model(dense, out, overwrite=True)
    assert (out.read_bytes(), (tmp_path / "packed.onnx.data").read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.onnx", "packed.onnx", "packed.onnx.data"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written: .*; give another --out"):
        pack_model(dense, tmp_path / "file" / "packed.onnx")


@pytest.mark.parametrize(("form", "axis"), [("MatMul", 0), ("Transpose", 1), ("Gemm", 0), ("GemmT", 1)])
def test_check_looks_along_the_summed_axis(tmp_path: Path, form: str, axis: int) -> None:
    """A weight that is 2:4 along the outputs only must not pass."""
    good = sparse(16, 16)
    wrong = np.ascontiguousarray(good.T)
    assert (np.count_nonzero(wrong.reshape(16, 4, 4), axis=-1) > 2).any()
    (found,) = check_weights(save(linear(good, form=form), tmp_path / "m.onnx"))
    assert (found.name, found.axis, found.problem) == ("w", axis, None)
    assert found.sparsity == pytest.approx((good == 0).mean())
    (found,) = check_weights(save(linear(wrong, form=form), tmp_path / "m.onnx"))
    assert found.problem is not None
    assert "non-zeros in group" in found.problem


def test_check_takes_convolutions_by_input_channel(tmp_path: Path) -> None:
    flat = sparse(6 * 9, 8)  # one row for each output channel and kernel position
    weight = np.ascontiguousarray(flat.reshape(6, 3, 3, 8).transpose(0, 3, 1, 2))
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    shapes: Any = {"x": [1, 8, 5, 5]}, {"y": [1, 6, 3, 3]}
    (found,) = check_weights(save(onnx_graphs.model([node], {"w": weight}, *shapes), tmp_path / "m.onnx"))
    assert (found.op, found.axis, found.problem) == ("Conv", 1, None)
    weight[2, :3, 1, 1] = 1
    (found,) = check_weights(save(onnx_graphs.model([node], {"w": weight}, *shapes), tmp_path / "m.onnx"))
    assert found.problem == "3 non-zeros in group 0 of output 22"  # 2 * 9 + 1 * 3 + 1


def quantized(weight: FloatArray, zero: Any) -> NDArray[np.uint8]:
    return np.asarray((np.round(weight * 64) + zero).clip(0, 255), np.uint8)


def placed(where: str, weight: FloatArray) -> Any:
    """A model that multiplies by `weight` (N, K), which stands where exporters may put it."""
    outputs, inputs = weight.shape
    columns = np.ascontiguousarray(weight.T)
    node = helper.make_node
    ends = {"x": [2, inputs]}, {"y": [2, outputs]}
    tensor = numpy_helper.from_array(columns, "w")
    product = node("MatMul", ["x", "w"], ["y"])
    scale, zeros = np.full(outputs, 1 / 64, np.float32), np.arange(100, 100 + outputs, dtype=np.uint8)
    match where:
        case "opset 7":
            return onnx_graphs.model([product], {"w": columns}, ends[0], ends[1], opset=7)
        case "Constant":
            return onnx_graphs.model([node("Constant", [], ["w"], value=tensor), product], {}, *ends)
        case "branch" | "outside of the branch":
            inner, outer = ([tensor], {}) if where == "branch" else ([], {"w": columns})
            branch = helper.make_graph(
                [node("MatMul", ["x", "w"], ["z"])],
                "branch",
                [],
                [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, outputs])],
                inner,
            )
            choose = node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
            made = onnx_graphs.model([choose], outer, *ends)
            made.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
            return made
        case "function":
            made = onnx_graphs.model([node("Layer", ["x"], ["y"], domain="own")], {}, *ends)
            opsets = [helper.make_opsetid("", 20)]
            body = [node("Constant", [], ["w"], value=tensor), product]
            made.functions.append(helper.make_function("own", "Layer", ["x"], ["y"], body, opsets))
            made.opset_import.append(helper.make_opsetid("own", 1))
            return made
        case "Cast":
            nodes = [node("Cast", ["h"], ["w"], to=TensorProto.FLOAT), product]
            return onnx_graphs.model(nodes, {"h": columns.astype(np.float16)}, *ends)
        case "Q/DQ of a float":
            nodes = [node("QuantizeLinear", ["f", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["w"])]
            numbers: dict[str, NDArray[Any]] = {
                "f": columns,
                "s": np.array(1 / 64, np.float32),
                "z": np.array(128, np.uint8),
            }
            return onnx_graphs.model([*nodes, product], numbers, *ends)
        case "DQ" | "DQ and Transpose":
            turned = where == "DQ and Transpose"
            stored = quantized(weight, zeros[:, None]) if turned else quantized(columns, zeros)
            of = node("DequantizeLinear", ["q", "s", "z"], ["d" if turned else "w"], axis=0 if turned else 1)
            more = [node("Transpose", ["d"], ["w"], perm=[1, 0])] if turned else []
            # And an activation goes through the same, which is no weight.
            acts = [node("QuantizeLinear", ["x", "a", "b"], ["qx"]), node("DequantizeLinear", ["qx", "a", "b"], ["dx"])]
            initializers: dict[str, NDArray[Any]] = {
                "q": stored,
                "s": scale,
                "z": zeros,
                "a": np.array(0.1, np.float32),
                "b": np.array(3, np.uint8),
            }
            return onnx_graphs.model([of, *more, *acts, node("MatMul", ["dx", "w"], ["y"])], initializers, *ends)
        case "MatMulInteger":
            nodes = [
                node("DynamicQuantizeLinear", ["x"], ["q", "a", "b"]),
                node("MatMulInteger", ["q", "w", "b", "z"], ["i"]),
                node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
            ]
            return onnx_graphs.model(nodes, {"w": quantized(columns, 7), "z": np.array(7, np.uint8)}, *ends)
    raise AssertionError(where)


@pytest.mark.parametrize(
    "where",
    [
        "opset 7",
        "Constant",
        "branch",
        "outside of the branch",
        "function",
        "Cast",
        "Q/DQ of a float",
        "DQ",
        "DQ and Transpose",
        "MatMulInteger",
    ],
)
def test_check_finds_weights_wherever_they_stand(where: str, tmp_path: Path) -> None:
    """And tells the sparse from the dense there, by the value that stands for zero."""
    good = sparse(16, 32)
    path = save(placed(where, good), tmp_path / "m.onnx")
    onnx.checker.check_model(str(path))
    found = check_weights(path)
    assert [(weight.problem, weight.impossible) for weight in found] == [(None, False)] * len(found)
    assert len(found) == (2 if where == "branch" else 1)
    assert found[0].sparsity == pytest.approx((good == 0).mean())
    assert CliRunner().invoke(app, ["check", str(path), "--require"]).exit_code == 0
    bad = good.copy()
    bad[3, 8:11] = 1
    path = save(placed(where, bad), tmp_path / "m.onnx")
    assert {weight.problem for weight in check_weights(path)} == {"3 non-zeros in group 2 of output 3"}
    assert CliRunner().invoke(app, ["check", str(path), "--require"]).exit_code != 0


def test_check_tells_what_cannot_be_sparse(tmp_path: Path) -> None:
    """The stem of a vision model has three input channels, a depthwise convolution one: no pruning helps those."""
    node = helper.make_node
    stem, depth = np.ones((8, 3, 3, 3), np.float32), np.ones((8, 1, 3, 3), np.float32)
    nodes = [
        node("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "depth"], ["b"], group=8),
        node("Conv", ["b", "point"], ["y"]),
    ]
    shapes: Any = {"x": [1, 3, 5, 5]}, {"y": [1, 6, 3, 3]}
    weights = {"stem": stem, "depth": depth, "point": sparse(6, 8).reshape(6, 8, 1, 1)}
    path = save(onnx_graphs.model(nodes, weights, *shapes), tmp_path / "m.onnx")
    assert [(weight.name, weight.impossible) for weight in check_weights(path)] == [
        ("stem", True),
        ("depth", True),
        ("point", False),
    ]
    run = CliRunner().invoke(app, ["check", str(path), "--require"])
    assert run.exit_code == 0
    assert "1 of 3 weights are 2:4; 2 cannot be" in run.output
    path = save(onnx_graphs.model(nodes[:1], {"stem": stem}, shapes[0], {"a": [1, 8, 5, 5]}), tmp_path / "m.onnx")
    run = CliRunner().invoke(app, ["check", str(path), "--require"])
    assert "no weight can be 2:4, first stem" in str(run.exception)


def test_to_see_nothing_is_no_success(tmp_path: Path) -> None:
    path = save(onnx_graphs.model([helper.make_node("Relu", ["x"], ["y"])], {}, {"x": [2]}, {"y": [2]}), tmp_path / "m")
    run = CliRunner().invoke(app, ["check", str(path), "--require"])
    assert "no weight was found" in str(run.exception)
    path = save(linear(sparse(16, 32)), tmp_path / "m.onnx")
    run = CliRunner().invoke(app, ["check", str(path), "--require", "--ignore", "haed"])
    assert "--ignore 'haed': no module of the model has a name" in str(run.exception)


def test_weights_in_constant_nodes_are_packed(tmp_path: Path) -> None:
    weight = sparse(16, 32)
    report = pack_model(save(placed("Constant", weight), tmp_path / "m.onnx"), tmp_path / "packed.onnx")
    assert list(report.packed.values()) == [(16, 32)]
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    (y,) = swiftprune.serve.onnxruntime.session(tmp_path / "packed.onnx").run(None, {"x": x})
    assert np.allclose(y, x @ weight.T, atol=1e-5)


def test_the_command_line(tmp_path: Path) -> None:
    dense = save(linear(sparse(16, 32)), tmp_path / "dense.onnx")
    run = CliRunner().invoke(app, ["check", str(dense), "--require"])
    assert run.exit_code == 0
    assert "1 of 1 weights are 2:4" in run.output
    shapes = "--minShapes=x:1x1x32 --optShapes=x:1x64x32 --maxShapes=x:8x512x32"
    assert f"trtexec --onnx={dense} --fp16 --sparsity=enable --verbose {shapes}" in run.output
    run = CliRunner().invoke(app, ["pack", str(dense), "--out", str(tmp_path / "p.onnx"), "--dtype", "bfloat16"])
    assert run.exit_code == 0
    assert "3.56x smaller" in run.output
    bad = save(linear(np.ones((4, 8), np.float32)), tmp_path / "bad.onnx")
    run = CliRunner().invoke(app, ["check", str(bad)])
    assert run.exit_code == 0
    assert "0 of 1 weights" in run.output
    assert "trtexec" not in run.output
    run = CliRunner().invoke(app, ["check", str(bad), "--require"])
    assert isinstance(run.exception, SwiftpruneError)
    assert "1 weights are not 2:4, first w" in str(run.exception)
    run = CliRunner().invoke(app, ["check", str(bad), "--require", "--ignore", "^w$"])
    assert run.exit_code == 0


def test_files_are_replaced_only_when_asked_and_never_the_source(tmp_path: Path) -> None:
    dense = save(linear(sparse(16, 32)), tmp_path / "dense.onnx")
    out = tmp_path / "packed.onnx"
    (tmp_path / "packed.onnx.data").write_text("precious")
    with pytest.raises(OutputError, match=r"packed\.onnx\.data: exists; give another --out, or --overwrite"):
        pack_model(dense, out)
    assert [path.name for path in tmp_path.iterdir() if "packed" in path.name] == ["packed.onnx.data"]
    assert (tmp_path / "packed.onnx.data").read_text() == "precious"
    pack_model(dense, out, overwrite=True)
    before = out.read_bytes()
    result = CliRunner().invoke(app, ["pack", str(dense), "--out", str(out)])
    assert isinstance(result.exception, OutputError)
    assert "packed.onnx: exists" in str(result.exception)
    assert CliRunner().invoke(app, ["pack", str(dense), "--out", str(out), "--overwrite"]).exit_code == 0
    assert out.read_bytes() == before


def test_packing_never_writes_over_the_data_of_a_constant(tmp_path: Path) -> None:
    source = save(placed("Constant", sparse(16, 32)), tmp_path / "model.onnx")
    model = onnx.load(source)
    constant = next(node for node in model.graph.node if node.op_type == "Constant")
    value = constant.attribute[0].t
    (tmp_path / "out.onnx.data").write_bytes(value.raw_data)
    value.ClearField("raw_data")
    value.data_location = onnx.TensorProto.EXTERNAL
    value.external_data.add(key="location", value="out.onnx.data")
    source.write_bytes(model.SerializeToString())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="is read from it; give another --out"):
        pack_model(source, tmp_path / "out.onnx", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("named", ["the model", "its data", "a link to it"])
def test_packing_never_writes_over_what_it_reads(tmp_path: Path, named: str) -> None:
    model = onnx.load(save(linear(sparse(16, 32)), tmp_path / "small.onnx"))
    source = tmp_path / "model.onnx"
    onnx.save(model, source, save_as_external_data=True, location="w.data", size_threshold=0)
    # The data of a file w would be w.data.
    out = {"the model": source, "its data": tmp_path / "w", "a link to it": tmp_path / "link.onnx"}[named]
    if named == "a link to it":
        out.symlink_to(source)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="is read from it; give another --out"):
        pack_model(source, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
