"""Rivals: files of other engines from one checkpoint, and what is said of all of them."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from exporters import export
from runtime_bench import gguf_files, plots, report, result_files, results, rivals
from runtime_bench.engines import (
    Job,
    Loaded,
    Options,
    Round,
    Scores,
    figures,
    genai_engine,
    onnxruntime_engine,
    scores,
    transformers_engine,
    worker,
)
from runtime_bench.rivals import Contestant, RivalsResult, RivalsSettings
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError
from tests import models
from tests.runtime_bench.sample_results import machine

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
IDS = torch.arange(3, 43)[None]


def saved(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_files_hold_the_same_model(tied: bool, tmp_path: Path) -> None:
    """As transformers reads them, by code of its own."""
    source = saved(tmp_path / "model", tie_word_embeddings=tied)
    gguf_files.write(source, tmp_path / "model.gguf")
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = GgufConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, quantization_config=config
    )
    with torch.inference_mode():
        assert torch.allclose(read(IDS).logits, dense(IDS).logits, atol=1e-5)
    embedding = 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    read_whole = sum(parameter.numel() * (2 if parameter.dim() > 1 else 4) for parameter in dense.parameters())
    assert gguf_files.token_bytes(tmp_path / "model.gguf") == read_whole - (0 if tied else embedding)


def test_gguf_files_of_llama_3(tmp_path: Path) -> None:
    """Frequencies are divided by factors of their own; transformers' reader leaves them out, so by hand."""
    import gguf

    gguf_files.write(saved(tmp_path / "model", rope_parameters=models.LLAMA3_ROPE), tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    # Wavelengths 2 pi 10000^(i/8): below 16 positions as they are, beyond 64 eight times as long, between in between.
    waves = 2 * np.pi * 10000 ** (np.arange(8) / 8)
    smooth = np.clip((64 / waves - 1) / 3, 0, 1)
    assert np.allclose(tensors["rope_freqs.weight"], 1 / ((1 - smooth) / 8 + smooth), rtol=1e-4)


def test_what_is_not_written_as_gguf(tmp_path: Path) -> None:
    Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)).save_pretrained(tmp_path / "qwen")
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM is not written as GGUF; known: LlamaForCausalLM"):
        gguf_files.write(tmp_path / "qwen", tmp_path / "qwen.gguf")
    yarn = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(CheckpointError, match="RoPE of type 'linear'"):
        gguf_files.write(saved(tmp_path / "yarn", rope_parameters=yarn), tmp_path / "yarn.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_scores_are_those_of_the_loss(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = transformers_engine.load(source, Options("float32", 1)).score(IDS[0].tolist())
    with torch.inference_mode():
        expected = model(IDS, labels=IDS).loss
        greedy = model(IDS).logits[0, :-1].argmax(-1)
    assert sum(found.loss) / len(found.loss) == pytest.approx(float(expected), rel=1e-5)
    assert [gap == 0 for gap in found.gap] == (greedy == IDS[0, 1:]).tolist()
    assert scores(torch.zeros(3, 8), [1, 2, 3]).loss == pytest.approx([np.log(8)] * 2)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed")
def test_llama_cpp_gives_the_answers_of_transformers(tmp_path: Path) -> None:
    from runtime_bench.engines import llamacpp_engine

    source = saved(tmp_path / "model", rope_parameters=models.LLAMA3_ROPE)
    gguf_files.write(source, tmp_path / "model.gguf")
    gguf_files.quantize(tmp_path / "model.gguf", tmp_path / "q8.gguf", "Q8_0", 1)
    options = Options("float32", 1, longest=64)
    dense = transformers_engine.load(source, options).score(IDS[0].tolist())
    for path, tolerance in ((tmp_path / "model.gguf", 0.02), (tmp_path / "q8.gguf", 0.1)):
        model = llamacpp_engine.load(path, options)
        assert np.allclose(model.score(IDS[0].tolist()).loss, dense.loss, atol=tolerance)
        arrived: list[int] = []
        answer = model.generate([IDS[0].tolist()], 8, lambda: arrived.append(1))[0]  # noqa: B023 - at once
        assert len(arrived) == len(answer) == 8
        assert max(model.score(IDS[0].tolist() + answer).gap[-8:]) < tolerance


class InProcess(AbstractContextManager["InProcess"]):
    """A worker without a process of its own, each of which takes seconds to start."""

    def __init__(self, engine: str, folder: Path, options: Options) -> None:
        self._model = importlib.import_module(f"runtime_bench.engines.{engine}_engine").load(folder, options)
        self.loaded = Loaded(self._model.engine_version, 0.1, self._model.linears)

    def __exit__(self, *_: object) -> None:
        del self._model

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return worker._tokens(self._model, prompts, new_tokens)

    def score(self, tokens: list[int]) -> Scores:
        return worker._score(self._model, tokens)

    def run(self, job: Job, prompts: list[list[int]]) -> Round:
        return figures(worker._arrivals(self._model, prompts, job.new_tokens), 1)

    def peak_memory_bytes(self) -> int:
        return 10**6


def test_rivals_end_to_end(tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With llama.cpp or without it: what is not there is said, and the others are measured."""
    monkeypatch.setattr(rivals, "Worker", InProcess)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the dog " * 400)
    model = tiny_models("llama-gqa-tied")
    export(model, tmp_path / "int4", PruneSettings(calibration="none", values="int4"), target="onnx")
    settings = RivalsSettings(prompt_tokens=8, new_tokens=4, rounds=2, threads=1, windows=1)
    found = rivals.measure(str(model), [tmp_path / "int4"], [text], tmp_path, settings)
    results.save(found, tmp_path / "rivals.json")
    assert result_files.load(tmp_path / "rivals.json").model_dump() == found.model_dump()
    by_name = {each.name: each for each in found.contestants}
    ours = [each for each in found.contestants if each.ours]
    assert len(ours) == 1
    assert all(each.void is None and len(each.tpot_ms) == 2 for each in ours)
    assert by_name["onnxruntime-genai int4"].tpot_ms
    dense = next(each for each in found.contestants if each.engine == "transformers")
    assert dense.perplexity["text.txt"] > 1
    for each in found.contestants:
        if each.engine == "llamacpp" and importlib.util.find_spec("llama_cpp") is None:
            assert each.void
            assert "llama.cpp is not installed" in each.void
        elif each.engine == "llamacpp":
            assert each.tpot_ms
    # Linears at 3.125 bits a weight, scales of a row beside that, and a tied head at 8.5, beside vectors in float32.
    linears = 3 * (64 * 64 * 2 + 32 * 64 * 2 + 64 * 160 * 3)
    assert 1.0 < ours[0].token_bytes / (linears * 3.125 / 8 + 300 * 64 * 8.5 / 8) < 1.1
    shown = rivals.markdown(found)
    assert all(each.name in shown for each in found.contestants)
    page = report.html([found], ["rivals.json"])
    assert all(each.name in page for each in found.measured)
    plots.rivals(found, tmp_path / "rivals.png")
    assert (tmp_path / "rivals.png").stat().st_size > 10_000


def contestant(name: str, token_ms: float, perplexity: float, *, ours: bool = False) -> Contestant:
    return Contestant(
        name=name,
        engine="genai",
        ours=ours,
        file_bytes=1,
        token_bytes=20_000_000,
        ttft_ms=[10 * token_ms] * 3,
        tpot_ms=[token_ms * 0.9, token_ms, token_ms * 1.3],
        perplexity={"text": perplexity},
    )


def test_what_is_said_of_rivals() -> None:
    result = RivalsResult(
        machine=machine(),
        model="m",
        threads=2,
        prompt_tokens=8,
        new_tokens=4,
        read_gb_per_s=[40.0, 50.0, 40.0],
        tokens={"text": 512},
        contestants=[
            contestant("slow|good", 9.0, 20.0),
            contestant("fast", 6.0, 22.0),
            contestant("beaten", 7.0, 23.0),
            contestant("ours", 3.0, 30.0, ours=True),
            Contestant(name="gone", engine="llamacpp", ours=False, void="no such <thing>"),
        ],
    )
    assert [each.name for each in result.front("text")] == ["ours", "fast", "slow|good"]
    assert result.overhead_ms(result.contestants[1]) == pytest.approx(6 - 0.5)
    said = rivals.markdown(result)
    assert "takes 0.50 of the time of fast, the fastest rival; a prompt 0.50" in said
    assert "slow\\|good" in said
    assert "gone was not measured: no such \\<thing>" in said
    assert "gone was not measured" in report.markdown([result])
    for text in ("2.00×", "over fast, the fastest rival of 3", "ms a token"):
        assert text in report.html([result], ["x.json"])
    assert len(list(itertools.filterfalse(lambda each: each.void, result.contestants))) == 4


def test_onnx_runtime_scores_as_it_decodes(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    export(tiny_models("llama-gqa-tied"), tmp_path / "onnx", PruneSettings(calibration="none"), target="onnx")
    options = Options("float32", 1, longest=64)
    prompt = list(range(5, 25))
    scorer = onnxruntime_engine.load(tmp_path / "onnx", options)
    answers = genai_engine.load(tmp_path / "onnx", options).generate([prompt, prompt[::-1]], 30, lambda: None)
    for given, answer in zip((prompt, prompt[::-1]), answers, strict=True):
        assert len(answer) == 30
        assert max(scorer.score(given + answer).gap[-30:]) < 1e-3
