"""Pruned encoders and vision models as ONNX files, against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

import swiftprune
import swiftprune.serve.onnxruntime
from exporters.onnx import export_module
from swiftprune.errors import CheckpointError, FormatError


class Outputs(nn.Module):
    """A transformers model with its outputs as a tuple."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


def bert() -> tuple[nn.Module, Callable[[int], Any]]:
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = Outputs(BertModel(config, add_pooling_layer=False), "input_ids", "attention_mask")

    def batch(rows: int) -> Any:
        mask = torch.ones(rows, 12, dtype=torch.int64)
        mask[0, 8:] = 0
        return torch.randint(0, 100, (rows, 12)), mask

    return model, batch


def vit() -> tuple[nn.Module, Callable[[int], Any]]:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return Outputs(ViTModel(config, add_pooling_layer=False), "pixel_values"), lambda rows: torch.randn(rows, 3, 16, 16)


def resnet() -> tuple[nn.Module, Callable[[int], Any]]:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Outputs(model, "pixel_values"), lambda rows: torch.randn(rows, 3, 16, 16)


MODELS = {"bert": bert, "vit": vit, "resnet": resnet}


def answers(session: Any, inputs: Any) -> np.ndarray[Any, Any]:
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    feeds = {value.name: array.numpy() for value, array in zip(session.get_inputs(), values, strict=True)}
    found: np.ndarray[Any, Any] = session.run(None, feeds)[0]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [True, False])
def test_models_answer_as_in_torch(name: str, packed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batch = MODELS[name]()
    report = swiftprune.prune_module(module, [batch(3) for _ in range(2)])
    out = tmp_path / "model.onnx"
    made = export_module(module, batch(2), out, packed=packed)
    onnx.checker.check_model(str(out), full_check=True)

    # Every weight that was pruned is 2:4 in the file, along the axis that is summed over.
    pruned = {f"{layer.name}.weight": layer.shape for layer in report.layers}
    convolutions = {key for key, shape in pruned.items() if len(shape) > 2}
    assert len(made.packed) + len(made.zeros_in_place) == len(pruned)
    assert set(made.packed) == (pruned.keys() - convolutions if packed else set())
    assert not set(made.dense) & pruned.keys()

    # With another batch size, in ONNX Runtime alone and on our kernels.
    inputs = batch(5)
    with torch.no_grad():
        expected = module.eval()(*inputs if isinstance(inputs, tuple) else (inputs,)).numpy()
    fast = swiftprune.serve.onnxruntime.session(out)
    for session in (onnxruntime.InferenceSession(out), fast):
        assert np.allclose(answers(session, inputs), expected, rtol=1e-4, atol=1e-4)
    if made.packed:
        (backend,) = set(fast.linears) - {"dense"}
        assert backend != "reference"
        assert fast.linears[backend] == len(made.packed)


def test_the_training_flag_stays(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    module[1].eval()
    swiftprune.prune_module(module)
    made = export_module(
        module, torch.randn(2, 8), tmp_path / "m.onnx", input_names=["pixels"], output_names=["scores"]
    )
    assert module.training
    assert [child.training for child in module] == [True, False]
    assert made.packed == {"0.weight": (8, 8)}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [session.get_inputs()[0].name, session.get_outputs()[0].name] == ["pixels", "scores"]


def test_keyword_inputs(tmp_path: Path) -> None:
    module = MODELS["bert"]()[0].get_submodule("model")
    swiftprune.prune_module(module)
    example = {"input_ids": torch.randint(0, 100, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    export_module(module, example, tmp_path / "m.onnx", output_names=["states"])
    assert {value.name for value in onnxruntime.InferenceSession(tmp_path / "m.onnx").get_inputs()} == set(example)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    class Loops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while x.sum() > 0:
                x = x - 1
            return x

    with pytest.raises(CheckpointError, match=r"torch\.onnx cannot export Loops: "):
        export_module(Loops(), torch.randn(2, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_answers_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(8, 8)
    swiftprune.prune_module(module)
    monkeypatch.setattr("exporters.onnx.module._TOLERANCE", -1.0)
    with pytest.raises(FormatError, match="its outputs differ from the module's by"):
        export_module(module, torch.randn(2, 8), tmp_path / "m.onnx")
