"""`--target onnx` and `onnx-dense`, from a checkpoint to answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import swiftprune.serve.onnxruntime
from exporters import export
from exporters.onnx import check_weights
from exporters.onnx.cli import app
from exporters.onnx.decoder import build_decoder
from exporters.onnx.export import CHECK_TOKENS
from runtime_bench import demo_data
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError, FormatError, OutputError, SettingsError
from swiftprune.formats.spec import QUANTIZED, Quantized
from swiftprune.kernels import native
from swiftprune.serve.onnxruntime import Decoder
from tests import models

ROOT = Path(__file__).parent.parent.parent
NONE = PruneSettings(calibration="none")
BUILT = {"llama-mha-untied", "llama-gqa-tied", "qwen2", "qwen3"}
PROMPT = [5, 17, 42, 99, 7]


def greedy(session: Any, prompt: list[int], tokens: int) -> list[int]:
    decoder = swiftprune.serve.onnxruntime.Decoder(session)
    step = np.asarray([prompt])
    answer = []
    for _ in range(tokens):
        step = decoder.step(step)[:, -1:].argmax(-1)
        answer.append(int(step[0, 0]))
    return answer


def in_transformers(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(out[0, len(prompt) :].tolist())


def plain_session(path: Path) -> Any:
    """ONNX Runtime as everybody has it."""
    session = onnxruntime.InferenceSession(path)
    assert swiftprune.serve.onnxruntime.session(path, kernels=False).linears["reference"]
    return session


@pytest.mark.parametrize("name", models.SUPPORTED)
def test_each_architecture_answers_as_transformers(
    name: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    report = export(tiny_models(name), tmp_path / "onnx", NONE, target="onnx")
    made = report.onnx
    assert made
    assert made.builder.startswith("onnxruntime-genai" if name in BUILT else "torch.onnx")
    assert made.equal_tokens == CHECK_TOKENS
    assert made.max_logit_difference is not None
    assert made.max_logit_difference < 1e-4
    assert report.linear_bytes_after * 16 == report.linear_bytes_before * 9
    assert not (tmp_path / "onnx.partial").exists()

    path = tmp_path / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert (model.ir_version, max(opset.version for opset in model.opset_import)) == (made.ir_version, made.opset)
    assert report.bytes_after == sum(file.stat().st_size for file in path.parent.glob("model.onnx*"))
    declared = json.loads((path.parent / "config.json").read_text())["quantization_config"]
    assert (declared["quant_method"], declared["format"]) == ("swiftprune", "2:4")
    assert AutoTokenizer.from_pretrained(path.parent).vocab_size
    assert f"-> {report.bytes_after / 1e6:,.1f} MB" in (path.parent / "README.md").read_text()

    export(tiny_models(name), tmp_path / "dense", NONE, target="dense")
    expected = in_transformers(tmp_path / "dense", PROMPT, 20)
    fast = swiftprune.serve.onnxruntime.session(path)
    (backend,) = set(fast.linears) - {"dense"}
    assert backend != "reference"
    assert fast.linears[backend] == sum(node.op_type == "MatMul24" for node in model.graph.node) > 0
    assert greedy(fast, PROMPT, 20) == expected
    assert greedy(plain_session(path), PROMPT, 20) == expected


@pytest.mark.parametrize("values", QUANTIZED)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt-neox"])  # by either builder
def test_quantized_values_are_those_of_the_packed_checkpoint(
    name: str,
    values: Quantized,
    tiny_models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = PruneSettings(calibration="none", values=values)
    made = export(tiny_models(name), tmp_path / "onnx", settings, target="onnx", head="keep").onnx
    assert made
    assert made.max_logit_difference is not None
    assert made.max_logit_difference > 1e-4  # the kernels round inputs
    export(tiny_models(name), tmp_path / "packed", settings, head="keep")
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")  # which does not, nor does the function in the file
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    plain = Decoder(swiftprune.serve.onnxruntime.session(tmp_path / "onnx" / "model.onnx", kernels=False))
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits.numpy()
    assert np.abs(plain.step(np.array([PROMPT]))[:, -1] - expected[:, -1]).max() < 1e-4
    monkeypatch.delenv("SWIFTPRUNE_BACKEND")
    shards = (tmp_path / "packed").glob("*.safetensors")
    stored = {key: tensor for path in shards for key, tensor in load_file(path).items()}
    packed = [key.removesuffix("_scale") for key in stored if key.endswith("weight_scale")]
    rows = {row.numpy().tobytes() for key in packed for row in stored[key]}
    path = tmp_path / "onnx" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path).graph
    written = {tensor.name: tensor for tensor in graph.initializer if tensor.name.endswith(".values")}
    assert {row.tobytes() for tensor in written.values() for row in onnx.numpy_helper.to_array(tensor)} == rows
    session = swiftprune.serve.onnxruntime.session(path)
    assert session.linears == {f"{native.QUANT_ISAS[0]}-{values}": len(written), "dense": 1}
    declared = json.loads((path.parent / "config.json").read_text())["quantization_config"]
    assert (declared["version"], declared["values"]) == (2, values)
    assert not list(tmp_path.glob("onnx.*"))


@pytest.mark.parametrize(("name", "dtype"), [("llama-gqa-tied", "float32"), ("gpt-neox", "float16")])
def test_dense_files_are_for_tensorrt(
    name: str, dtype: Any, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = NONE.model_copy(update={"dtype": dtype})
    report = export(tiny_models(name), tmp_path / "out", settings, target="onnx-dense")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    stored = onnx.TensorProto.DataType.Value({"float32": "FLOAT", "float16": "FLOAT16"}[dtype])
    weights = {check.name: check for check in check_weights(path)}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert {check.name for check in weights.values() if check.problem is None} == pruned
    assert all(types[weight] == stored for weight in pruned)
    assert report.onnx
    assert report.onnx.equal_tokens == CHECK_TOKENS
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_values_keep_the_type_that_is_asked_for(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    for dtype, element, bits in (("float32", "FLOAT", 17), ("float16", "FLOAT16", 9)):
        settings = PruneSettings(calibration="none", method="magnitude", dtype=dtype)  # type: ignore[arg-type]
        report = export(tiny_models("gpt-neox"), tmp_path / dtype, settings, target="onnx")
        graph = onnx.load(tmp_path / dtype / "model.onnx", load_external_data=False).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.name.endswith(".values")}
        assert set(types.values()) == {onnx.TensorProto.DataType.Value(element)}
        weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
        assert report.linear_bytes_after * 8 == weights * bits


def test_an_interrupted_build_is_resumed(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("exporters.onnx.export.build_decoder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(tiny_models("qwen2"), tmp_path / "out", NONE, target="onnx")
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="--resume"):
        export(tiny_models("qwen2"), tmp_path / "out", NONE, target="onnx")
    report = export(tiny_models("qwen2"), tmp_path / "out", NONE, target="onnx", resume=True)
    assert report.onnx
    assert report.onnx.equal_tokens == CHECK_TOKENS
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_file_that_answers_otherwise_is_never_put_in_place(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path, tokens: list[int]) -> torch.Tensor:
        return torch.zeros(CHECK_TOKENS, models.VOCABULARY)

    monkeypatch.setattr("exporters.onnx.export._logits", wrong)
    with pytest.raises(FormatError, match="logits differ from the checkpoint's by"):
        export(tiny_models("qwen2"), tmp_path / "out", NONE, target="onnx")
    assert not (tmp_path / "out").exists()


def test_weights_that_the_build_changed_are_noticed(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that filled in a zero, or left a layer out, must not give a file with fewer packed layers."""

    def spoiled(checkpoint: Path, out: Path, **settings: Any) -> str:
        builder = build_decoder(checkpoint, out, **settings)
        model = onnx.load(out / "model.onnx")
        weight = next(tensor for tensor in model.graph.initializer if "down_proj" in tensor.name)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[:3, 5] = 1
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
        return builder

    monkeypatch.setattr("exporters.onnx.export.build_decoder", spoiled)
    with pytest.raises(FormatError, match=r"weights are 2:4 in the ONNX file, but .*down_proj.* has \d non-zeros"):
        export(tiny_models("qwen2"), tmp_path / "out", NONE, target="onnx")


def test_settings_that_cannot_be(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="--target onnx stores 2:4 only"):
        export(tiny_models("qwen2"), tmp_path / "out", PruneSettings(pattern="4:8", calibration="none"), target="onnx")
    with pytest.raises(SettingsError, match="k_proj stays dense"):
        export(
            tiny_models("qwen2"),
            tmp_path / "out",
            PruneSettings(calibration="none", ignore="k_proj|lm_head"),
            target="onnx",
        )
    monkeypatch.setattr("exporters.onnx.trace.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(SettingsError, match=r"onnxscript: pip install 'swiftprune\[onnx\]'"):
        export(tiny_models("qwen2"), tmp_path / "out", NONE, target="onnx")
    assert not list(tmp_path.iterdir())


def test_generation_in_onnxruntime_genai(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "onnx"
    export(tiny_models("llama-gqa-tied"), folder, NONE, target="onnx")
    monkeypatch.chdir(tmp_path)  # the kernels' library is not below it, as it is below the repository
    model, linears = swiftprune.serve.onnxruntime.genai_model("onnx", threads=1)
    assert Path.cwd() == tmp_path
    (backend,) = set(linears) - {"dense"}
    assert backend != "reference"
    assert linears == {backend: 15, "dense": 1}
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 12)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    answer = greedy(swiftprune.serve.onnxruntime.session(folder / "model.onnx"), PROMPT, 12)
    assert 1 not in answer  # where it would stop
    for token in answer:
        generator.generate_next_token()
        assert generator.get_next_tokens()[0] == token

    export(tiny_models("gpt-neox"), tmp_path / "neox", NONE, target="onnx")
    with pytest.raises(CheckpointError, match=r"has no genai_config\.json"):
        swiftprune.serve.onnxruntime.genai_model(tmp_path / "neox")


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    data = demo_data.fetch(ROOT / "build" / "demo")
    report = export(data.model, tmp_path / "onnx", NONE, target="onnx")
    assert report.onnx
    assert report.onnx.equal_tokens == CHECK_TOKENS
    # bf16 values in a file that is fp32 otherwise: 9 bits of 32 for the linears, the tied head as it was.
    assert report.bytes_after < 0.45 * 4 * 134_515_008
    session = swiftprune.serve.onnxruntime.session(tmp_path / "onnx" / "model.onnx")
    assert session.linears["dense"] == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    prompt = tokenizer.encode("The capital of France is")
    export(data.model, tmp_path / "dense", NONE, target="dense")
    answer = greedy(session, prompt, 16)
    assert answer == in_transformers(tmp_path / "dense", prompt, 16)
    run = CliRunner().invoke(app, ["generate", str(tmp_path / "onnx"), "--tokens", "16", "--threads", "1"])
    assert run.exit_code == 0, run.output
    assert run.stdout.rstrip("\n") == tokenizer.decode(answer)
    assert "linears by backend: 150 " in run.stderr
    question = [{"role": "user", "content": 'Who wrote "Emma"?'}]
    asked = tokenizer.encode(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    command = ["generate", str(tmp_path / "onnx"), "--chat", "--prompt", 'Who wrote "Emma"?', "--tokens", "8"]
    assert CliRunner().invoke(app, command).stdout.rstrip("\n") == tokenizer.decode(greedy(session, asked, 8))
