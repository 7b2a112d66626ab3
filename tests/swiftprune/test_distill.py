"""Distillation against training loops that are written out, and what stopping and resuming leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from swiftprune.compute import Compute
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.methods.mask import n_of_m
from swiftprune.models.perplexity import perplexity
from swiftprune.stages import distill
from swiftprune.stages.distill import Budget, Distillation
from tests import models

WITHIN = {"gpt-neox": "gpt_neox.layers."}


def pair(folder: Path, name: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """Student, teacher and the student's keep_masks; the student is pruned by magnitude."""
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    masks = {}
    for key, parameter in student.named_parameters():
        if key.startswith(WITHIN.get(name, "model.layers.")) and parameter.ndim == 2:
            masks[key] = n_of_m(parameter.detach().abs(), 2, 4)
            parameter.data.mul_(masks[key])
    return student, teacher, masks


def windows(count: int = 12, width: int = 40, held_back: int = 1) -> tuple[Tensor, Tensor]:
    """To train on, and those held back."""
    tokens = torch.randint(0, models.VOCABULARY, (count, width), generator=torch.Generator().manual_seed(1))
    return tokens[:-held_back], tokens[-held_back:]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt-neox", "qwen2"])
def test_a_step_is_one_of_a_plain_loop(name: str, tiny_models: Callable[[str], Path], monkeypatch: Any) -> None:
    """Whole logits, torch's own autograd and Adam; small chunks must not change the gradient."""
    monkeypatch.setattr(distill, "_CHUNK_LOGITS", 7 * models.VOCABULARY)
    monkeypatch.setattr(distill, "BATCH_TOKENS", 10**6)  # one batch is all windows, so their order does not matter
    folder, within = tiny_models(name), WITHIN.get(name, "model.layers.")
    tokens = windows()
    student, teacher, masks = pair(folder, name)
    before = weights(student)
    validations = Distillation(student, teacher, masks, within, *tokens).run(Budget(steps=3))

    naive, _, _ = pair(folder, name)
    trained = {n: p for n, p in naive.named_parameters() if n in masks or (p.ndim == 1 and n.startswith(within))}
    adam = torch.optim.Adam(trained.values(), betas=distill.BETAS)
    train = tokens[0]
    for step in range(3):
        with torch.no_grad():
            wanted = teacher(input_ids=train).logits.log_softmax(-1)
        loss = (wanted.exp() * (wanted - naive(input_ids=train).logits.log_softmax(-1))).sum(-1).mean()
        naive.zero_grad()
        loss.backward()
        for key, mask in masks.items():
            trained[key].grad *= mask
        torch.nn.utils.clip_grad_norm_(trained.values(), distill.MAX_GRAD_NORM)
        adam.param_groups[0]["lr"] = distill.LEARNING_RATE * (0.01, 1, 1)[step]
        adam.step()
    assert min(validations, key=lambda point: point.divergence) == validations[-1]
    moved = 0
    for key, parameter in student.named_parameters():
        if key in trained:
            moved += not torch.equal(parameter, before[key])
            change, want = parameter.detach() - before[key], trained[key].detach() - before[key]
            assert (change - want).norm() < 0.03 * want.norm(), key
        else:
            assert torch.equal(parameter, before[key]), key
    assert moved == len(trained) > len(masks) > 0
    for key, mask in masks.items():
        assert not student.get_parameter(key)[~mask].any()


def test_validation_is_divergence_and_perplexity_on_held_back_windows(tiny_models: Callable[[str], Path]) -> None:
    student, teacher, masks = pair(tiny_models("llama-mha-untied"), "llama-mha-untied")
    tokens = windows(200, 24, held_back=6)
    held_back = tokens[1]
    with torch.no_grad():
        wanted = teacher(input_ids=held_back).logits[:, :-1].log_softmax(-1)
        got = student(input_ids=held_back).logits[:, :-1].log_softmax(-1)
    divergence = float(F.kl_div(got, wanted, reduction="sum", log_target=True)) / wanted[..., 0].numel()
    expected = perplexity(student, held_back)
    first = Distillation(student, teacher, masks, "model.layers.", *tokens).run(Budget(steps=1))[0]
    assert (first.step, first.minutes) == (0, 0.0)
    assert first.divergence == pytest.approx(divergence, rel=1e-4)
    assert first.perplexity == pytest.approx(expected, rel=1e-4)


def test_it_helps_and_bfloat16_products_do_too(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "LEARNING_RATE", 5e-3)
    for compute in (torch.float32, torch.bfloat16):
        student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
        tokens = windows(100, 32)
        validations = Distillation(
            student, teacher, masks, "model.layers.", *tokens, compute=Compute(dtype=compute)
        ).run(Budget(steps=40))
        assert validations[-1].divergence < 0.8 * validations[0].divergence
        assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


class Stored:
    """A TrainingStore in memory."""

    saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def load_training(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self.saved

    def save_training(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        self.saved = {name: tensor.clone() for name, tensor in tensors.items()}, dict(progress)


def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(distill, "BATCH_TOKENS", 80)
    folder, store = tiny_models("llama-gqa-tied"), Stored()
    tokens = windows(30, 40)
    whole, teacher, masks = pair(folder, "llama-gqa-tied")
    expected = Distillation(whole, teacher, masks, "model.layers.", *tokens).run(Budget(steps=25))

    steps = 0

    def stop(stage: str, done: float, total: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 18:
            raise KeyboardInterrupt

    student, teacher, masks = pair(folder, "llama-gqa-tied")
    with pytest.raises(KeyboardInterrupt):
        Distillation(student, teacher, masks, "model.layers.", *tokens, store=store, progress=stop).run(
            Budget(steps=25)
        )
    student, teacher, masks = pair(folder, "llama-gqa-tied")
    got = Distillation(student, teacher, masks, "model.layers.", *tokens, store=store).run(Budget(steps=25))
    assert [(point.step, point.divergence) for point in got] == [(point.step, point.divergence) for point in expected]
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_the_learning_rate_rises_stays_and_falls(tiny_models: Callable[[str], Path], monkeypatch: Any) -> None:
    rates: list[float] = []
    monkeypatch.setattr(Distillation, "_has_stalled", lambda _self: False)
    monkeypatch.setattr(Distillation, "_step", lambda _self, _windows, rate: rates.append(rate / distill.LEARNING_RATE))
    student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
    Distillation(student, teacher, masks, "model.layers.", *windows()).run(Budget(steps=40))
    falling = [(40 - step) / 12 for step in range(28, 40)]
    assert rates == pytest.approx([0.01, 0.5] + [1] * 26 + falling)


def test_it_ends_early_when_validation_rises_and_keeps_the_best(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going uphill, the first weights are the best."""
    monkeypatch.setattr(Distillation, "_schedule", lambda _self, _used: -3)
    monkeypatch.setattr(distill, "BATCH_TOKENS", 64)
    student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
    before = weights(student)
    validations = Distillation(student, teacher, masks, "model.layers.", *windows(40, 32)).run(Budget(steps=200))
    assert 100 < validations[-1].step < 140  # it is seen after 60, and the rate falls for 60 more
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name])


def test_short_runs_validate_less_often(tiny_models: Callable[[str], Path]) -> None:
    """As a validation takes as long as a step, ten of them would take half of twenty steps."""
    student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
    validations = Distillation(student, teacher, masks, "model.layers.", *windows()).run(Budget(steps=20))
    assert [point.step for point in validations] == [0, 8, 16, 20]


def test_what_cannot_be_distilled_says_why(tiny_models: Callable[[str], Path], monkeypatch: Any) -> None:
    student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
    with pytest.raises(SettingsError, match="at least two windows of 40 tokens"):
        Distillation(student, teacher, masks, "model.layers.", *windows(1))
    with torch.no_grad():
        student.get_parameter("model.layers.1.mlp.up_proj.weight")[0, masks["model.layers.1.mlp.up_proj.weight"][0]] = (
            1e38
        )
    with pytest.raises(CheckpointError, match="the loss is nan at step 0"):
        Distillation(student, teacher, masks, "model.layers.", *windows()).run(Budget(steps=2))
    forward = type(teacher).forward

    def capped(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    monkeypatch.setattr(type(teacher), "forward", capped)
    student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
    with pytest.raises(SettingsError, match="changes its logits after the head"):
        Distillation(student, teacher, masks, "model.layers.", *windows()).run(Budget(steps=2))


def test_minutes_are_kept_to(tiny_models: Callable[[str], Path]) -> None:
    student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
    validations = Distillation(student, teacher, masks, "model.layers.", *windows()).run(Budget(minutes=0.05))
    assert validations[-1].step > 0
    assert validations[-1].minutes < 0.05
    student, teacher, masks = pair(tiny_models("llama-gqa-tied"), "llama-gqa-tied")
    assert len(Distillation(student, teacher, masks, "model.layers.", *windows()).run(Budget(minutes=0.0))) == 1
