"""Checkpoints in fp8: read as transformers reads them, pruned like their plain twins, refused where damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from exporters import export
from swiftprune.checkpoints import fp8
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError
from tests import models

CONFIG = LlamaConfig(**models.SMALL | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2})
BLOCK = 32
SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"


def quantize(folder: Path, block: int | None, scale_dtype: torch.dtype = torch.float32) -> None:
    """Stores the linears of blocks in fp8, by blocks or with one scale."""
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        size = block or max(tensor.shape)
        rows, cols = (math.ceil(n / size) for n in tensor.shape)
        scales = torch.empty(rows, cols)
        values = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for col in range(cols):
                part = slice(row * size, (row + 1) * size), slice(col * size, (col + 1) * size)
                scale = (
                    2.0 ** torch.log2(tensor[part].abs().max().float() / 448).ceil()
                )  # which any type of scales holds
                scales[row, col] = scale
                values[part] = (tensor[part].float() / scale).to(torch.float8_e4m3fn)
        stored[name] = values
        stored[name + "_scale_inv"] = scales.to(scale_dtype) if block else scales.reshape(())
        stored[name.replace("weight", "activation_scale")] = torch.ones(())
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    declared = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and [block, block]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": declared}))


def edit(folder: Path, changes: dict[str, Tensor | None]) -> None:
    stored: dict[str, Tensor | None] = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "source", CONFIG)


@pytest.mark.parametrize(
    ("block", "scale_dtype"), [(BLOCK, torch.float32), (BLOCK, torch.float8_e8m0fnu), (None, torch.float32)]
)
def test_weights_are_those_of_transformers(source: Path, block: int | None, scale_dtype: torch.dtype) -> None:
    quantize(source, block, scale_dtype)
    plain = fp8.with_plain_weights(Checkpoint(source))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    read = plain.read(plain.tensors)
    for name, parameter in model.named_parameters():
        assert torch.equal(read[name], parameter), name
    assert not [name for name in plain.tensors if "scale" in name]


def test_blocks_that_end_early(source: Path) -> None:
    """Which transformers takes for other blocks: 96 rows in blocks of 64 are 64 and 32, not twice 48."""
    plain = load_file(source / "model.safetensors")
    quantize(source, 64)
    read = fp8.with_plain_weights(Checkpoint(source)).read(plain)
    for name, tensor in plain.items():
        assert (read[name] - tensor).abs().max() <= tensor.abs().max() / 8
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.weight is \(64, 96\) in fp8, no whole number of blocks"):
        export(source, source.parent / "out", PruneSettings(samples=2, seqlen=16))


@pytest.mark.parametrize("settings", [{"permute": True}, {"refine": ("distill",), "steps": 2}, {"values": "int8"}])
def test_pruned_as_its_plain_twin(source: Path, settings: dict[str, object], text_file: Path, tmp_path: Path) -> None:
    quantize(source, BLOCK)
    twin = models.write_model(tmp_path / "twin", CONFIG)
    view = fp8.with_plain_weights(Checkpoint(source))
    save_file({**view.read(view.tensors)}, twin / "model.safetensors", metadata={"format": "pt"})
    given = PruneSettings.model_validate({"calibration": str(text_file), "samples": 4, "seqlen": 32} | settings)
    for folder in (source, twin):
        export(folder, tmp_path / f"{folder.name}-out", given)
    ours, wanted = (tmp_path / f"{name}-out" for name in ("source", "twin"))
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in wanted.iterdir())
    for shard in wanted.glob("*.safetensors"):
        assert shard.read_bytes() == (ours / shard.name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, wanted)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({SCALE: None}, r"holds model.layers.0.mlp.up_proj.weight in fp8 without .*weight_scale_inv; download"),
        ({SCALE: torch.ones(3, 3)}, r"weight_scale_inv is \(3, 3\) beside a weight \(96, 64\)"),
        ({SCALE: torch.ones(3, 2, dtype=torch.int32)}, r"weight_scale_inv is I32, not F32"),
        ({SCALE: torch.full((3, 2), math.nan)}, r"weight_scale_inv holds a scale that is not finite"),
    ],
)
def test_damaged(source: Path, changes: dict[str, Tensor | None], message: str) -> None:
    quantize(source, BLOCK)
    edit(source, changes)
    with pytest.raises(CheckpointError, match=message):
        export(source, source.parent / "out", PruneSettings(calibration="none"))


def test_blocks_of_no_size(source: Path) -> None:
    quantize(source, BLOCK)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace(f"[{BLOCK}, {BLOCK}]", '["a", 0]'))
    with pytest.raises(
        CheckpointError, match=r"config.json: weight_block_size of its quantization_config is \['a', 0\]"
    ):
        export(source, source.parent / "out", PruneSettings(calibration="none"))
