"""The block-sequential pipeline against naive implementations that run the whole model for every block."""

from __future__ import annotations

import copy
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPTJConfig,
    GraniteConfig,
    MambaConfig,
    OPTConfig,
    Starcoder2Config,
)

from exporters import export
from swiftprune.calibration.data import CalibrationData, calibration_data
from swiftprune.calibration.runner import BlockRunner
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.compute import Compute
from swiftprune.config import PruneSettings, make_settings
from swiftprune.errors import CheckpointError, FormatError, SettingsError, TextError
from swiftprune.formats.spec import Packed24
from swiftprune.kernels.packing import unpack
from swiftprune.methods import least_squares
from swiftprune.methods.mask import Pattern
from swiftprune.methods.pairs import keep_pairs
from swiftprune.methods.sparsegpt import sparsegpt
from swiftprune.methods.statistics import Needs
from swiftprune.models.plan import empty_model, find_targets
from swiftprune.progress import no_progress
from swiftprune.stages import distill, refine_blocks
from swiftprune.stages import prune as prune_stage
from swiftprune.stages.context import Run
from swiftprune.stages.distill import Distillation
from swiftprune.stages.run import prune, stream_blocks
from swiftprune.stages.store import MemoryStore
from tests import models
from tests.swiftprune.test_least_squares import best_values, objective

BLOCK_LISTS = {"gpt-neox": "gpt_neox.layers"}


def naive_wanda(weight: Tensor, inputs: Tensor) -> Tensor:
    """Sorts every group by |w| ||x||, as the paper says, in float64."""
    metric = weight.double().abs() * inputs.double().norm(dim=0)
    groups = metric.view(weight.shape[0], -1, 4)
    lowest = groups.argsort(dim=-1, descending=True, stable=True)[..., 2:]
    return weight.masked_fill(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, lowest, True).view_as(weight), 0)


def naive_sparsegpt(weight: Tensor, inputs: Tensor) -> Tensor:
    """OBS column by column with the inverse of the remaining Hessian computed outright each time, in float64."""
    w = weight.double().clone()
    hessian = inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(len(hessian))]
    for i in range(w.shape[1]):
        if i % 4 == 0:
            saliency = torch.stack([w[:, j] ** 2 / inverses[j][0, 0] for j in range(i, i + 4)], dim=1)
            keep = torch.zeros_like(saliency, dtype=torch.bool)
            keep.scatter_(1, saliency.topk(2, dim=1).indices, True)
        error = torch.where(keep[:, i % 4], 0, w[:, i]) / inverses[i][0, 0]
        w[:, i:] -= error[:, None] * inverses[i][0]
        w[:, i] = torch.where(keep[:, i % 4], w[:, i], 0)
    return w.float()


HYBRID: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}


def catch(inputs: dict[nn.Linear, list[Tensor]], module: nn.Linear, args: tuple[Tensor]) -> None:
    inputs.setdefault(module, []).append(args[0].flatten(0, -2))


def naive_prune(model: Any, block: Any, tokens: Tensor, method: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Runs the whole model as it is now, catches the inputs of the block's linears and prunes them."""
    inputs: dict[nn.Linear, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(functools.partial(catch, inputs))
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    for module, rows in inputs.items():
        module.weight.data = method(module.weight.data, torch.cat(rows))


@pytest.mark.parametrize(
    "name", ["llama-mha-untied", "llama-gqa-tied", "gpt-neox", "qwen2", "qwen3", "mistral-sliding"]
)
@pytest.mark.parametrize(
    ("method", "naive", "tolerance"), [("wanda", naive_wanda, 0.0), ("sparsegpt", naive_sparsegpt, 2e-3)]
)
def test_pipeline_equals_a_naive_run_of_the_whole_model(
    name: str,
    method: str,
    naive: Callable[[Tensor, Tensor], Tensor],
    tolerance: float,
    text_file: Path,
    tmp_path: Path,
) -> None:
    folder = models.write_model(tmp_path / "model", models.SUPPORTED[name], torch.float32)
    settings = PruneSettings(method=method, calibration=str(text_file), samples=6, seqlen=48, seed=4)
    tokens = calibration_data(
        str(text_file), Checkpoint(folder), samples=6, seqlen=48, seed=4, progress=no_progress
    ).tokens
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = reference.get_submodule(BLOCK_LISTS.get(name, "model.layers"))

    compared = 0
    for block, done in zip(blocks, stream_blocks(Run(Checkpoint(folder), settings)), strict=True):
        naive_prune(reference, block, tokens, naive)
        for key, packed in done.weights.items():
            assert isinstance(packed, Packed24)
            parameter = reference.get_parameter(key)
            got, want = unpack(packed), parameter.data
            # Rounding may settle a near tie the other way; SparseGPT's updates then change the rest of that row.
            alike = ((got == 0) == (want == 0)).all(dim=1)
            assert alike.float().mean() >= 0.95, key
            assert float((got[alike] - want[alike]).norm()) <= tolerance * float(want[alike].norm()), key
            parameter.data = got  # so that a tie does not change the inputs of later blocks
            compared += 1
    linears = sum(isinstance(module, nn.Linear) for module in reference.modules()) - 1  # lm_head
    assert compared == linears > 0


@pytest.mark.parametrize(
    ("config", "blocks", "dense"),
    [
        # Their blocks return a tuple, which the model takes apart.
        (GPTJConfig(vocab_size=300, n_embd=64, n_layer=2, n_head=4, rotary_dim=8), "transformer.h", []),
        (
            BambaConfig(
                **HYBRID,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=128,
                attn_layer_indices=[1],
                mamba_n_heads=8,
                mamba_d_head=16,
                mamba_d_state=16,
                mamba_n_groups=1,
            ),
            "model.layers",
            [],
        ),
        # It multiplies by the weight of dt_proj itself.
        (MambaConfig(**HYBRID, state_size=16), "backbone.layers", ["dt_proj"]),
    ],
    ids=["gptj", "bamba", "mamba"],
)
def test_blocks_of_other_kinds_are_calibrated_and_served_alike(
    config: Any, blocks: str, dense: list[str], text_file: Path, tmp_path: Path
) -> None:
    folder = models.write_model(tmp_path / "model", config, torch.float32)
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=4, seqlen=48)
    report = export(folder, tmp_path / "out", settings)
    tokens = calibration_data(
        str(text_file), Checkpoint(folder), samples=4, seqlen=48, seed=0, progress=no_progress
    ).tokens
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for block in reference.get_submodule(blocks):
        naive_prune(reference, block, tokens, naive_wanda)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, reference(tokens).logits, rtol=2e-2, atol=2e-2)
    inside = {name.rpartition(".")[2] for name in report.dense_linears if name.startswith(blocks)}
    assert sorted(inside) == dense


def test_a_model_that_changes_hidden_states_between_its_blocks_is_refused(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    """Calibrated from block to block, it would be pruned on inputs that it never has."""
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=4, seqlen=16)
    pipeline = Run(Checkpoint(tiny_models("llama-gqa-tied")), settings)
    second = pipeline.model.get_submodule("model.layers.1")
    second.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM: cannot be calibrated .*layers\.1 is not given what"):
        list(stream_blocks(pipeline))


def record_inputs(model: Any, block: Any, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """By name in the block, what enters its linears on `tokens`; then what enters the block and what leaves it."""
    inputs: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}

    def save(key: str, tensor: Tensor, to: dict[str, Tensor]) -> None:
        to[key] = tensor.flatten(0, -2)

    hooks = [
        module.register_forward_pre_hook(lambda module, args, key=key: save(key, args[0], inputs))
        for key, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    hooks.append(block.register_forward_pre_hook(lambda module, args: save("in", args[0], ends)))
    hooks.append(
        block.register_forward_hook(
            lambda module, args, out: save("out", out[0] if isinstance(out, tuple) else out, ends)
        )
    )
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return inputs, ends["in"], ends["out"]


def drifted_target(key: str, weight: Tensor, x: Tensor, dense_x: Tensor, lack: Tensor) -> Tensor:
    """What a linear should give: the docstrings of `least_squares` and `InputStats.drift` in words of samples."""
    wanted = dense_x.double() @ weight.double().T
    if key.rpartition(".")[2] in {"o_proj", "down_proj", "dense", "dense_4h_to_h"}:
        wanted = wanted + lack.double()
    own = x.double() @ weight.double().T
    return own + least_squares.DRIFT_SHARE * (wanted - own)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt-neox"])
@pytest.mark.parametrize("settings", [{"method": "admm"}, {"method": "wanda", "refine": ("weights",)}])
def test_weights_are_solved_for_against_the_dense_model(
    name: str, settings: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    """Whole models side by side; given the mask, the kept weights must be near the least-squares optimum."""
    folder = models.write_model(tmp_path / "model", models.SUPPORTED[name], torch.float32)
    common: dict[str, Any] = {"calibration": str(text_file), "samples": 6, "seqlen": 48}
    tokens = calibration_data(
        str(text_file), Checkpoint(folder), samples=6, seqlen=48, seed=0, progress=no_progress
    ).tokens
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sparse = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    blocks = BLOCK_LISTS.get(name, "model.layers")
    pipeline = Run(Checkpoint(folder), PruneSettings(**common, **settings))
    gained = []
    for index, done in enumerate(stream_blocks(pipeline)):
        inputs, start, _ = record_inputs(sparse, sparse.get_submodule(f"{blocks}.{index}"), tokens)
        dense_inputs, dense_start, _ = record_inputs(dense, dense.get_submodule(f"{blocks}.{index}"), tokens)
        for tensor, packed in done.weights.items():
            assert isinstance(packed, Packed24)
            key = tensor.removeprefix(f"{blocks}.{index}.").removesuffix(".weight")
            weight, got = sparse.get_parameter(tensor).data.clone(), unpack(packed)
            target = drifted_target(key, weight, inputs[key], dense_inputs[key], dense_start - start)
            x = inputs[key]

            def cost(v: Tensor, w: Tensor = weight, x: Tensor = x, y: Tensor = target) -> float:
                return float(objective(v, w, x, y).sum())

            lowest = best_values(weight, got != 0, x, target)
            plain = cost(torch.where(got != 0, weight, 0))
            assert cost(got) - cost(lowest) < 0.1 * (plain - cost(lowest)), tensor
            gained.append(1 - cost(got) / plain)
            sparse.get_parameter(tensor).data = got
    assert len(gained) > 10
    assert sum(gained) / len(gained) > 0.2


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_statistics_are_float32_whatever_multiplies(
    compute: torch.dtype, tiny_models: Callable[[str], Path], text_file: Path
) -> None:
    """Every token is in the sample here, so the sums are known; sums in bfloat16 would be off by a percent."""
    checkpoint = Checkpoint(tiny_models("llama-gqa-tied"))
    tokens = calibration_data(str(text_file), checkpoint, samples=4, seqlen=64, seed=0, progress=no_progress).tokens
    model, _ = empty_model(checkpoint)
    targets = find_targets(model, checkpoint, ignore="lm_head", group=4)
    runner = BlockRunner(model, checkpoint, targets, tokens, compute=Compute(dtype=compute), track_dense=True)
    block = targets.blocks[0]
    needs: list[Needs] = ["input_sq_sum", "group_gram", "gram", "drift"]
    for need in needs:
        with runner.block(block):
            stats = runner.collect(block, need, lambda: None)
        for name, layer in stats.items():
            assert layer.sample is not None
            x = layer.sample.double()
            gram = x.T @ x
            groups = torch.stack([gram[k : k + 4, k : k + 4] for k in range(0, len(gram), 4)])
            wanted = {"input_sq_sum": gram.diagonal(), "group_gram": groups, "gram": gram}
            for field, want in wanted.items():
                got = getattr(layer, field)
                if got is not None:
                    assert got.dtype == torch.float32
                    assert (got - want).norm() < 1e-5 * want.norm(), (name, field)
            assert (layer.channel_energy - gram.diagonal()).norm() < 1e-5 * gram.diagonal().norm()


def test_one_pass_calibrates_on_the_dense_model(text_file: Path, tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", models.SUPPORTED["llama-gqa-tied"], torch.float32)
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=6, seqlen=48, one_pass=True)
    tokens = calibration_data(
        str(text_file), Checkpoint(folder), samples=6, seqlen=48, seed=0, progress=no_progress
    ).tokens
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for index, done in enumerate(stream_blocks(Run(Checkpoint(folder), settings))):
        inputs, _, _ = record_inputs(dense, dense.get_submodule(f"model.layers.{index}"), tokens)
        for tensor, packed in done.weights.items():
            assert isinstance(packed, Packed24)
            key = tensor.removeprefix(f"model.layers.{index}.").removesuffix(".weight")
            want = naive_wanda(dense.get_parameter(tensor).data, inputs[key])
            assert ((unpack(packed) == want).all(dim=1)).float().mean() >= 0.95, tensor


def test_pairs_see_how_inputs_go_together(text_file: Path, tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", models.SUPPORTED["llama-gqa-tied"], torch.float32)
    settings = PruneSettings(method="swiftprune-pairs", calibration=str(text_file), samples=6, seqlen=48, one_pass=True)
    tokens = calibration_data(
        str(text_file), Checkpoint(folder), samples=6, seqlen=48, seed=0, progress=no_progress
    ).tokens
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    done = next(stream_blocks(Run(Checkpoint(folder), settings)))
    inputs, _, _ = record_inputs(dense, dense.get_submodule("model.layers.0"), tokens)
    for key, x in inputs.items():
        packed = done.weights[f"model.layers.0.{key}.weight"]
        assert isinstance(packed, Packed24)
        grouped = x.view(len(x), -1, 4)
        mask = keep_pairs(
            dense.get_parameter(f"model.layers.0.{key}.weight"), torch.einsum("tgi,tgj->gij", grouped, grouped)
        )
        assert ((unpack(packed) != 0) == mask).float().mean() > 0.99, key


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt-neox"])
def test_refined_blocks_come_closer_to_the_dense_ones(
    name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine_blocks, "STEPS", 60)
    folder = models.write_model(tmp_path / "model", models.SUPPORTED[name], torch.float32)
    tokens = calibration_data(
        str(text_file), Checkpoint(folder), samples=6, seqlen=48, seed=0, progress=no_progress
    ).tokens
    errors = {}
    for refine in ((), ("blocks",)):
        settings = PruneSettings(method="wanda", refine=refine, calibration=str(text_file), samples=6, seqlen=48)
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        sparse = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        trained = set()
        for done in stream_blocks(Run(Checkpoint(folder), settings)):
            for tensor, weight in done.weights.items():
                parameter = sparse.get_parameter(tensor)
                after = unpack(weight) if isinstance(weight, Packed24) else weight
                if parameter.ndim == 1 and not torch.equal(parameter, after):
                    trained.add(tensor.rpartition(".")[0].rpartition(".")[2])
                parameter.data = after
        assert bool(trained) == bool(refine)
        blocks = BLOCK_LISTS.get(name, "model.layers")
        _, _, want = record_inputs(dense, dense.get_submodule(f"{blocks}.2"), tokens)
        _, _, got = record_inputs(sparse, sparse.get_submodule(f"{blocks}.2"), tokens)
        errors[refine] = float(((got - want).norm(dim=1) / want.norm(dim=1)).mean())
    assert errors["blocks",] < 0.9 * errors[()]


def test_sparsegpt_beats_its_own_mask_without_update() -> None:
    """The update is what SparseGPT is for: same mask, lower output error on correlated inputs."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    updated = sparsegpt(weight, inputs.T @ inputs, Pattern.parse("2:4"))
    masked = torch.where(updated != 0, weight, 0)
    assert (inputs @ (updated - weight).T).norm() < 0.8 * (inputs @ (masked - weight).T).norm()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:5", "unstructured:0.5"])
def test_sparsegpt_meets_every_pattern(pattern: str) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs, weight = torch.randn(300, 160, generator=generator), torch.randn(8, 160, generator=generator)
    inputs[:, 7] = 0  # a dead channel
    keep = sparsegpt(weight, inputs.T @ inputs, Pattern.parse(pattern)) != 0
    parsed = Pattern.parse(pattern)
    if parsed.structured:
        counts = keep.view(8, -1, parsed.group).sum(-1)
        assert (counts <= parsed.kept).all()
        assert float(counts.float().mean()) > parsed.kept - 0.1
    else:
        assert abs(1 - float(keep.float().mean()) - 0.5) < 0.01
    assert not keep[:, 7].any()


def test_the_public_function_reports_every_layer(tiny_models: Callable[[str], Path], text_file: Path) -> None:
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=4, seqlen=32)
    seen: list[tuple[str, float, float]] = []
    blocks = list(prune(tiny_models("llama-gqa-tied"), settings, progress=lambda *step: seen.append(step)))
    assert [done.block.name for done in blocks] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    for result in (result for done in blocks for result in done.results):
        assert result.sparsity == 0.5
        assert 0.5 < result.kept_energy < 1
        assert result.output_error is not None
        assert 0.1 < result.output_error < 1
    assert seen[-1][0] == "prune"
    assert seen[-1][1] == seen[-1][2]
    assert [step[1] for step in seen if step[0] == "prune"] == sorted(step[1] for step in seen if step[0] == "prune")


def test_output_error_is_the_error_of_the_output(tiny_models: Callable[[str], Path], text_file: Path) -> None:
    """For the first block, whose inputs are the dense model's, against hooks on that model; all tokens are sampled."""
    folder = tiny_models("llama-mha-untied")
    settings = PruneSettings(method="magnitude", calibration=str(text_file), samples=4, seqlen=64)
    assert next(prune(folder, settings)).results[0].output_error is None  # data-free methods run without calibration
    done = next(prune(folder, settings.model_copy(update={"method": "wanda"})))
    tokens = calibration_data(
        str(text_file), Checkpoint(folder), samples=4, seqlen=64, seed=0, progress=no_progress
    ).tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: list[Tensor] = []
    linear = model.get_submodule(done.results[-1].name)
    linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=tokens)
    packed = done.weights[done.results[-1].name + ".weight"]
    assert isinstance(packed, Packed24)
    x, weight = torch.cat(inputs), linear.weight.detach()
    expected = (x @ (unpack(packed).float() - weight).T).norm() / (x @ weight.T).norm()
    assert done.results[-1].output_error == pytest.approx(float(expected), rel=1e-4)


def test_a_model_that_writes_its_own_text_writes_more_to_train_on(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    class Recorded(Distillation):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            seen.append(torch.cat(arguments[4:6]))  # to train on, and held back
            super().__init__(*arguments, **options)

    monkeypatch.setattr(distill, "Distillation", Recorded)
    checkpoint = Checkpoint(tiny_models("llama-gqa-tied"))
    settings = PruneSettings(method="wanda", samples=2, seqlen=64)
    training = Run(checkpoint, settings.model_copy(update={"refine": ("distill",), "steps": 1}))
    store = MemoryStore(training)
    for done in stream_blocks(training):
        store.save(done)
    pruned = {name: unpack(weight) for done in store.blocks.values() for name, weight in done.weights.items()}
    assert training.data is not None
    tokens = training.data.tokens
    assert len(tokens) > settings.samples
    distill.distill(training, store)
    assert torch.equal(seen[0], tokens)
    # Masks come of the samples that were asked for, and of no more.
    for done in stream_blocks(Run(checkpoint, settings, data=CalibrationData(tokens[: settings.samples], tokens[:0]))):
        for name, weight in done.weights.items():
            assert isinstance(weight, Packed24)
            assert torch.equal(unpack(weight), pruned[name])


def test_settings_that_clash_are_refused() -> None:
    with pytest.raises(SettingsError, match="wanda needs calibration data"):
        PruneSettings(method="wanda", calibration="none").resolved()
    assert PruneSettings(calibration="none").resolved().method == "swiftprune-data-free"
    assert PruneSettings(method="magnitude", calibration="text.txt").resolved().calibration == "none"
    assert PruneSettings(method="magnitude", calibration="text.txt", refine=("weights",)).resolved().calibration
    clashes: list[tuple[dict[str, Any], str]] = [
        ({"refine": ("weights",), "calibration": "none"}, "--refine weights needs calibration data"),
        ({"refine": ("distill",)}, "needs a budget: give either --minutes or --steps"),
        ({"refine": ("distill",), "minutes": 1, "steps": 1}, "needs a budget: give either --minutes or --steps"),
        ({"minutes": 1}, "add --refine distill"),
        ({"minutes": 1, "method": "magnitude"}, "add --refine distill"),
        ({"refine": ("blocks",), "one_pass": True}, "leave out --one-pass"),
        ({"method": "swiftprune-pairs", "pattern": "4:8"}, "swiftprune-pairs prunes to --format 2:4 only"),
    ]
    for refused, message in clashes:
        with pytest.raises(SettingsError, match=message):
            PruneSettings(**refused).resolved()
    assert PruneSettings(refine=("distill", "weights"), steps=1).resolved().refine == ("weights", "distill")
    with pytest.raises(SettingsError, match="not a regular expression"):
        PruneSettings(ignore="(").resolved()


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_the_run(method: str, bad: float, text_file: Path, tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", models.SUPPORTED["llama-gqa-tied"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_submodule("model.layers.2.mlp.up_proj").weight.data[7, 13] = bad
    model.save_pretrained(folder)
    settings = PruneSettings(method=method, calibration=str(text_file), samples=2, seqlen=16)
    with pytest.raises(FormatError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        list(prune(folder, settings))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("tensor", "calibration"),
    [
        ("model.embed_tokens.weight", "self"),
        ("model.layers.1.input_layernorm.weight", "text"),
        ("model.layers.2.mlp.down_proj.weight", "self"),
        ("model.norm.weight", "none"),
        ("lm_head.weight", "none"),
    ],
)
def test_a_weight_that_is_not_finite_stops_the_run_first(
    value: float, tensor: str, calibration: str, text_file: Path, tmp_path: Path
) -> None:
    """Whatever the stage it would spoil: sampled text, scores, or what a user reads."""
    folder = models.write_model(tmp_path / "model", models.SUPPORTED["llama-mha-untied"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_parameter(tensor).data[..., 5] = value
    model.save_pretrained(folder)
    settings = PruneSettings(calibration=str(text_file) if calibration == "text" else calibration, samples=8, seqlen=16)
    with pytest.raises(FormatError, match=rf"{re.escape(tensor)}: weight \((0, )?5,?\) is {value}"):
        list(prune(folder, settings))


def test_numbers_that_become_too_large_are_named(text_file: Path, tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", models.SUPPORTED["llama-mha-untied"], torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)
    model.save_pretrained(folder)
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=2, seqlen=16)
    with pytest.raises(
        CheckpointError, match=r"of model\.layers\.0\.mlp\.down_proj is not finite.*numbers that are too"
    ):
        list(prune(folder, settings))


def test_sequences_longer_than_the_model_takes_are_refused(tiny_models: Callable[[str], Path]) -> None:
    with pytest.raises(SettingsError, match=r"--seqlen 257: by its config\.json the model takes 256 tokens"):
        Run(Checkpoint(tiny_models("llama-gqa-tied")), PruneSettings(seqlen=257))


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.jsonl", "nowhere.json.gz", "./nowhere"])
def test_a_text_that_is_not_there_is_no_data_set(name: str, tiny_models: Callable[[str], Path]) -> None:
    with pytest.raises(TextError, match=f"{re.escape(name)}: no such file"):
        Run(Checkpoint(tiny_models("llama-gqa-tied")), PruneSettings(calibration=name))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, text_file: Path) -> None:
    config = copy.deepcopy(models.SUPPORTED["llama-gqa-tied"])
    config.vocab_size = 40
    folder = models.write_model(tmp_path / "model", config)
    settings = PruneSettings(calibration=str(text_file), samples=2, seqlen=16)
    with pytest.raises(CheckpointError, match=r"its tokenizer gives token \d+, but it has 40 embeddings"):
        list(prune(folder, settings))


GEMMA = {
    "vocab_size": 300,
    "vocab_size_per_layer_input": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 32,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.mark.parametrize("kind", [Gemma3nTextConfig, Gemma4TextConfig])
def test_blocks_get_what_the_model_hands_to_them_for_each_sample(kind: Any, tmp_path: Path) -> None:
    """Inputs by token and layer, keys and values of earlier blocks, a trained buffer: all as in the whole model."""
    more = {"laurel_rank": 8, "altup_num_inputs": 2} if kind is Gemma3nTextConfig else {"global_head_dim": 16}
    folder = models.write_model(tmp_path / "model", kind(**GEMMA, **more), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layer_scalar"):
            tensor.fill_(0.7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(2, 300, (3, 48), generator=torch.Generator().manual_seed(1))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = Checkpoint(folder)
    model, _ = empty_model(checkpoint)
    targets = find_targets(model, checkpoint, ignore="lm_head", group=4)
    runner = BlockRunner(model, checkpoint, targets, tokens, track_dense=True)
    generator = torch.Generator().manual_seed(2)
    for index, block in enumerate(targets.blocks):
        spoiled = {}
        with runner.block(block):
            runner.collect(block, "drift", lambda: None)
            for linear in block.linears:
                weight = model.get_parameter(f"{linear.name}.weight")
                spoiled[f"{linear.name}.weight"] = weight + torch.randn(weight.shape, generator=generator) * 0.05
            runner.advance(block, spoiled, lambda: None)
        assert runner.dense_hidden is not None
        for sample, row in enumerate(tokens):
            _, _, out = record_inputs(whole, whole.get_submodule(block.name), row[None])
            error = (runner.dense_hidden[sample].flatten(0, -2) - out).norm() / out.norm()
            assert error < 1e-5, (index, sample)


def test_masks_do_not_depend_on_the_order_of_samples(tmp_path: Path) -> None:
    folder = models.write_model(tmp_path / "model", Gemma4TextConfig(**GEMMA, global_head_dim=16), torch.float32)
    tokens = torch.randint(2, 300, (2, 48), generator=torch.Generator().manual_seed(1))
    settings = PruneSettings(method="wanda", calibration="given")
    first, second = (
        {
            name: unpack(weight) != 0
            for done in stream_blocks(Run(Checkpoint(folder), settings, data=CalibrationData(order, order[:0])))
            for name, weight in done.weights.items()
        }
        for order in (tokens, tokens.flip(0))
    )
    for name, mask in first.items():
        assert (mask != second[name]).float().mean() < 0.002, name


@pytest.mark.parametrize(
    ("name", "writers"),
    [
        ("llama-gqa-tied", {"o_proj": 1.0, "down_proj": 1.0}),
        ("gpt-neox", {"dense": 1.0, "dense_4h_to_h": 1.0}),
        ("opt", {"out_proj": 1.0, "fc2": 1.0}),
        ("starcoder2", {"o_proj": 1.0, "c_proj": 1.0}),
        ("granite", {"o_proj": 0.25, "down_proj": 0.25}),
        ("gemma2", {}),
    ],
)
def test_residual_writers_are_found_in_what_a_block_does(
    name: str, writers: dict[str, float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What reaches a linear that writes to the residual stream includes that stream's own drift, scaled as it adds."""
    small = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    wide = small | {"intermediate_size": 128, "num_key_value_heads": 2}
    config = (
        models.SUPPORTED.get(name)
        or {
            "opt": lambda: OPTConfig(**small, ffn_dim=128, word_embed_proj_dim=64),
            "starcoder2": lambda: Starcoder2Config(**wide),
            "granite": lambda: GraniteConfig(**wide, residual_multiplier=0.25),
            "gemma2": lambda: Gemma2Config(**wide, head_dim=16),
        }[name]()
    )
    checkpoint = Checkpoint(models.write_model(tmp_path / "model", config, torch.float32))
    model, _ = empty_model(checkpoint)
    targets = find_targets(model, checkpoint, ignore="lm_head", group=4)
    tokens = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    runner = BlockRunner(model, checkpoint, targets, tokens, track_dense=True)
    lack = torch.randn(runner.hidden[0].shape, generator=torch.Generator().manual_seed(2))
    runner.hidden[0] = runner.hidden[0] - lack
    block = targets.blocks[0]
    with runner.block(block):
        stats = runner.collect(block, "drift", lambda: None)
    found = {}
    for linear in block.linears:
        if (drift := stats[linear.name].residual_drift) is not None:
            sample = stats[linear.name].sample
            assert sample is not None
            found[linear.kind] = round(float((lack.flatten(0, 1).T @ sample).norm() / drift.norm()), 4)
    assert found == writers
    assert ("none of its linears" in caplog.text) == (not writers)


def prune_all(folder: Path, text_file: Path, **more: Any) -> dict[str, Tensor]:
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=8, seqlen=32, **more)
    return {name: unpack(w).float() for done in prune(folder, settings) for name, w in done.weights.items()}


@pytest.mark.parametrize(
    "more",
    [
        {"permute": True},
        {"refine": ("distill",), "steps": 2},
        {"max_perplexity_ratio": 1.05},
        {"permute": True, "refine": ("distill",), "steps": 2, "max_perplexity_ratio": 1.05},
    ],
)
def test_prune_gives_what_an_export_writes(
    more: dict[str, Any], tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Put in place, what `prune` yields is the exported model: every stage is in it, and channels are in one order."""
    folder = tiny_models("llama-mha-untied")
    settings = PruneSettings(method="wanda", calibration=str(text_file), samples=8, seqlen=32, **more)
    export(folder, tmp_path / "out", settings, target="dense")
    weights = prune_all(folder, text_file, **more)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours.load_state_dict(weights, strict=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, parameter in exported.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


def test_a_finished_run_is_not_run_forward_again(
    tiny_models: Callable[[str], Path], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Run(
        Checkpoint(tiny_models("qwen2")),
        PruneSettings(method="wanda", calibration=str(text_file), samples=2, seqlen=32),
    )
    store = MemoryStore(pipeline)
    for done in stream_blocks(pipeline):
        store.save(done)
    monkeypatch.setattr(BlockRunner, "run", lambda *_: pytest.fail("a block was run"))
    assert list(stream_blocks(pipeline, store)) == []


def test_a_preset_fits_itself_to_its_minutes(
    tiny_models: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where a sample of a block takes a tenth of a second; what was chosen is said, kept and resumed."""
    prune_block = prune_stage._prune_block
    seen: list[int] = []

    def slow(run: Run, block: Any, runner: Any, tick: Any) -> Any:
        seen.append(len(runner.hidden))
        time.sleep(0.1 * len(runner.hidden))
        return prune_block(run, block, runner, tick)

    monkeypatch.setattr(prune_stage, "_prune_block", slow)
    folder, said = tiny_models("llama-gqa-tied"), list[str]()
    given = {"calibration": str(text_file), "seqlen": 32, "compute": "float32", "minutes": 0.06}
    settings = make_settings("balanced", given).model_copy(update={"samples": 24})
    with pytest.raises(KeyboardInterrupt):
        export(folder, tmp_path / "out", settings, notify=said.append, progress=stop_after_block_one)
    report = export(folder, tmp_path / "out", settings, notify=said.append, resume=True)
    assert report.fitted_samples is not None
    assert 4 <= report.fitted_samples < 24
    assert seen[0] == 24
    assert set(seen[1:]) == {report.fitted_samples}
    assert any(f"{report.fitted_samples} are used instead" in text for text in said)
    assert json.loads((tmp_path / "out" / "swiftprune.json").read_text())["fitted_samples"] == report.fitted_samples
    asked = settings.model_copy(update={"from_preset": frozenset(), "minutes": 0.02})
    assert export(folder, tmp_path / "asked", asked).fitted_samples is None


def stop_after_block_one(stage: str, done: float, total: float) -> None:
    if stage == "prune" and done / total > 0.4:
        raise KeyboardInterrupt
