"""The head and embeddings of ONNX decoders in 8 and 4 bits: what is stored, what is shared, and what is left alone."""

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
from exporters.onnx.head import HeadName
from swiftprune.config import PruneSettings
from swiftprune.errors import SettingsError
from swiftprune.serve.onnxruntime import Decoder, session

INT8 = PruneSettings(calibration="none", values="int8")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer}


def dequantized(values: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    parts = values.reshape(*scales.shape, -1)
    if bits == 4:  # the first of two in the low half of a byte
        parts = np.stack([parts & 15, parts >> 4], axis=-1).reshape(*scales.shape, -1)
    centred = parts.astype(np.float32) - 2 ** (bits - 1)
    rows: np.ndarray = (centred * scales[..., None]).reshape(len(values), -1)
    return rows


@pytest.mark.parametrize(("name", "head", "bits"), [("llama-mha-untied", "int8", 8), ("llama-gqa-tied", "int4", 4)])
def test_head_and_embeddings(
    name: str, head: HeadName, bits: int, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_models(name)
    report = export(source, tmp_path / "made", INT8, target="onnx", head=None if head == "int8" else head)
    kept = export(source, tmp_path / "kept", INT8, target="onnx", head="keep")
    assert report.onnx
    assert kept.onnx
    assert (report.onnx.head, kept.onnx.head) == (head, "keep")
    weights = {key: value for path in source.glob("*.safetensors") for key, value in load_file(path).items()}
    stored = tensors_of(tmp_path / "made")
    tied = "lm_head.weight" not in weights
    for part, original in (("head", "lm_head.weight"), ("embeddings", "model.embed_tokens.weight")):
        weight = weights["model.embed_tokens.weight" if tied else original].float().numpy()
        scales = stored[f"{'head' if tied else part}.{head}.scales"]
        off = np.abs(dequantized(stored[f"{part}.{head}"], scales, bits) - weight).reshape(*scales.shape, -1)
        # A scale may be smaller than what reaches the largest weight, where that is the least square error.
        largest = np.abs(weight).reshape(*scales.shape, -1).max(-1)
        assert (off <= np.maximum(np.abs(scales) * 0.5001, 0.26 * largest if bits == 4 else 0)[..., None]).all()
        assert np.square(off).mean() < (0.003, 1e-5)[bits == 8] * np.square(weight).mean() * (4 if bits == 4 else 10)
    assert (f"embeddings.{head}.scales" in stored) is not tied
    model = onnx.load(tmp_path / "made" / "model.onnx", load_external_data=False)
    places = {
        tensor.name: tuple((entry.key, entry.value) for entry in tensor.external_data if entry.key != "checksum")
        for tensor in model.graph.initializer
        if tensor.name in (f"head.{head}", f"embeddings.{head}")
    }
    assert (places[f"head.{head}"] == places[f"embeddings.{head}"]) is tied
    # Either engine runs it, and it says so.
    made = session(tmp_path / "made" / "model.onnx")
    assert made.linears.pop("MatMulNBits") == 1
    assert "dense" not in made.linears
    tokens = np.arange(7, 30, dtype=np.int64)[None]
    logits = [Decoder(session(tmp_path / folder / "model.onnx")).step(tokens) for folder in ("made", "kept")]
    assert np.abs(logits[0] - logits[1]).max() < (0.05 if bits == 8 else 0.6) * np.abs(logits[1]).max()
    genai, linears = swiftprune.serve.onnxruntime.genai_model(tmp_path / "made", threads=1)
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
    assert any(line.startswith("The output head and the embeddings stay as they are: GPTNeoX") for line in said)
    assert "serve.onnxruntime.session(" in (tmp_path / "neox" / "README.md").read_text()
    none = PruneSettings(calibration="none")
    asked = export(tiny_models("llama-gqa-tied"), tmp_path / "asked", none, target="onnx", head="int8").onnx
    assert asked
    assert asked.head == "int8"
    with pytest.raises(
        SettingsError, match="--head int4: the output head stays as it is: GPTNeoXForCausalLM is written"
    ):
        export(tiny_models("gpt-neox"), tmp_path / "no", none, target="onnx", head="int4")
    assert not (tmp_path / "no.partial").exists()
    with pytest.raises(SettingsError, match="--head int4 is for --target onnx, not for packed"):
        export(tiny_models("llama-gqa-tied"), tmp_path / "no", none, head="int4")
