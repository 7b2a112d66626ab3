"""The ONNX Runtime engine, on a hand-made decoder whose every answer can be worked out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime_bench.engines import Options
from runtime_bench.engines.onnxruntime_engine import load
from swiftprune.errors import CheckpointError

VOCABULARY = 50
OPTIONS = Options("float32", 1)


def _decoder(folder: Path, *, packed: int = 0, rename: str = "logits", width: int | str = 1) -> Path:
    """The next token is that token plus the sum of all before it and its position, modulo the vocabulary."""

    def constant(name: str, value: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value), name)

    nodes = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "axes"], ["entry"]),  # (B, 1, T, 1)
        helper.make_node("Concat", ["past_key_values.0.key", "entry"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "entry"], ["present.0.value"], axis=2),
        helper.make_node("ReduceSum", ["present.0.key", "all"], ["sums"], keepdims=0),  # (B,)
        helper.make_node("Cast", ["sums"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["whole", "last"], ["column"]),  # (B, 1)
        helper.make_node("Add", ["input_ids", "column"], ["moved"]),
        helper.make_node("Add", ["moved", "position_ids"], ["placed"]),
        helper.make_node("ReduceSum", ["attention_mask", "last"], ["seen"], keepdims=1),
        helper.make_node("Add", ["placed", "seen"], ["next"]),
        helper.make_node("Mod", ["next", "size"], ["token"]),
        helper.make_node("OneHot", ["token", "size", "levels"], [rename]),
        *(helper.make_node("MatMul24", ["floats"], [f"unused{index}"], domain="swiftprune") for index in range(packed)),
    ]
    cache = ["batch", 1, "past", width]
    grown = ["batch", 1, "total", width]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [
            *(
                helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", size])
                for name, size in (("input_ids", "length"), ("attention_mask", "total"), ("position_ids", "length"))
            ),
            *(
                helper.make_tensor_value_info(f"past_key_values.0.{name}", TensorProto.FLOAT, cache)
                for name in ("key", "value")
            ),
        ],
        [
            helper.make_tensor_value_info(rename, TensorProto.FLOAT, ["batch", "length", VOCABULARY]),
            *(
                helper.make_tensor_value_info(f"present.0.{name}", TensorProto.FLOAT, grown)
                for name in ("key", "value")
            ),
        ],
        [
            constant("axes", [1, 3]),
            constant("all", [1, 2, 3]),
            constant("last", [1]),
            constant("size", np.int64(VOCABULARY)),
            constant("levels", np.array([0, 1], np.float32)),
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("swiftprune", 1)]
    functions = [
        helper.make_function(
            "swiftprune", "MatMul24", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], opsets[:1]
        )
    ]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder


def _expected(prompt: list[int], new_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append((tokens[-1] + sum(tokens) + (len(tokens) - 1) + len(tokens)) % VOCABULARY)
    return tokens[len(prompt) :]


def test_greedy_decoding_with_the_cache(tmp_path: Path) -> None:
    model = load(_decoder(tmp_path), OPTIONS)
    prompts = [[3, 1, 4], [27, 18, 2]]
    arrived: list[None] = []
    answers = model.generate(prompts, 6, lambda: arrived.append(None))
    assert answers == [_expected(prompt, 6) for prompt in prompts]
    assert len(arrived) == 6
    assert model.linears == {}


def test_packed_weights_without_kernels_are_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")
    assert load(_decoder(tmp_path, packed=3), OPTIONS).linears == {"reference": 3}


def test_what_is_no_decoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.onnx is missing"):
        load(tmp_path, OPTIONS)
    with pytest.raises(CheckpointError, match="no logits: not an exported decoder"):
        load(_decoder(tmp_path, rename="probabilities"), OPTIONS)
    with pytest.raises(CheckpointError, match=r"leaves the heads or their width open in past_key_values\.0\.key"):
        load(_decoder(tmp_path, width="width"), OPTIONS)
