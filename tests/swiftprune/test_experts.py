"""Mixtures of experts and GPT-2: linears against transformers' own modules, from calibration to the packed model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from exporters import export
from swiftprune.calibration.runner import BlockRunner
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings
from swiftprune.errors import SettingsError
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import unpack
from swiftprune.models.experts import Experts, separate_experts
from swiftprune.models.plan import empty_model, find_targets
from tests import arch_sweep, models

_SMALL = models.SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 2}
_QWEN = _SMALL | models.QWEN_EXPERTS | {"moe_intermediate_size": 32}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(**_QWEN, head_dim=16, mlp_only_layers=[0]),
    "qwen2-moe": Qwen2MoeConfig(**_QWEN, shared_expert_intermediate_size=32),
    "deepseek-v3": DeepseekV3Config(
        **_SMALL | {"num_key_value_heads": 4},
        **models.DEEPSEEK_EXPERTS,
        moe_intermediate_size=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    ),
    "gpt-oss": GptOssConfig(**_SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "llama4": Llama4TextConfig(
        **_SMALL, head_dim=16, intermediate_size_mlp=96, num_local_experts=4, interleave_moe_layer_step=1
    ),
    "longcat": LongcatFlashConfig(
        **{key: value for key, value in models.SMALL.items() if key not in ("num_hidden_layers", "intermediate_size")},
        num_layers=1,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=32,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=3,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=16,
    ),
}
STACKED = ("gpt-oss", "llama4")
EXPERTS = {"qwen2-moe": 48, "longcat": 12}
"""Linears of experts, where they are not 24."""
GPT2 = {"gpt2": GPT2Config(vocab_size=models.VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256)}
TOKENS = torch.arange(2, 50).reshape(2, 24) * 5 % models.VOCABULARY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("experts")

    def written(name: str) -> Path:
        path = folder / name
        return path if path.exists() else models.write_model(path, (CONFIGS | GPT2)[name])

    return written


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_separate_experts_answer_as_stacked_ones(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint(name))
    before = logits(model)
    weights = {p.untyped_storage().data_ptr() for key, p in model.named_parameters() if "experts" in key}
    parts = separate_experts(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert before.std() > 0.1
    assert parts.keys() == {key for key, _ in model.named_parameters()} - {
        key for key, _ in load(checkpoint(name)).named_parameters()
    }
    held = [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]
    assert all(parameter.is_contiguous() for parameter in held)
    if name not in STACKED:  # gate and up interleaved, or transposed
        assert {p.untyped_storage().data_ptr() for p in held} <= weights


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_experts_answer_as_the_same_weights_in_place(
    name: str, checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "reference")
    settings = PruneSettings(calibration=str(text_file), samples=4, seqlen=32)
    report = export(checkpoint(name), tmp_path / "packed", settings)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == EXPERTS.get(name, 24)
    assert all(layer.sparsity >= 0.5 and layer.output_error is not None for layer in experts)
    assert not any(dense.endswith((".gate", ".router")) for dense in (layer.name for layer in report.layers))
    packed = load(tmp_path / "packed")
    assert sum(isinstance(module, Linear24) for module in packed.modules()) == len(report.layers)
    if name not in STACKED:
        assert Checkpoint(tmp_path / "packed").tensors.keys() >= Checkpoint(checkpoint(name)).tensors.keys()
    dense = models.masked_twin(checkpoint(name), packed, [layer.name for layer in report.layers])
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-5, atol=1e-5)


def test_experts_stored_the_other_way_round(tmp_path: Path) -> None:
    """As Qwen3-VL-MoE is on the hub: (experts, in, out), where the model and what it saves has (experts, out, in)."""
    config = arch_sweep.small_config("qwen3_vl_moe")
    config.get_text_config().moe_intermediate_size = 48  # so that no weight is square
    usual, turned = (models.write_model(tmp_path / name, config) for name in ("usual", "turned"))
    stored = load_file(turned / "model.safetensors")
    stacked = [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(stacked) == 4
    for name in stacked:
        stored[name] = stored[name].mT.contiguous()
    save_file(stored, turned / "model.safetensors", metadata={"format": "pt"})
    for folder in (usual, turned):
        export(folder, tmp_path / f"{folder.name}-out", PruneSettings(calibration="none"))
    for shard in (tmp_path / "usual-out").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "turned-out" / shard.name).read_bytes()


def test_what_was_exported_saves_and_loads_again(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    export(checkpoint("mixtral"), tmp_path / "a", PruneSettings(calibration="none", values="int8"))
    first = load(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    assert Checkpoint(tmp_path / "b").tensors.keys() == Checkpoint(tmp_path / "a").tensors.keys()
    assert torch.equal(logits(load(tmp_path / "b")), logits(first))


def test_zeros_in_place_load_in_transformers_as_it_is(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    none = PruneSettings(calibration="none")
    export(checkpoint("qwen3-moe"), tmp_path / "dense", none, target="dense")
    export(checkpoint("qwen3-moe"), tmp_path / "packed", none)
    torch.testing.assert_close(
        logits(load(tmp_path / "dense")), logits(load(tmp_path / "packed")), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(SettingsError, match=r"stacks experts .* --target packed"):
        export(checkpoint("gpt-oss"), tmp_path / "no", none, target="dense")


def test_gpt2_is_pruned_along_its_inputs(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """Its checkpoints store weights as (in, out); what is packed is (out, in), the bias where it was."""
    settings = PruneSettings(calibration=str(text_file), samples=4, seqlen=32)
    report = export(checkpoint("gpt2"), tmp_path / "packed", settings)
    assert {layer.kind for layer in report.layers} == {"c_attn", "c_proj", "c_fc"}
    packed, dense = load(tmp_path / "packed"), load(checkpoint("gpt2"))
    for layer in report.layers:
        weight = unpack(packed.get_submodule(layer.name).packed)
        assert (weight.view(len(weight), -1, 4) != 0).sum(-1).max() == 2
        dense.get_submodule(layer.name).weight.data = weight.T
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-3, atol=1e-3)
    with pytest.raises(SettingsError, match=r"weights as \(in, out\)"):
        export(checkpoint("gpt2"), tmp_path / "no", settings, target="dense")


def test_each_expert_sees_what_is_routed_to_it(checkpoint: Callable[[str], Path]) -> None:
    """Sums of squares against the stacked model: its inputs of experts and its router's choice, token by token."""
    source = Checkpoint(checkpoint("qwen3-moe"))
    stacked = load(checkpoint("qwen3-moe"))
    seen: list[tuple[Tensor, Tensor]] = []
    stacked.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    logits(stacked)
    inputs, chosen = torch.cat([x for x, _ in seen]), torch.cat([c for _, c in seen])
    model, source = empty_model(source)
    targets = find_targets(model, source, ignore="lm_head", group=4)
    runner = BlockRunner(model, source, targets, TOKENS)
    for block in targets.blocks:
        with runner.block(block):
            stats = runner.collect(block, "input_sq_sum", lambda: None, advance=True)
    starved = set()
    for expert in range(8):
        routed = (chosen == expert).any(dim=1)
        found = stats[f"model.layers.1.mlp.experts.{expert}.up_proj"]
        assert found.input_sq_sum is not None
        starved |= {found.on_all_tokens}
        assert found.on_all_tokens == (int(routed.sum()) < 64 / 4)
        taken = inputs if found.on_all_tokens else inputs[routed]
        assert found.token_count == len(taken)
        torch.testing.assert_close(found.input_sq_sum, taken.square().sum(0), rtol=1e-3, atol=1e-3)
    assert starved == {False, True}


def test_drift_is_between_the_same_tokens(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens that the dense model routes to an expert, wherever they go once blocks before it are pruned."""
    monkeypatch.setattr("swiftprune.calibration.runner._SHARE_OF_INPUTS", 0.0)  # however few
    model, source = empty_model(Checkpoint(checkpoint("mixtral")))
    targets = find_targets(model, source, ignore="lm_head", group=4)
    counts = []
    for drifted in (False, True):
        runner = BlockRunner(model, source, targets, TOKENS, track_dense=True)
        for block in targets.blocks:
            with runner.block(block):
                stats = runner.collect(block, "drift", lambda: None)
                lost = {f"{block.name}.self_attn.o_proj.weight": torch.zeros(64, 64)}
                runner.advance(block, lost if drifted else {}, lambda: None)
        experts = {name: found for name, found in stats.items() if name.endswith(".w1")}
        counts.append({name: found.token_count for name, found in experts.items()})
        drift = [found.input_drift for found in experts.values()]
        assert all(each is not None and bool(each.abs().max() > 1e-2) == drifted for each in drift)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 2 * TOKENS.numel()


def test_stacked_experts_are_resumed(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    def stop_after_block_one(stage: str, done: float, total: float) -> None:
        if stage == "prune" and done / total > 0.6:
            raise KeyboardInterrupt

    settings = PruneSettings(calibration=str(text_file), samples=4, seqlen=32)
    export(checkpoint("gpt-oss"), tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint("gpt-oss"), tmp_path / "out", settings, progress=stop_after_block_one)
    export(checkpoint("gpt-oss"), tmp_path / "out", settings, resume=True)
    whole, out = Checkpoint(tmp_path / "whole"), Checkpoint(tmp_path / "out")
    assert whole.tensors == out.tensors
    for name, tensor in whole.read(whole.tensors).items():
        assert torch.equal(tensor, out.read([name])[name]), name


def test_experts_are_not_permuted(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("mixtral", "qwen3-moe"):
        with pytest.raises(SettingsError, match="--permute: the permutations of experts are not known"):
            export(checkpoint(name), tmp_path / "out", PruneSettings(permute=True))


def test_starved_experts_are_named(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=2, seqlen=24)
    export(checkpoint("qwen2-moe"), tmp_path / "out", settings, notify=said.append)
    (line,) = [text for text in said if "too few calibration tokens" in text]
    layers = json.loads((tmp_path / "out" / "swiftprune.json").read_text())["layers"]
    named = {layer["name"].rpartition(".")[0] for layer in layers if layer["on_all_tokens"]}
    assert f"tokens: {len(named)}, first {min(named)}" in line
    assert 0 < len(named) < 16


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("more", [{"refine": ("blocks",)}, {"refine": ("distill",), "steps": 3, "values": "int4"}])
def test_experts_are_trained(
    name: str, more: dict[str, Any], checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    settings = PruneSettings(calibration=str(text_file), samples=4, seqlen=32, method="wanda", **more)
    report = export(checkpoint(name), tmp_path / "out", settings)
    assert report.check
    assert report.check.ratio < 20
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()
