"""Norms that take over part of what makes inputs differ, before weights are rounded to 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, PhiConfig

from exporters import export
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.formats.spec import METADATA_SUFFIX, SCALE_SUFFIX, Packed24
from swiftprune.kernels.packing import unpack
from swiftprune.methods.rounding import round_kept
from swiftprune.stages.equalize import wanted_scale
from tests import models

_SIZE = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GEMMA = GemmaConfig(**_SIZE, num_key_value_heads=2, head_dim=8)
PHI = PhiConfig(**_SIZE)


def with_other_norms(folder: Path) -> Path:
    """The model with norms, and so inputs, that differ; of a fresh one they are all alike."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).mul(1.5).exp())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama-gqa-tied", "gpt-neox", "gemma"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = GEMMA if request.param == "gemma" else models.SUPPORTED[request.param]
    return with_other_norms(models.write_model(tmp_path / request.param, config))


def exported(model: Path, text: Path, **settings: object) -> Callable[[str], Tensor]:
    """What an export stores, by tensor: weights with zeros in place."""
    out = model.parent / f"{model.name}-{len(list(model.parent.iterdir()))}"
    common = {"method": "magnitude", "refine": ("weights",), "calibration": str(text), "samples": 8, "seqlen": 32}
    export(model, out, PruneSettings(**common | settings), check=False)  # type: ignore[arg-type]
    checkpoint = Checkpoint(out)

    def read(name: str) -> Tensor:
        parts = [each for each in (name, name + METADATA_SUFFIX, name + SCALE_SUFFIX) if each in checkpoint.tensors]
        found = [checkpoint.read([each])[each] for each in parts]
        return (unpack(Packed24(*found)) if len(found) > 1 else found[0]).float()

    return read


def test_what_norms_lose_their_linears_gain(model: Path, text_file: Path) -> None:
    """Of the first block, whose inputs are the dense model's: norms that only scale, have biases, or add one."""
    dense = Checkpoint(model)
    rounded, exact = exported(model, text_file, values="int4"), exported(model, text_file)
    names = [name for name in dense.tensors if ".layers.0." in name and "norm" in name and name.endswith("weight")]
    fed = {
        "input_layernorm": ("q_proj", "k_proj", "v_proj", "query_key_value"),
        "post_attention_layernorm": ("gate_proj", "up_proj", "dense_h_to_4h"),
    }
    offset = 1 if model.name == "gemma" else 0
    seen = 0
    for norm in names:
        before = dense.read([norm])[norm].float() + offset
        scale = before / (rounded(norm) + offset)
        assert scale.max() > 1.5 * scale.min()
        bias = norm.replace("weight", "bias")
        if bias in dense.tensors:
            torch.testing.assert_close(rounded(bias) * scale, dense.read([bias])[bias].float(), rtol=0.01, atol=1e-6)
        for name in dense.tensors:
            if ".layers.0." in name and name.split(".")[-2] in fed[norm.split(".")[-2]] and name.endswith("weight"):
                wanted, got = exact(name), rounded(name) / scale
                assert (got - wanted).norm() < 0.2 * wanted.norm(), name
                assert (got - wanted).norm() < 0.7 * (rounded(name) - wanted).norm(), name
                seen += 1
    assert (len(names), seen) == ((2, 2) if model.name == "gpt-neox" else (2, 5))


def test_norms_that_feed_others_stay_as_they_are(text_file: Path, tmp_path: Path) -> None:
    """Phi's norm feeds attention and MLP: what is not pruned is not scaled, nor what may be dense again."""
    model = with_other_norms(models.write_model(tmp_path / "model", PHI))
    norm = "model.layers.0.input_layernorm.weight"
    before = Checkpoint(model).read([norm])[norm].float()
    cases: list[tuple[dict[str, object], bool]] = [
        ({}, True),
        ({"ignore": "lm_head|.*fc1"}, False),
        ({"max_perplexity_ratio": 100.0}, False),
        ({"values": "int8"}, False),
    ]
    for settings, changed in cases:
        stored = exported(model, text_file, **{"values": "int4"} | settings)
        assert torch.equal(stored(norm), before) is not changed, settings


def test_it_lowers_the_error_of_outputs() -> None:
    """Of inputs whose sizes are as different as they are in models."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp(1.2 * torch.randn(256, generator=generator))
    inputs = torch.randn(2000, 24, generator=generator) @ torch.randn(24, 256, generator=generator) * sizes
    inputs += 0.1 * sizes * torch.randn(2000, 256, generator=generator)
    weight = torch.randn(64, 256, generator=generator)
    mask = torch.arange(256).expand(64, -1) % 4 < 2
    weight *= mask
    gram = inputs.T @ inputs
    scale = wanted_scale(gram)
    assert float(scale.log().mean().abs()) < 1e-3
    plain = unpack(round_kept(weight, mask, gram, "int4"))
    scaled = unpack(round_kept(weight * scale, mask, gram / (scale[:, None] * scale), "int4")) / scale
    errors = [float((inputs @ (got - weight).T).norm()) for got in (scaled, plain)]
    assert errors[0] < 0.9 * errors[1]
