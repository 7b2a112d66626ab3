"""Distillation: the whole sparse model learns to predict what its dense original does, by its kept weights alone.

Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), with the Kullback-Leibler divergence
of the next token's distribution as the only loss. Text needs no labels, so any will do that is like what the model is
for. Masters and Adam's moments are float32; products are computed in the type asked for. Logits of a vocabulary of
128,000 are large, so the divergence and its gradient are made for a few tokens at a time.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

from swiftprune.compute import Compute
from swiftprune.errors import CheckpointError, SettingsError, first_line
from swiftprune.formats.spec import SCALE_DTYPE, SCALED_INPUTS, Packed24
from swiftprune.kernels import packing
from swiftprune.kernels.quantize import of_each_input
from swiftprune.models.attention import use_short_window_attention
from swiftprune.models.load import vocabulary_size
from swiftprune.models.masked_linear import train_kept
from swiftprune.models.plan import Block
from swiftprune.progress import ProgressCallback, no_progress
from swiftprune.ranks import Ranks
from swiftprune.results import PrunedBlock, PrunedWeight, layer_result
from swiftprune.stages.round_values import rounds_last, seconds_to_round
from swiftprune.stages.text import TrainingText, training_text

if TYPE_CHECKING:
    from swiftprune.stages.context import Run
    from swiftprune.stages.store import BlockStore

STAGE = "distill"
LEARNING_RATE = 3e-4
# Of the budget: the learning rate rises, stays, and falls at the end.
WARMUP_RATIO = 0.05
DECAY_RATIO = 0.3
MIN_LR_RATIO = 0.01  # of the learning rate, at either end
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
BATCH_TOKENS = 512
VALIDATIONS = 10
# One takes about as long as a step, so a short run has fewer of them.
MIN_STEPS_BETWEEN_EVALS = 8
# Validations in a row without a new lowest divergence, after which the learning rate falls and training ends early.
PATIENCE = 3
# Times that a text is read, beyond which more of it gains next to nothing: docs/lab-notes.md.
_OFTEN = 2.5
# Logits in memory at a time, and the same again for the teacher's.
_CHUNK_LOGITS = 1 << 22
# Of these, rows that are float32 at a time, so that caches hold all that is made of them.
_ROWS = 8
# Of what enters the teacher's head, at most so much is kept for when the text comes around again.
_SEEN_BYTES = 500_000_000
_SAVE_SECONDS = 60.0
# Of the minutes to train, what scales and norms are tuned for once values are rounded.
TUNING_SHARE = 0.25
ACTIVATION_BYTES = 800_000_000
"""Of a step, about, for models that are distilled on CPUs."""


def memory_bytes(parameters: int, pruned: int, compute: torch.dtype, *, quantized: bool = False) -> int:
    """About what distilling a model of so many parameters takes, of which so many are in pruned linears.

    Both models, then of each pruned weight its gradient, Adam's two moments, its best value, its mask and itself in the
    type that is computed in, and what it is rounded from; activations of a step, chunks of logits and what the teacher
    gave come on top.
    """
    cast = 0 if compute == torch.float32 else compute.itemsize
    per_pruned = 4 + 8 + 4 + compute.itemsize + cast + (4 if quantized else 0)
    return parameters * (4 + compute.itemsize) + pruned * per_pruned + ACTIVATION_BYTES + _SEEN_BYTES


def check_supported(model: Any) -> None:
    """Raises SettingsError when the logits of `model`, which may be on the meta device, are not the head's output.

    Some architectures scale or cap them. The model runs here on no weights: its body is left out, and its head gives
    numbers that are known.
    """
    known = torch.tensor([[[-40.0, -1.0, 0.5, 3.0, 40.0]]])
    body, head = getattr(model, model.base_model_prefix, None), model.get_output_embeddings()
    if body is None or head is None:
        raise SettingsError(
            f"--refine distill: {type(model).__name__} is not made of a body and a head; use other refinements"
        )
    body.forward = lambda *_, **__: _Hidden(last_hidden_state=torch.zeros(1, 1, 1))
    head.forward = lambda *_, **__: known.clone()
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    except Exception as error:  # a body that is used in another way, of any type
        raise SettingsError(
            f"--refine distill: {type(model).__name__} does not run as a body and a head: {first_line(error)}"
        ) from error
    finally:
        del body.forward, head.forward
    if logits.shape != known.shape or not torch.equal(logits.float(), known):
        raise _changes_its_logits(model)


class _Hidden(BaseModelOutputWithPast):  # type: ignore[misc]
    """What a body returns; what only some models look for in it is None."""

    def __getattr__(self, name: str) -> None:
        return None


def _changes_its_logits(model: Any) -> SettingsError:
    return SettingsError(
        f"--refine distill: {type(model).__name__} changes its logits after the head, "
        "which distillation does not support; use other refinements"
    )


def distill(run: Run, store: BlockStore) -> None:
    """Trains the whole pruned model towards the dense one and saves every block anew.

    `validations` then tells how it went. Needs memory for the dense model and five times the pruned one in float32.
    """
    if "distill" not in run.settings.refine:
        return
    with run.clock("distill"):
        text, teacher, student, pruned = models_to_train(
            run, lambda block: run.ranks.by_first(lambda: store.load(block))
        )
        keep_masks = {name: packing.keep_mask(weight) for name, weight in pruned.items()}
        distillation = Distillation(
            student,
            teacher,
            keep_masks,
            within_blocks(run),
            text.train,
            text.validation,
            fixed=run.checkpoint.made,  # what is stored in another way cannot be written
            compute=run.compute,
            seed=run.settings.seed,
            store=store,
            progress=run.progress,
            ranks=run.ranks,
        )
        budget = run.ranks.by_first(lambda: _budget(run, store))
        run.validations = distillation.run(budget)
        distillation.save()
    if distillation.times_read > _OFTEN:
        run.notify(
            f"Distillation read its text {distillation.times_read:.1f} times, and from the third on it gains next to "
            "nothing: with more text in --calibration the same minutes give a better model."
        )
    for block in run.targets.blocks:
        run.save(store, trained_block(run, student, block))


def models_to_train(
    run: Run, load: Callable[[Block], Mapping[str, PrunedWeight]]
) -> tuple[TrainingText, Any, Any, dict[str, PrunedWeight]]:
    """Text to train on, the dense model, the pruned one as `load` gives it, and its pruned weights by parameter."""
    text = training_text(run)
    teacher, student = run.load_whole(run.compute.dtype), run.load_whole(torch.float32)
    return text, teacher, student, run.put_pruned(student, load)


def within_blocks(run: Run) -> str:
    """What the names of all parameters in decoder blocks begin with."""
    return run.targets.blocks[0].name.rpartition(".")[0] + "."


def trained_block(
    run: Run, student: nn.Module, block: Block, scaled: Mapping[str, Scaled] = MappingProxyType({})
) -> PrunedBlock:
    """What training made of a block, `scaled` the parameters of which scales were trained."""
    linears = {linear.tensor: linear for linear in block.linears}
    weights: dict[str, PrunedWeight] = {}
    results = []
    before = run.read_dense(block)
    parameters = dict(student.named_parameters())
    for name, tensor in run.parameters(block).items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            continue
        linear = linears.get(tensor)
        weight = parameter.detach().cpu()
        if name in scaled:
            weights[tensor] = scaled[name].packed()
        else:
            weights[tensor] = run.to_store(tensor, weight, linear is not None)
        if linear:
            results.append(layer_result(linear, before[tensor], weights[tensor], None, 0.0))
    return PrunedBlock(block, weights, results)


def _budget(run: Run, store: BlockStore) -> Budget:
    """What is left of the minutes; of an earlier run that was stopped, only what it distilled counts."""
    minutes = minutes_left(run)
    if minutes is not None and rounds_last(run.settings):
        minutes = (1 - TUNING_SHARE) * max(0.0, minutes - seconds_to_round(run, store) / 60)
    return Budget(minutes, run.settings.steps)


def minutes_left(run: Run) -> float | None:
    if run.settings.minutes is None:
        return None
    return max(0.0, run.settings.minutes - (time.monotonic() - run.started) / 60)


@dataclass(frozen=True)
class Budget:
    """How long to train: so many minutes, or so many steps, which gives the same bytes on the same machine."""

    minutes: float | None = None
    steps: int | None = None

    def share(self, minutes: float, steps: int) -> float:
        """How much of it is used up, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, steps / self.steps)
        assert self.minutes is not None
        return min(1.0, minutes / self.minutes) if self.minutes else 1.0


@dataclass
class Validation:
    """How far the sparse model is from the dense one on text it does not learn from."""

    step: int
    minutes: float
    """Of training, until then."""
    divergence: float
    """Kullback-Leibler, in nats a token."""
    perplexity: float
    rounded: bool = False
    """Whether values were rounded before."""


class TrainingStore(Protocol):
    """Where a training keeps what it continues from when it was stopped."""

    def load_training(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_training` was given last; None when it never was."""

    def save_training(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None: ...


class Distillation:
    """Trains `student`, a causal LM of transformers, towards `teacher`, in place.

    `keep_masks` (bool, True = kept) names the sparse parameters; of these the kept weights move, and with them every
    one-dimensional parameter whose name starts with `within` (norms, biases). All else is frozen, but for the scales of
    parameters that `scaled` names; `fixed` ones are in any case. It learns from `train` and validates on `held_back`,
    both (W, T) int64. With a `store`, training is saved once a minute, and a new Distillation with the same
    arguments continues from there. With `ranks`, all of which do the same, batches have as many times the windows, each
    trains on its share, and the first one saves.

    Raises SettingsError when there are too few windows, CheckpointError when the loss is not finite or when the
    architecture makes its logits from its hidden states by more than a linear head.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        keep_masks: Mapping[str, Tensor],
        within: str,
        train: Tensor,
        held_back: Tensor,
        *,
        scaled: Mapping[str, Scaled] = MappingProxyType({}),
        fixed: Collection[str] = (),
        learning_rate: float | None = None,
        compute: Compute | None = None,
        seed: int = 0,
        store: TrainingStore | None = None,
        progress: ProgressCallback = no_progress,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        if not len(train) or not len(held_back):
            raise SettingsError(f"distillation needs at least two windows of {train.shape[1]} tokens; give more text")
        self._train, self._held_back = train, held_back
        if len(self._train) < self._ranks.count:
            raise SettingsError(
                f"distillation has {len(self._train)} windows of text for {self._ranks.count} processes; give more text"
            )
        self._student, self._teacher = student, teacher.requires_grad_(False)
        self._teachers_head = teacher.get_output_embeddings()
        self._compute = compute or Compute()
        self._seed = seed
        self._store = store
        self._progress = progress
        self._scaled = scaled
        self._fixed = fixed
        self._learning_rate = LEARNING_RATE if learning_rate is None else learning_rate
        for model in (student, teacher):
            use_short_window_attention(model)
        self._in_model = self._trainable(keep_masks, within)
        self._trained = {
            name: scaled[name].factors if name in scaled else parameter for name, parameter in self._in_model.items()
        }
        """What the optimizer moves: the model's parameters, or the factors of their scales."""
        self._adam = torch.optim.Adam(self._trained.values(), lr=self._learning_rate, betas=BETAS, fused=True)
        self._steps = 0
        self._minutes = 0.0
        self._decay: float | None = None
        """The share of the budget from which the learning rate falls, once it does."""
        self._best: dict[str, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        """By window, what enters the teacher's head."""
        self.validations: list[Validation] = []
        self._load()

    def _trainable(self, keep_masks: Mapping[str, Tensor], within: str) -> dict[str, nn.Parameter]:
        self._student.requires_grad_(False)
        trained = {}
        for name, parameter in self._student.named_parameters():
            is_norm = parameter.ndim == 1 and name.startswith(within) and name not in self._fixed
            if name in keep_masks or name in self._scaled or is_norm:
                trained[name] = parameter.requires_grad_(True)
            if name in keep_masks:
                linear = self._student.get_submodule(name.rpartition(".")[0])
                train_kept(linear, keep_masks[name], self._compute)
        return trained

    def run(self, budget: Budget) -> list[Validation]:
        """Trains until `budget` is used up, or less where validation stops falling, and leaves the best weights."""
        start = saved = time.monotonic()
        before = self._minutes
        if not self.validations:
            self._check_head()
            self._validate()
        batches = self._batches()
        used = self._ranks.from_first(budget.share(self._minutes, self._steps))
        while used < self._end(used):
            self._progress(STAGE, round(used * 1000), 1000)
            begun = time.monotonic()
            self._step(next(batches), self._learning_rate * self._schedule(used))
            pace = (time.monotonic() - begun) / 60  # minutes of a step
            self._steps += 1
            self._minutes = before + (time.monotonic() - start) / 60
            # Another step must fit into the minutes, and so must the validation after it.
            used = self._ranks.from_first(budget.share(self._minutes + 2 * pace, self._steps))
            due = used * VALIDATIONS >= len(self.validations)
            if used >= self._end(used) or (due and self._steps - self.validations[-1].step >= MIN_STEPS_BETWEEN_EVALS):
                self._validate()
            if self._store and time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self._progress(STAGE, 1000, 1000)
        with torch.no_grad():
            for name, best in self._best.items():
                self._trained[name].copy_(best)
        self._scale()
        return self.validations

    @property
    def times_read(self) -> float:
        """How often training has gone through its windows."""
        return self._steps * self._batch_windows / len(self._train)

    @torch.no_grad()
    def _scale(self) -> None:
        """Puts the scaled parameters into the model."""
        for name, scaled in self._scaled.items():
            self._in_model[name].copy_(scaled.weight())

    def _end(self, used: float) -> float:
        """The share of the budget at which training ends, `used` being the one that is used up."""
        if self._decay is None and (used >= 1 - DECAY_RATIO or self._has_stalled()):
            self._decay = used
        return 1.0 if self._decay is None else min(1.0, self._decay + DECAY_RATIO)

    def _schedule(self, used: float) -> float:
        """Of the learning rate: a linear start, then all of it, and from `_decay` on a linear end."""
        left = 1.0 if self._decay is None else (self._end(used) - used) / DECAY_RATIO
        return max(MIN_LR_RATIO, min(1.0, used / WARMUP_RATIO, left))

    def _has_stalled(self) -> bool:
        lowest = min(range(len(self.validations)), key=lambda index: self.validations[index].divergence)
        return len(self.validations) - 1 - lowest >= PATIENCE

    @property
    def _batch_windows(self) -> int:
        """Of a step, in all processes together."""
        return max(1, BATCH_TOKENS // self._train.shape[1]) * self._ranks.count

    def _batches(self) -> Iterator[Tensor]:
        """Indices of windows in a new random order each time around, from where the steps so far have left off."""
        size = self._batch_windows
        for count in itertools.count(self._steps):
            around, index = divmod(count * size, len(self._train) // size * size or 1)
            generator = torch.Generator().manual_seed(self._seed + around)
            yield self._ranks.share(torch.randperm(len(self._train), generator=generator)[index : index + size])

    def _step(self, windows: Tensor, learning_rate: float) -> None:
        target = self._target(windows)
        hidden = self._hidden(self._student, self._train[windows])
        loss, gradient = self._divergence(hidden.detach(), target)
        if not math.isfinite(loss):
            raise CheckpointError(
                f"distillation: the loss is {loss} at step {self._steps}; prune without it, or look "
                "for very large weights in the checkpoint"
            )
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        for name, scaled in self._scaled.items():
            of_weight, self._in_model[name].grad = self._in_model[name].grad, None
            assert of_weight is not None
            scaled.factors.grad = scaled.gradient(of_weight)
        self._average_gradients()
        nn.utils.clip_grad_norm_(self._trained.values(), MAX_GRAD_NORM)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._scale()

    def _average_gradients(self) -> None:
        if self._ranks.count > 1:
            for parameter in self._trained.values():
                if parameter.grad is None:  # of an expert that no token of this process went to
                    parameter.grad = torch.zeros_like(parameter)
                self._ranks.sum(parameter.grad.div_(self._ranks.count))

    def _target(self, windows: Tensor) -> Tensor:
        """(tokens, H): what enters the teacher's head.

        Each window by itself, and kept for when it comes around again, so that a run that was stopped and has kept
        nothing goes on to the same bits.
        """
        found = []
        for window in windows.tolist():
            if (hidden := self._seen.get(window)) is None:
                hidden = self._hidden(self._teacher, self._train[[window]])
                if (len(self._seen) + 1) * hidden.nbytes <= _SEEN_BYTES:
                    self._seen[window] = hidden.to("cpu", self._compute.dtype)
            found.append(hidden.to(self._teacher.device, torch.float32))
        return torch.cat(found)

    def _hidden(self, model: Any, batch: Tensor) -> Tensor:
        """(tokens, H) fp32: what enters the head."""
        training = model is self._student and torch.is_grad_enabled()
        with torch.set_grad_enabled(training), self._autocast():
            base = getattr(model, model.base_model_prefix)
            hidden: Tensor = base(input_ids=batch.to(model.device), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).float()

    def _autocast(self) -> torch.autocast:
        return self._compute.autocast()

    @functools.cached_property
    def _head(self) -> nn.Linear:
        """The student's, which is not trained: made once of the type that is computed in, not for every chunk."""
        own: nn.Linear = self._student.get_output_embeddings()
        cast = {id(p): nn.Parameter(p.detach().to(self._compute.dtype), requires_grad=False) for p in own.parameters()}
        return copy.deepcopy(own, cast)  # with these in the place of its own, which are not copied

    def _logits(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = head(hidden)
        return logits

    def _log_probabilities(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        return self._logits(head, hidden).float().log_softmax(-1)

    @torch.no_grad()
    def _divergence(self, hidden: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """Mean KL(teacher || student) over tokens, and its gradient by the student's `hidden` (tokens, H).

        By its logits that gradient is the student's probability less the teacher's, so it needs no graph.
        """
        gradient = torch.empty_like(hidden)
        total = 0.0
        for rows in self._chunks(len(hidden)):
            wanted, given = self._logits(self._teachers_head, target[rows]), self._logits(self._head, hidden[rows])
            for of_teacher, of_student in zip(torch.split(wanted, _ROWS), torch.split(given, _ROWS), strict=True):
                log_wanted = of_teacher.float().log_softmax(-1)
                log_given = of_student.float().log_softmax(-1)
                probability = log_wanted.exp()
                total += float(torch.dot(probability.flatten(), log_wanted.sub_(log_given).flatten()))
                of_student.copy_(log_given.exp_().sub_(probability))
            gradient[rows] = given @ self._head.weight
        return total / len(hidden), gradient.div_(len(hidden))

    def _chunks(self, tokens: int) -> Iterator[slice]:
        size = max(1, _CHUNK_LOGITS // vocabulary_size(self._student))
        return (slice(start, start + size) for start in range(0, tokens, size))

    @functools.cached_property
    def _targets(self) -> list[Tensor]:
        """What enters the teacher's head, for each window that is held back."""
        return [self._hidden(self._teacher, window[None]) for window in self._held_back]

    @torch.no_grad()
    def _validate(self) -> None:
        divergence = likelihood = 0.0
        for window, target in self._ranks.share(list(zip(self._held_back, self._targets, strict=True))):
            hidden = self._hidden(self._student, window[None])
            following = window[1:].to(hidden.device)
            for rows in self._chunks(len(hidden) - 1):
                log_probabilities = self._log_probabilities(self._head, hidden[:-1][rows])
                wanted = self._log_probabilities(self._teachers_head, target[:-1][rows])
                divergence += float(F.kl_div(log_probabilities, wanted, reduction="sum", log_target=True))
                likelihood += float(F.nll_loss(log_probabilities, following[rows], reduction="sum"))
        sums = self._ranks.from_all((divergence, likelihood))
        divergence, likelihood = (sum(parts) for parts in zip(*sums, strict=True))
        count = len(self._held_back) * (self._held_back.shape[1] - 1)
        result = Validation(self._steps, self._minutes, divergence / count, math.exp(likelihood / count))
        if all(result.divergence < other.divergence for other in self.validations):
            self._best = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self.validations.append(result)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale or cap their logits after the head, which `_log_probabilities` would miss."""
        window = self._held_back[:1]
        with self._autocast():
            logits = self._teacher(input_ids=window.to(self._teacher.device), use_cache=False).logits[0].float()
        ours = self._log_probabilities(self._teachers_head, self._targets[0])
        if not torch.allclose(logits.log_softmax(-1), ours, atol=0.05, rtol=0.05):
            raise _changes_its_logits(self._teacher)

    def save(self) -> None:
        """Stores all that training depends on, where there is a store."""
        if self._store is None or not self._ranks.is_first:
            return
        tensors = {}
        for name, parameter in self._trained.items():
            tensors[f"weight {name}"] = parameter.detach()
            for key, value in self._adam.state[parameter].items():
                tensors[f"{key} {name}"] = value
        tensors |= {f"best {name}": best for name, best in self._best.items()}
        progress = {
            "steps": self._steps,
            "minutes": self._minutes,
            "decay": self._decay,
            "validations": [asdict(validation) for validation in self.validations],
        }
        self._store.save_training({name: tensor.cpu() for name, tensor in tensors.items()}, progress)

    def _load(self) -> None:
        saved = self._ranks.from_first(self._store.load_training() if self._store else None)
        if saved is None:
            return
        stored, progress = saved
        self._steps, self._minutes, self._decay = progress["steps"], progress["minutes"], progress.get("decay")
        self.validations = [Validation(**validation) for validation in progress["validations"]]
        for name, parameter in self._trained.items():
            parameter.data.copy_(stored[f"weight {name}"])
            # A fused step takes no state from another device; what never had a gradient has none.
            if f"step {name}" in stored:
                self._adam.state[parameter] = {
                    key: stored[f"{key} {name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
            self._best[name] = stored[f"best {name}"].to(parameter.device)
        self._scale()


class Scaled:
    """A quantized weight of which the scales are trained: each has a factor, which starts at 1."""

    def __init__(self, packed: Packed24, device: torch.device) -> None:
        assert packed.scales is not None
        self._packed = packed
        self._values = packing.unpack(packed).to(device)
        self.factors = nn.Parameter(torch.ones(packed.scales.shape, device=device))
        """(N, S), as the scales."""

    def weight(self) -> Tensor:
        """(N, K) fp32."""
        return self._values * of_each_input(self.factors.detach(), self._values.shape[1])

    def gradient(self, of_weight: Tensor) -> Tensor:
        """Of the factors, from that of the weight (N, K)."""
        each = self._values * of_weight
        if self.factors.shape[1] == 1:
            return each.sum(1, keepdim=True)
        parts = torch.split(each, SCALED_INPUTS, dim=1)
        return torch.stack([part.sum(1) for part in parts], dim=1)

    def packed(self) -> Packed24:
        """With the scales as they are now."""
        packed = self._packed
        assert packed.scales is not None
        scales = (packed.scales.float() * self.factors.detach().cpu()).to(SCALE_DTYPE)
        return Packed24(packed.values, packed.metadata, scales)
