"""The kernel library in ONNX Runtime, against numpy in double precision and ONNX Runtime's own operators."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import swiftprune.serve.onnxruntime
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.formats.spec import QUANTIZED, Packed24, Quantized
from swiftprune.kernels import native
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import unpack
from tests import onnx_graphs
from tests.quantized import random_packed

TYPES = [("FLOAT", "FLOAT"), ("FLOAT", "FLOAT16"), ("FLOAT", "BFLOAT16"), ("FLOAT16", "FLOAT16")]
ISAS = native.linear_isas(torch.float32)
TOKENS = (1, 2, 7, 33, 150)


def run(session: onnxruntime.InferenceSession, x: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.asarray(session.run(None, {"x": x})[0], np.float64)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("x_dtype", "dtype"), TYPES)
def test_every_kernel_gives_the_product(
    isa: str, x_dtype: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", isa)
    rng = np.random.default_rng(0)
    for outputs, inputs in ((1, 4), (9, 68), (40, 256), (130, 516)):
        weight = onnx_graphs.packed(
            tmp_path / "m.onnx", dtype=dtype, x_dtype=x_dtype, outputs=outputs, inputs=inputs, seed=outputs
        )
        session = swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")
        assert session.linears == {isa: 1}
        for tokens in TOKENS:
            x = rng.standard_normal((1, tokens, inputs)).astype(np.float32 if x_dtype == "FLOAT" else np.float16)
            y = run(session, x)
            expected = x.astype(np.float64) @ weight.T.astype(np.float64)
            scale = np.abs(x.astype(np.float64)) @ np.abs(weight.T.astype(np.float64))
            assert y.shape == expected.shape
            assert (np.abs(y - expected) <= (1e-6 if x_dtype == "FLOAT" else 1e-3) * scale + 1e-12).all()


def test_bfloat16_inputs_take_the_bfloat16_kernel(tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no bfloat16 but casts, so x is cast on the way in and out."""
    weight = onnx_graphs.packed(tmp_path / "m.onnx", dtype="BFLOAT16", x_dtype="BFLOAT16", outputs=24, inputs=128)
    model = onnx.load(tmp_path / "m.onnx")
    node = model.graph.node[0]
    node.input[0], node.output[0] = "narrow_x", "narrow_y"
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["narrow_x"], to=TensorProto.BFLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["narrow_y"], ["y"], to=TensorProto.FLOAT))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, tmp_path / "m.onnx")
    session = swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")
    assert session.linears == {native.linear_isas(torch.bfloat16)[0]: 1}
    x = torch.randn(2, 3, 128).bfloat16().float().numpy()
    assert np.allclose(run(session, x), x.astype(np.float64) @ weight.T, rtol=1e-2, atol=0.1)


@settings(max_examples=25)
@given(
    outputs=st.integers(1, 70),
    groups=st.integers(1, 40),
    tokens=st.integers(0, 20),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(["FLOAT", "FLOAT16", "BFLOAT16"]),
)
def test_library_and_function_body_agree(
    tmp_path_factory: pytest.TempPathFactory, outputs: int, groups: int, tokens: int, seed: int, dtype: str
) -> None:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    weight = onnx_graphs.packed(path, dtype=dtype, outputs=outputs, inputs=4 * groups, seed=seed)
    x = np.random.default_rng(seed).standard_normal((1, tokens, 4 * groups)).astype(np.float32)
    fast, plain = swiftprune.serve.onnxruntime.session(path), swiftprune.serve.onnxruntime.session(path, kernels=False)
    assert plain.linears == {"reference": 1}
    expected = x.astype(np.float64) @ weight.T
    for y in (run(fast, x), run(plain, x)):
        assert np.allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_onnx_s_own_evaluator_runs_the_body(tmp_path: Path) -> None:
    """A second runtime, which knows nothing of the operator but the function in the file."""
    weight = onnx_graphs.packed(tmp_path / "m.onnx", dtype="FLOAT16", outputs=7, inputs=20)
    from onnx.reference import ReferenceEvaluator

    x = np.random.default_rng(0).standard_normal((2, 3, 20)).astype(np.float32)
    (y,) = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"x": x})
    assert np.allclose(y, x @ weight.T, atol=1e-4)


def test_worked_example_in_bits(tmp_path: Path) -> None:
    """The example of the specification: 0 0.5 0 -1 | 2 0 0 0."""
    values = np.array([[0.5, -1, 2, 0]], np.float32)
    onnx_graphs.write_packed(tmp_path / "m.onnx", values, np.array([[0x8D]], np.uint8))
    x = np.array([[[1, 10, 100, 1000, 10000, 7, 7, 7]]], np.float32)
    for kernels in (True, False):
        assert (
            run(swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx", kernels=kernels), x)
            == 0.5 * 10 - 1000 + 2 * 10000
        )


@settings(max_examples=25)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 90),
    tokens=st.integers(0, 20),
    seed=st.integers(0, 1000),
    quantized=st.sampled_from(QUANTIZED),
)
def test_quantized_values(
    tmp_path_factory: pytest.TempPathFactory, rows: int, groups: int, tokens: int, seed: int, quantized: Quantized
) -> None:
    """The function's body is the specification; the kernel gives the bits that it gives in torch."""
    packed = random_packed(rows, groups, quantized, seed)
    path = onnx_graphs.write_quantized(tmp_path_factory.mktemp("model") / "m.onnx", packed)
    fast, plain = swiftprune.serve.onnxruntime.session(path), swiftprune.serve.onnxruntime.session(path, kernels=False)
    assert fast.linears == {f"{native.QUANT_ISAS[0]}-{quantized}": 1}
    x = torch.randn(1, tokens, 4 * groups, generator=torch.Generator().manual_seed(seed))
    assert np.allclose(run(plain, x.numpy()), x.double() @ unpack(packed).double().T, rtol=1e-5, atol=1e-4)
    assert (run(fast, x.numpy()) == Linear24.from_packed(packed)(x).double().numpy()).all()


@pytest.mark.parametrize("quantized", QUANTIZED)
@pytest.mark.parametrize("isa", native.QUANT_ISAS)
def test_quantized_values_on_every_kernel(
    quantized: Quantized, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = random_packed(70, 90, quantized)
    x = torch.randn(1, 33, 360, generator=torch.Generator().manual_seed(0))
    for x_dtype, dtype in (("FLOAT", torch.float32), ("FLOAT16", torch.float16)):
        path = onnx_graphs.write_quantized(tmp_path / "m.onnx", packed, x_dtype)
        for asked in (isa, f"{isa}-{quantized}"):
            monkeypatch.setenv("SWIFTPRUNE_BACKEND", asked)
            session = swiftprune.serve.onnxruntime.session(path)
            assert session.linears == {f"{isa}-{quantized}": 1}
        monkeypatch.delenv("SWIFTPRUNE_BACKEND")
        expected = Linear24.from_packed(packed, backend=f"{isa}-{quantized}", dtype=dtype)(x.to(dtype))
        assert (run(session, x.to(dtype).numpy()) == expected.double().numpy()).all()
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "avx512_bf16")
    with pytest.raises(CheckpointError, match=rf"cannot run {quantized} values on this machine; available: .*{isa}"):
        swiftprune.serve.onnxruntime.session(path)


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_onnx_s_own_evaluator_runs_the_body_of_quantized_values(quantized: Quantized, tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    packed = random_packed(5, 45, quantized)
    path = onnx_graphs.write_quantized(tmp_path / "m.onnx", packed)
    onnx.checker.check_model(str(path), full_check=True)
    x = torch.randn(2, 3, 180, generator=torch.Generator().manual_seed(0))
    (y,) = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    assert np.allclose(y, (x @ unpack(packed).T).numpy(), atol=1e-3)


def test_damaged_quantized_weights_are_refused(tmp_path: Path) -> None:
    packed = random_packed(3, 40, "int8")
    assert packed.scales is not None
    bad_value, bad_scale = packed.values.clone(), packed.scales.clone()
    bad_value[1, 7], bad_scale[2, 0] = -128, torch.nan
    wrong = r"MatMul24Int8 lin: a scale is infinite or not a number, or a value is -128"
    for damaged, message in (
        (Packed24(bad_value, packed.metadata, packed.scales), wrong),
        (Packed24(packed.values, packed.metadata, bad_scale), wrong),
        (
            Packed24(packed.values, packed.metadata, packed.scales[:2]),
            r"scales must be \(3, 1\) beside values \(3, 80\)",
        ),
        (Packed24(packed.values, packed.metadata[:, 1:], packed.scales), r"metadata must be \(3, 20\)"),
        (Packed24(packed.values, packed.metadata * 0, packed.scales), "metadata of row 0, group 0 is 0"),
    ):
        path = onnx_graphs.write_quantized(tmp_path / "m.onnx", damaged)
        with pytest.raises(CheckpointError, match=message):
            swiftprune.serve.onnxruntime.session(path)


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    onnx_graphs.packed(tmp_path / "m.onnx", outputs=700, inputs=1024)
    x = np.random.default_rng(0).standard_normal((1, 5, 1024)).astype(np.float32)
    answers = []
    for threads in (1, 2, 4):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        answers.append(run(swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx", options), x))
    assert all((answer == answers[0]).all() for answer in answers)


@pytest.mark.parametrize(
    ("row", "column", "byte", "message"),
    [
        (1, 0, 0x84, None),
        (1, 0, 0x80, "metadata of row 1, group 0 is 0, not a pair"),
        (2, 1, 0x14, "metadata of row 2, group 3 is 0x1, not a pair"),
        (0, 2, 0x44, "metadata of row 0, group 5 is 0x4, not a pair"),  # the unused half of an odd number of groups
    ],
)
def test_metadata_is_checked(tmp_path: Path, row: int, column: int, byte: int, message: str | None) -> None:
    metadata = np.full((3, 3), 0x44, np.uint8)
    metadata[:, 2] = 0x04
    metadata[row, column] = byte
    onnx_graphs.write_packed(tmp_path / "m.onnx", np.ones((3, 10), np.float32), metadata)
    if message is None:
        swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")
        return
    with pytest.raises(CheckpointError, match=rf"m\.onnx: .*MatMul24 lin: {message}"):
        swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    values = np.ones((3, 10), np.float32)
    values[2, 7] = value
    metadata = np.full((3, 3), 0x44, np.uint8)
    metadata[:, 2] = 0x04
    onnx_graphs.write_packed(tmp_path / "m.onnx", values, metadata)
    with pytest.raises(CheckpointError, match="MatMul24 lin: a stored value is infinite or not a number"):
        swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("values", "metadata", "message"),
    [
        ((4, 8), (4, 3), r"metadata must be \(4, 2\) beside values \(4, 8\), not \(4, 3\)"),
        ((4, 8), (5, 2), r"metadata must be \(4, 2\) beside values \(4, 8\), not \(5, 2\)"),
        ((4, 7), (4, 2), r"values must be \(N, K/2\) with K a multiple of 4, not \(4, 7\)"),
        ((4, 0), (4, 0), r"values must be \(N, K/2\)"),
    ],
)
def test_shapes_are_checked(tmp_path: Path, values: tuple[int, int], metadata: tuple[int, int], message: str) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul24", ["x", "v", "m"], ["y"], domain="swiftprune", name="lin")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "c"])],
        [
            numpy_helper.from_array(np.ones(values, np.float32), "v"),
            numpy_helper.from_array(np.full(metadata, 0x44, np.uint8), "m"),
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("swiftprune", 1)]
    onnx_graphs.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match=message):
        swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")


def test_weights_must_be_initializers(tmp_path: Path) -> None:
    onnx_graphs.packed(tmp_path / "m.onnx", outputs=8, inputs=16)
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [8, 8]))
    del model.graph.initializer[0]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckpointError, match="values must be an initializer of the model"):
        swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")


def test_inputs_of_the_wrong_width(tmp_path: Path) -> None:
    onnx_graphs.packed(tmp_path / "m.onnx", outputs=8, inputs=16)
    session = swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")
    with pytest.raises(Exception, match=r"MatMul24 lin: x must be \(\.\.\., 16\), not \(1, 2, 12\)"):
        session.run(None, {"x": np.ones((1, 2, 12), np.float32)})
    with pytest.raises(Exception, match="Unexpected input data type"):
        session.run(None, {"x": np.ones((1, 2, 16), np.float64)})


def test_backends_are_chosen_out_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.onnx"
    onnx_graphs.packed(path, outputs=8, inputs=16)
    assert swiftprune.serve.onnxruntime.session(path).linears == {ISAS[0]: 1}
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")
    assert swiftprune.serve.onnxruntime.session(path).linears == {"reference": 1}
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "avx1024")
    with pytest.raises(CheckpointError, match=r"backend 'avx1024' \(SWIFTPRUNE_BACKEND\) cannot run float32 .*generic"):
        swiftprune.serve.onnxruntime.session(path)
    monkeypatch.delenv("SWIFTPRUNE_BACKEND")
    monkeypatch.setattr(native, "ONNXRUNTIME_LIBRARY", None)
    with caplog.at_level(logging.WARNING):
        assert swiftprune.serve.onnxruntime.session(path).linears == {"reference": 1}
    assert "without its native kernels" in caplog.text
    with pytest.raises(SettingsError, match="without its native kernels"):
        swiftprune.serve.onnxruntime.library()


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.onnx: no such file"):
        swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="not a readable ONNX model"):
        swiftprune.serve.onnxruntime.session(tmp_path / "m.onnx")
    weight = onnx_graphs.sparse(8, 16)
    onnx_graphs.save(onnx_graphs.linear(weight), tmp_path / "e.onnx", external=True)
    (tmp_path / "e.onnx.data").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"e\.onnx: ONNX Runtime cannot load it"):
        swiftprune.serve.onnxruntime.session(tmp_path / "e.onnx")
    with pytest.raises(CheckpointError, match=r"holds no model\.onnx; export the base model with --target onnx"):
        swiftprune.serve.onnxruntime.genai_model(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match="no genai_config"):
        swiftprune.serve.onnxruntime.genai_model(tmp_path)
    onnx_graphs.save(onnx_graphs.linear(weight), tmp_path / "e.onnx")
    session = swiftprune.serve.onnxruntime.session(tmp_path / "e.onnx")
    assert session.linears == {"dense": 1}
    with pytest.raises(CheckpointError, match="no input_ids and no logits: not an exported decoder"):
        swiftprune.serve.onnxruntime.Decoder(session)
