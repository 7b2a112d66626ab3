"""Adapters of peft over packed weights: the answers of the dense twin with the same adapter, and a step of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporters import export
from swiftprune.config import PruneSettings
from swiftprune.kernels.linear import Linear24

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def twins(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pruned model, stored packed and stored dense."""
    root = tmp_path_factory.mktemp("twins")
    for target in ("packed", "dense"):
        export(tiny_models("qwen2"), root / target, PruneSettings(calibration="none", dtype="float32"), target=target)
    return {target: root / target for target in ("packed", "dense")}


def adapted(folder: Path, targets: Any) -> Any:
    """The model with an adapter of random numbers, the same for every model of its shape."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "named"])
def test_answers_are_those_of_the_dense_twin(twins: dict[str, Path], targets: Any) -> None:
    packed, dense = (adapted(twins[name], targets) for name in ("packed", "dense"))
    wrapped = [module for module in packed.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(wrapped) == (21 if targets == "all-linear" else 6)
    assert all(isinstance(module.base_layer, Linear24) for module in wrapped)
    with torch.no_grad():
        ours, theirs = packed(TOKENS).logits, dense(TOKENS).logits
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
        with packed.disable_adapter(), dense.disable_adapter():
            plain = packed(TOKENS).logits
            assert torch.allclose(plain, dense(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert (ours - plain).norm() > 0.1 * plain.norm()


def test_training_takes_the_steps_of_the_dense_twin(twins: dict[str, Path], tmp_path: Path) -> None:
    trained: list[dict[str, Tensor]] = []
    for name in ("packed", "dense"):
        model = adapted(twins[name], "all-linear")
        before = {key: value.clone() for key, value in model.state_dict().items() if "lora_" not in key}
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adam = torch.optim.SGD(parameters, lr=0.01)  # larger steps enlarge rounding
        for _ in range(2):
            model(TOKENS, labels=TOKENS).loss.backward()
            adam.step()
            adam.zero_grad()
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        trained.append({key: value for key, value in after.items() if "lora_" in key})
        model.save_pretrained(tmp_path / name)
    packed, dense = trained
    assert packed.keys() == dense.keys()
    for key, value in packed.items():
        assert torch.allclose(value, dense[key], atol=1e-4, rtol=1e-3), key
    base = AutoModelForCausalLM.from_pretrained(twins["packed"])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "packed")
    for key, value in loaded.state_dict().items():
        if "lora_" in key:
            assert torch.equal(value, packed[key])


def test_merging_into_packed_weights_is_refused(twins: dict[str, Path]) -> None:
    """A merged weight is not sparse."""
    model = adapted(twins["packed"], "all-linear")
    with pytest.raises(RuntimeError):
        model.merge_and_unload()
