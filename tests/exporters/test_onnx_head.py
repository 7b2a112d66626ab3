"""The head and embeddings of ONNX decoders in 8 bits: what is stored, what is shared, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file

import swiftprune.serve.onnxruntime
from exporters import export
from swiftprune.config import PruneSettings
from swiftprune.errors import SettingsError
from swiftprune.serve.onnxruntime import Decoder, session

INT8 = PruneSettings(calibration="none", values="int8")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer}


def dequantized(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    parts = values.reshape(*scales.shape, -1).astype(np.float32) - 128
    rows: np.ndarray = (parts * scales[..., None]).reshape(len(values), -1)
    return rows


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mha-untied"])
def test_head_and_embeddings(name: str, tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_models(name)
    report = export(source, tmp_path / "int8", INT8, target="onnx")
    kept = export(source, tmp_path / "kept", INT8, target="onnx", head="keep")
    assert report.onnx
    assert kept.onnx
    assert (report.onnx.head, kept.onnx.head) == ("int8", "keep")
    weights = {key: value for path in source.glob("*.safetensors") for key, value in load_file(path).items()}
    stored = tensors_of(tmp_path / "int8")
    tied = "lm_head.weight" not in weights
    for tensor, original in (("head.int8", "lm_head.weight"), ("embeddings.int8", "model.embed_tokens.weight")):
        weight = weights["model.embed_tokens.weight" if tied else original].float().numpy()
        scales = stored["head.int8.scales" if tied else f"{tensor}.scales"]
        off = np.abs(dequantized(stored[tensor], scales) - weight).reshape(*scales.shape, -1)
        assert (off <= scales[..., None] * 0.5001).all()
    assert ("embeddings.int8.scales" in stored) is not tied
    model = onnx.load(tmp_path / "int8" / "model.onnx", load_external_data=False)
    places = {
        tensor.name: tuple((entry.key, entry.value) for entry in tensor.external_data if entry.key != "checksum")
        for tensor in model.graph.initializer
        if tensor.name in ("head.int8", "embeddings.int8")
    }
    assert (places["head.int8"] == places["embeddings.int8"]) is tied
    # Either engine runs it, and it says so.
    made = session(tmp_path / "int8" / "model.onnx")
    assert made.linears.pop("MatMulNBits") == 1
    assert "dense" not in made.linears
    tokens = np.arange(7, 30, dtype=np.int64)[None]
    logits = [Decoder(session(tmp_path / folder / "model.onnx")).step(tokens) for folder in ("int8", "kept")]
    assert np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[1]).max()
    genai, linears = swiftprune.serve.onnxruntime.genai_model(tmp_path / "int8", threads=1)
    assert linears["MatMulNBits"] == 1
    parameters = onnxruntime_genai.GeneratorParams(genai)
    parameters.set_search_options(max_length=12)
    generator = onnxruntime_genai.Generator(genai, parameters)
    generator.append_tokens([5, 6, 7])
    generator.generate_next_token()


def test_what_keeps_its_head(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """Files that other runtimes run, and 16-bit values unless it is asked for."""
    said: list[str] = []
    neox = export(tiny_models("gpt-neox"), tmp_path / "neox", INT8, target="onnx", notify=said.append).onnx
    assert neox
    assert neox.head == "keep"
    assert any(line.startswith("The output head stays in float32: torch.onnx") for line in said)
    assert "serve.onnxruntime.session(" in (tmp_path / "neox" / "README.md").read_text()
    none = PruneSettings(calibration="none")
    plain = export(tiny_models("llama-gqa-tied"), tmp_path / "plain", none, target="onnx").onnx
    asked = export(tiny_models("llama-gqa-tied"), tmp_path / "asked", none, target="onnx", head="int8").onnx
    assert plain
    assert asked
    assert (plain.head, asked.head) == ("keep", "int8")
    with pytest.raises(SettingsError, match="--head int8 is for --target onnx, not for packed"):
        export(tiny_models("llama-gqa-tied"), tmp_path / "no", none, head="int8")
