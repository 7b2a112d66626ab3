"""The pruning pipeline: calibrate, score, mask and refine, one decoder block after the other."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from swiftprune.calibration.data import CalibrationData, calibration_data
from swiftprune.calibration.runner import BlockRunner
from swiftprune.calibration.sampling import conversation_start, sampled_conversations
from swiftprune.calibration.text import CalibrationText, has_conversations
from swiftprune.checkpoints.source import Checkpoint, Orders
from swiftprune.compute import autocast
from swiftprune.config import DTYPES, PruneSettings
from swiftprune.errors import CheckpointError, FormatError, SettingsError
from swiftprune.formats import spec
from swiftprune.formats.spec import Packed24
from swiftprune.kernels import packing
from swiftprune.methods.least_squares import refine_weights
from swiftprune.methods.mask import Pattern, first_violation, select
from swiftprune.methods.scores import KEEP, InputStats, Needs, find_method
from swiftprune.models.load import FP32_PARAMETERS, context_length, load_whole_model
from swiftprune.models.perplexity import dense_perplexity, perplexity
from swiftprune.models.plan import Block, Linear, Targets, empty_model, find_targets, fused_sets
from swiftprune.progress import Announce, Progress, silent, unheard
from swiftprune.stages import distill, keep_dense, memory, permute, refine_blocks
from swiftprune.stages.distill import SEQLEN, Budget, Distillation, TrainingStore, Validation
from swiftprune.stages.keep import KeepMasks, violations
from swiftprune.stages.permute import find_orders

# Windows that are read of a data set to distill on: a million tokens.
_TRAINING_WINDOWS = 4096
# Of calibration, on which orders are found: they need the energy of channels only, which few tokens tell.
_ORDER_TOKENS = 4096
# Where the model samples its own text, it samples so many times more when it is distilled on as well.
_TRAINING_SAMPLES = 3
# Of the minutes of a preset, what pruning may take at most; the rest is for distillation.
_PRUNING_SHARE = 0.6
_LEAST_SAMPLES = 4
# Of calibration, and of what is trained on, every so many windows is a conversation, if there are any.
_EVERY_CONVERSATION = 4

# Of perplexity over the dense model's: beyond, text is poor enough to say so.
POOR_RATIO = 3.0

PrunedWeight = Packed24 | Tensor
"""A pruned weight: packed when the pattern is 2:4, else dense (N, K) with zeros."""


class LayerResult(BaseModel):
    """What pruning did to one linear."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    """Share of weights that are zero."""
    kept_energy: float
    """Sum of squares after pruning over that before; above 1 when an update made weights larger."""
    output_error: float | None
    """||X W^T - X W'^T|| / ||X W^T|| on a sample of calibration tokens; None without calibration."""
    mask_seconds: float = Field(exclude=True, default=0.0)

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


class Check(BaseModel):
    """How good the pruned model is on calibration text that was held back: nothing was calibrated or trained on it."""

    windows: int
    seqlen: int
    dense: float
    """Perplexity of the model before pruning."""
    pruned: float

    @property
    def ratio(self) -> float:
        return self.pruned / self.dense


@dataclass
class PrunedBlock:
    """One finished decoder block."""

    block: Block
    weights: dict[str, PrunedWeight]
    """By tensor name in the checkpoint."""
    results: list[LayerResult]


class BlockStore(TrainingStore, Protocol):
    """Where a run keeps finished blocks: stages that follow read them from here and write them anew.

    An export's store is on disk and also remembers what the run decided, so that an interrupted run can be resumed.
    """

    def finished(self, block: Block) -> bool:
        """Whether the block has been saved."""
        ...

    def load(self, block: Block) -> dict[str, Tensor]:
        """All tensors of a saved block by name in the checkpoint, pruned ones dense with zeros."""
        ...

    def save(self, done: PrunedBlock) -> None: ...

    def keep_data(self, data: CalibrationData) -> None: ...

    def keep_orders(self, orders: Orders) -> None: ...

    def keep_dense_linears(self, names: list[str]) -> None: ...

    def keep_fitted_samples(self, samples: int) -> None: ...


class MemoryStore:
    """A BlockStore in memory, for `prune`."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.blocks: dict[str, PrunedBlock] = {}
        self._pipeline = pipeline

    def finished(self, block: Block) -> bool:
        return block.name in self.blocks

    def load(self, block: Block) -> dict[str, Tensor]:
        weights = self.blocks[block.name].weights
        others = self._pipeline.checkpoint.read(name for name in block.tensors if name not in weights)
        return others | {name: packing.unpack(weight, name) for name, weight in weights.items()}

    def save(self, done: PrunedBlock) -> None:
        self.blocks[done.block.name] = done

    def load_training(self) -> None: ...

    def save_training(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None: ...

    def keep_data(self, data: CalibrationData) -> None: ...

    def keep_orders(self, orders: Orders) -> None: ...

    def keep_dense_linears(self, names: list[str]) -> None: ...

    def keep_fitted_samples(self, samples: int) -> None: ...


@dataclass
class StageClock:
    """Seconds spent in each stage, over all blocks."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


class Pipeline:
    """A pruning run over one checkpoint. Making it checks settings and headers; `run` does the work, stage by stage.

    `data`, `orders`, `fitted_samples` and `dense_linears` are what a run decides on the way; one that is resumed is
    given those of the run before it. `clock` fills up on the way.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: PruneSettings, *, data: CalibrationData | None = None,
        progress: Progress = silent, announce: Announce = unheard,
    ) -> None:  # fmt: skip
        checkpoint.refuse_quantized()
        self.checkpoint = checkpoint
        self._announce = announce
        self._progress = progress
        self._model = empty_model(checkpoint)
        self._places = frozenset(self._model.state_dict())
        self.settings = self._with_what_can_be_had(self._with_keep(settings)).resolved()
        self.pattern = Pattern.parse(self.settings.pattern)
        self.method = find_method(self.settings.method)
        assert self.settings.compute != "auto"
        self.compute = DTYPES[self.settings.compute]
        self.clock = StageClock()
        self.data = data
        self.orders: Orders | None = None
        self.dense_linears: list[str] | None = None
        """Linears that `max_perplexity_ratio` left dense."""
        self.fitted_samples: int | None = None
        """Calibration sequences that fit into the minutes of a preset, where it set more."""
        self.validations: list[Validation] = []
        self._started = time.monotonic()
        self.needs = self._needs()
        group = self.pattern.group if self.pattern.structured else 1
        self.targets: Targets = find_targets(self._model, checkpoint, ignore=self.settings.ignore, group=group)
        self._masks = KeepMasks(Path(self.settings.mask)) if self.settings.mask else None
        self._check_head()
        self._check_length()
        self._check_memory()
        if self.settings.method == KEEP:
            self.targets = self._without_violations()
        else:
            self._note_sparse_weights()

    def _with_keep(self, settings: PruneSettings) -> PruneSettings:
        """Weights that are said to have the pattern already are kept, where no method was asked for."""
        chosen = settings.method and "method" not in settings.from_preset
        if chosen or settings.mask or self.checkpoint.declared_pattern != settings.pattern:
            return settings
        self._announce(
            f"The checkpoint says that its weights are {settings.pattern} already, so --method {KEEP} leaves them as "
            "they are; to prune them anew, name another method."
        )
        return settings.model_copy(update={"method": KEEP, "permute": False})

    def _with_what_can_be_had(self, settings: PruneSettings) -> PruneSettings:
        """Settings without those stages of a preset that the architecture does not allow; others are refused."""
        changes: dict[str, Any] = {}
        if settings.permute:
            try:
                permute.check_supported(self._model)
            except SettingsError as error:
                self._leave_out("permute", settings, error)
                changes["permute"] = False
        if "distill" in settings.refine:
            try:
                distill.check_supported(self._model)
            except SettingsError as error:
                self._leave_out("refine", settings, error)
                changes |= _without_distill(settings)
        if settings.conversations and not has_conversations(self.checkpoint):
            self._announce("The model has no chat template, so no conversations are sampled.")
            changes["conversations"] = 0
        elif settings.conversations:
            try:
                conversation_start(self.checkpoint, settings.seqlen)
            except SettingsError as error:
                self._leave_out("conversations", settings, error)
                changes["conversations"] = 0
        return settings.model_copy(update=changes)

    def _leave_out(self, field: str, settings: PruneSettings, error: SettingsError) -> None:
        if field not in settings.from_preset:
            raise error
        self._announce(f"Left out of --quality: {error}.")

    def _check_head(self) -> None:
        """A checkpoint may have no output head, and then nothing that predicts tokens can be had."""
        if self.targets.head:
            return
        s = self.settings
        for needed, what in (
            (s.calibration == "self", "--calibration self"), (s.conversations, "--conversations"),
            ("distill" in s.refine, "--refine distill"), (s.max_perplexity_ratio, "--sparsity auto"),
        ):  # fmt: skip
            if needed:
                raise CheckpointError(f"{self.checkpoint.folder}: holds no output head, which {what} needs")
        self._announce("The checkpoint holds no output head; its body is pruned, and the output has none either.")

    def _check_length(self) -> None:
        """Sequences that are longer than the model was made for would calibrate it on noise, or fail."""
        longest, s = context_length(self._model.config), self.settings
        if s.calibration != "none" and longest is not None and s.seqlen > longest:
            raise SettingsError(f"--seqlen {s.seqlen}: by its config.json the model takes {longest} tokens")

    def _check_memory(self) -> None:
        """Stages that need the whole model say what they need before any work, and stop where that is not there."""
        s, count = self.settings, self.checkpoint.parameter_count
        needs: dict[str, int] = {}
        if "distill" in s.refine:
            needs["--refine distill"] = distill.memory_bytes(count, self.pruned_count(), self.compute)
        if s.max_perplexity_ratio is not None:
            needs["--sparsity auto"] = 4 * (count + 2 * self.pruned_count())
        if not needs:
            return
        what, needed = max(needs.items(), key=lambda item: item[1])
        free = memory.available_bytes()
        self._announce(f"{what} needs about {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free.")
        if needed <= free:
            return
        error = SettingsError(f"{what} needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; "
                              "leave it out, or use a machine with more")  # fmt: skip
        if what == "--refine distill":
            self._leave_out("refine", s, error)
            self.settings = s.model_copy(update=_without_distill(s))
            return
        raise error

    def pruned_count(self) -> int:
        """Weights in all linears that are pruned."""
        linears = (linear for block in self.targets.blocks for linear in block.linears)
        return sum(torch.Size(self.checkpoint.tensors[linear.tensor].shape).numel() for linear in linears)

    def _without_violations(self) -> Targets:
        """For `keep`: linears that do not fit the pattern stay dense, with those that engines run as one with them."""
        linears = [linear for block in self.targets.blocks for linear in block.linears]
        if self._masks:
            self._masks.check(linear.tensor for linear in linears)
        found = dict(violations(self.checkpoint, linears, self.pattern, self._masks, self._progress))
        if found and self.settings.strict:
            name, reason = next(iter(found.items()))
            raise SettingsError(f"--strict: {len(found)} of {len(linears)} linears are not, first {name}: {reason}")
        for together in fused_sets(linear.name for linear in linears):
            if bad := [name for name in together if name in found]:
                found |= {name: f"engines run it as one with {bad[0]}" for name in together if name not in found}
        if len(found) == len(linears):
            raise SettingsError(f"--method {KEEP}: no linear of the decoder can stay as it is: {_first_of(found)}")
        if found:
            self._announce(f"{len(found)} of {len(linears)} linears stay dense, first {_first_of(found)}.")
        blocks = [
            dataclasses.replace(block, linears=[linear for linear in block.linears if linear.name not in found])
            for block in self.targets.blocks
        ]
        return dataclasses.replace(self.targets, blocks=blocks, dense=self.targets.dense | found)

    def _note_sparse_weights(self) -> None:
        """To prune what is sparse already is allowed, but hardly ever what is wanted."""
        if not self.pattern.structured:
            return
        first = next(linear for block in self.targets.blocks for linear in block.linears)
        weight = self.checkpoint.read([first.tensor])[first.tensor]
        if weight.any() and first_violation(weight, self.pattern.kept, self.pattern.group) is None:
            self._announce(
                f"{first.name} is {self.pattern.name} already: if all are, --method {KEEP} packs them as they are, "
                "without calibration."
            )

    def _needs(self) -> Needs:
        """What calibration must collect, for the method and for refining."""
        needs: Needs = "drift" if "weights" in self.settings.refine else self.method.needs
        # In one pass inputs are those of the dense model, so there is no drift.
        return "gram" if needs == "drift" and self.settings.one_pass else needs

    def load_data(self) -> CalibrationData | None:
        """The calibration tokens, made on the first call; None when the method needs none.

        Conversations stand at the end of the first `samples` rows, and those that are too many for calibration follow.
        Where the model samples all of its text and is distilled, more of it comes last. What follows is only for
        training.
        """
        if self.data is None and self.settings.calibration != "none":
            with self.clock("calibration text"):
                s = self.settings
                more = _TRAINING_SAMPLES if s.calibration == "self" and "distill" in s.refine else 1
                self.data = calibration_data(
                    s.calibration, self.checkpoint, samples=s.samples * more, seqlen=s.seqlen, seed=s.seed,
                    compute=self.compute, progress=self._progress, column=s.text_column,
                )  # fmt: skip
            if count := self.settings.conversations:
                with self.clock("sample conversations"):
                    found = sampled_conversations(
                        self.checkpoint, samples=count, seqlen=s.seqlen, seed=s.seed, compute=self.compute,
                        progress=self._progress,
                    )  # fmt: skip
                tokens = self.data.tokens
                start = self._conversation_rows(len(tokens) + count).start
                tokens = torch.cat([tokens[:start], found, tokens[start:]])
                self.data = CalibrationData(tokens, self.data.held_back)
            self._check_tokens(self.data)
        return self.data

    def _check_tokens(self, data: CalibrationData) -> None:
        """Raises CheckpointError when the tokenizer has tokens that the model has no embedding for."""
        highest = int(max(part.max() for part in (data.tokens, data.held_back) if part.numel()))
        embeddings = self.checkpoint.tensors[self.targets.embedding].shape[0]
        if highest >= embeddings:
            raise CheckpointError(
                f"{self.checkpoint.folder}: its tokenizer gives token {highest}, but it has {embeddings} embeddings; "
                "put back the tokenizer that belongs to these weights"
            )

    def _conversation_rows(self, rows: int) -> slice:
        """Where conversations are, of so many rows of tokens."""
        count = self.settings.conversations
        calibration = min(self.settings.samples, rows - count)
        start = calibration - min(count, calibration // _EVERY_CONVERSATION)
        return slice(start, start + count)

    def _calibration_tokens(self) -> Tensor | None:
        """(samples, seqlen). Fewer, where time is short, are taken evenly, so that conversations keep their share."""
        data = self.load_data()
        if data is None:
            return None
        tokens = data.tokens[: self.settings.samples]
        if self.fitted_samples is None or self.fitted_samples >= len(tokens):
            return tokens
        return tokens[torch.linspace(0, len(tokens) - 1, self.fitted_samples).round().long()]

    def _prepare(self, store: BlockStore) -> None:
        """Makes the calibration tokens and permutes the checkpoint, where that is asked for and not done yet."""
        with self.clock("read"):
            self._check_weights()
        if self.data is None and (data := self.load_data()) is not None:
            store.keep_data(data)
        if not self.settings.permute or self.checkpoint.is_permuted:
            return
        if self.orders is None:
            self.orders = self._find_orders()
            store.keep_orders(self.orders)
        self.checkpoint = self.checkpoint.permuted(self.orders)

    def _check_weights(self) -> None:
        """Raises FormatError for NaN or infinities anywhere in the model: before any work, which they would spoil."""
        parameters = (name for name, _ in self._model.named_parameters(remove_duplicate=False))
        tensors = sorted({self.targets.tensor_of[name] for name in parameters if name in self.targets.tensor_of})
        for index, name in enumerate(tensors):
            self._progress("check weights", index, len(tensors))
            tensor = self.checkpoint.read([name])[name]
            if tensor.is_floating_point() and tensor.itemsize > 1:
                check_finite(tensor, name)
        self._progress("check weights", len(tensors), len(tensors))

    def _find_orders(self) -> Orders:
        tokens = self._calibration_tokens()
        assert tokens is not None
        with self.clock("permute"):
            tokens = tokens[: max(1, _ORDER_TOKENS // tokens.shape[1])]
            tick = _Tick(self._progress, 0, len(self.targets.blocks) * len(tokens), "permute")
            return find_orders(self._model, self.checkpoint, self.targets, tokens, compute=self.compute, tick=tick)

    def run(self, store: BlockStore) -> None:
        """All stages in order: blocks that `store` has are not pruned again, and all of them are there at the end."""
        for done in self.blocks(store):
            self._save(store, done)
        if "distill" in self.settings.refine:
            for done in self.distill(store):
                self._save(store, done)
        if self.settings.max_perplexity_ratio is not None:
            if self.dense_linears is None:
                self.dense_linears = self.find_dense(store)
                store.keep_dense_linears(self.dense_linears)
            for block in self.targets.blocks:
                if any(linear.name in self.dense_linears for linear in block.linears):
                    self._save(store, self.with_dense(block, store.load(block), self.dense_linears))

    def _save(self, store: BlockStore, done: PrunedBlock) -> None:
        with self.clock("write"):
            store.save(done)

    def blocks(self, store: BlockStore | None = None) -> Iterator[PrunedBlock]:
        """Prunes block after block, each on the outputs of the pruned blocks before it.

        A block that `store` has already is only run forward, if one that it has not follows, and is not yielded.
        """
        store = store or MemoryStore(self)
        self._prepare(store)
        unfinished = [index for index, block in enumerate(self.targets.blocks) if not store.finished(block)]
        if not unfinished:
            return
        runner = self._runner()
        steps = len(runner.hidden) * (1 if self.settings.one_pass else 2) if runner else 1
        if "blocks" in self.settings.refine:
            steps += refine_blocks.STEPS
        announced = False
        for index, block in enumerate(self.targets.blocks[: unfinished[-1] + 1]):
            tick = _Tick(self._progress, index * steps, len(self.targets.blocks) * steps)
            if index not in unfinished:
                if runner:
                    self._forward_finished(runner, block, store.load(block), tick)
                continue
            start = time.monotonic()
            pruned = self._prune_and_advance(block, runner, tick)
            if (
                index == 0
                and runner
                and (fewer := self._too_many_samples(time.monotonic() - start, len(runner.hidden)))
            ):
                self.fitted_samples = fewer
                store.keep_fitted_samples(fewer)
                runner = self._runner()
                start = time.monotonic()
                pruned = self._prune_and_advance(block, runner, tick)
            tick.to_end(index + 1, steps)
            if not announced:
                self._announce_cost(time.monotonic() - start, len(self.targets.blocks) - index)
                announced = True
            yield pruned

    def _runner(self) -> BlockRunner | None:
        tokens = self._calibration_tokens()
        if tokens is None or (self.needs == "nothing" and "blocks" not in self.settings.refine):
            return None
        with self.clock("calibrate"):
            return BlockRunner(
                self._model, self.checkpoint, self.targets, tokens, compute=self.compute,
                with_dense=self.needs == "drift" or "blocks" in self.settings.refine,
            )  # fmt: skip

    def _prune_and_advance(self, block: Block, runner: BlockRunner | None, tick: Callable[[], None]) -> PrunedBlock:
        with runner.block(block) if runner else nullcontext():
            pruned = self._prune_block(block, runner, tick)
            if runner and not self.settings.one_pass:
                with self.clock("calibrate"):
                    runner.advance(block, self._by_parameter(block, pruned.weights), tick)
        return pruned

    def _too_many_samples(self, seconds: float, samples: int) -> int | None:
        """How many calibration sequences a preset can afford, if fewer than the first block, so slow, was pruned on."""
        minutes = self.settings.minutes
        if minutes is None or "samples" not in self.settings.from_preset or self.fitted_samples is not None:
            return None
        spent = (time.monotonic() - self._started) / 60
        whole = seconds * len(self.targets.blocks) / 60
        room = _PRUNING_SHARE * minutes - spent
        if spent - seconds / 60 + whole <= _PRUNING_SHARE * minutes:
            return None
        fewer = max(_LEAST_SAMPLES, int(samples * room / whole))
        if fewer >= samples:
            return None
        self._announce(
            f"One block took {seconds:.1f} s, so all on {samples} calibration sequences would take too much of "
            f"{minutes:g} minutes: {fewer} are used instead. To use more, give --samples or more --minutes."
        )
        return fewer

    def _announce_cost(self, seconds: float, blocks: int) -> None:
        """Says how long it will all take, from one block that was pruned, before most of it is done."""
        spent = (time.monotonic() - self._started) / 60
        total = spent + seconds * (blocks - 1) / 60
        text = f"One block took {seconds:.1f} s; pruning all will have taken about {total:.1f} minutes"
        if minutes := self.settings.minutes:
            text += f", and distillation goes on until minute {minutes:g}"
            if total >= minutes:
                text += ": there will be no time left for it, so give more --minutes, or fewer --samples"
        elif self.settings.steps:
            text += f", and {self.settings.steps} steps of distillation follow"
        self._announce(f"{text}.")

    def distill(self, store: BlockStore) -> Iterator[PrunedBlock]:
        """Trains the whole pruned model towards the dense one and yields every block again.

        `validations` then tells how it went. Needs memory for the dense model and five times the pruned one in float32.
        """
        with self.clock("distill"):
            tokens, _ = self._windows_to_train_and_to_judge()
            teacher = self._load_whole(self.compute)
            student = self._load_whole(torch.float32)
            keep_masks = self._put_pruned(student, store)
            first = self.targets.blocks[0].name
            distillation = Distillation(
                student, teacher, keep_masks, first.rpartition(".")[0] + ".", tokens,
                compute=self.compute, seed=self.settings.seed, store=store, progress=self._progress,
            )  # fmt: skip
            self.validations = distillation.run(self._budget())
            distillation.save()
        for block in self.targets.blocks:
            yield self._distilled(student, block)

    def find_dense(self, store: BlockStore) -> list[str]:
        """The linears to leave dense for `max_perplexity_ratio`. See `keep_dense`."""
        assert self.settings.max_perplexity_ratio is not None
        linears = {linear.name: linear.tensor for block in self.targets.blocks for linear in block.linears}
        with self.clock("keep dense"), autocast(self.compute):
            _, windows = self._windows_to_train_and_to_judge()
            model = self._load_whole(torch.float32)
            dense = dense_perplexity(model, windows)
            self._put_pruned(model, store)
            return keep_dense.find_dense(
                model, lambda name: self.checkpoint.read([linears[name]])[linears[name]].float(),
                fused_sets(linears), windows, dense_perplexity=dense,
                max_ratio=self.settings.max_perplexity_ratio, progress=self._progress,
            )  # fmt: skip

    def permuted(self, names: Iterable[str]) -> dict[str, PrunedWeight]:
        """Those of the checkpoint's tensors `names` that `permute` reordered."""
        return {**self.checkpoint.read(name for name in names if name in (self.orders or {}))}

    def with_dense(self, block: Block, finished: Mapping[str, Tensor], names: Collection[str]) -> PrunedBlock:
        """`block`, all of whose tensors are `finished`, with the linears of `names` as they were before pruning."""
        linears = {linear.tensor: linear for linear in block.linears}
        weights: dict[str, PrunedWeight] = dict(finished)
        results = []
        before = self.checkpoint.read(linears)
        for tensor, linear in linears.items():
            if linear.name in names:
                weights[tensor] = before[tensor].to(self._stored(before[tensor].dtype))
                continue
            weights[tensor] = self._to_store(tensor, finished[tensor], True)
            results.append(_result(linear, before[tensor], weights[tensor], None, 0.0))
        return PrunedBlock(block, weights, results)

    def check(self, store: BlockStore) -> Check | None:
        """Perplexity of the dense and of the pruned model on the windows held back; None, and why is said, without."""
        if self.data is None or not self.targets.head:
            return None
        held_back = self.data.held_back
        if not len(held_back):
            self._announce("Not checked: there is too little calibration text to hold any back.")
            return None
        count = self.checkpoint.parameter_count
        dtype = torch.float32 if count <= FP32_PARAMETERS else torch.bfloat16
        needed, free = dtype.itemsize * count, memory.available_bytes()
        if needed > free:
            self._announce(
                f"Not checked: that needs the whole model, {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free."
            )
            return None
        with self.clock("check"), autocast(self.compute):
            model = self._load_whole(dtype)
            dense = dense_perplexity(model, held_back, stage="check dense", progress=self._progress)
            self._put_pruned(model, store)
            pruned = perplexity(model, held_back, stage="check pruned", progress=self._progress)
        windows, seqlen = held_back.shape
        found = Check(windows=windows, seqlen=seqlen, dense=round(dense, 3), pruned=round(pruned, 3))
        if not found.ratio <= POOR_RATIO:
            self._announce(
                f"Perplexity on held-back text is {found.ratio:.1f} times the dense model's, so expect poor text. "
                f"Next: {self._next_step()}."
            )
        return found

    def _next_step(self) -> str:
        s = self.settings
        if self.method.needs not in ("gram", "drift"):
            return "another method; the default one also solves for the kept weights"
        if s.calibration == "self":
            return "--calibration FILE, with text like that which the model is to read and write"
        if "distill" not in s.refine:
            return "--quality balanced, which also trains the kept weights, in ten minutes"
        return "--quality best, or --sparsity auto, which leaves the most sensitive linears dense"

    def _load_whole(self, dtype: torch.dtype) -> Any:
        return load_whole_model(
            self.checkpoint.folder, dtype=dtype, trust_remote_code=self.checkpoint.trust_remote_code
        )

    def _budget(self) -> Budget:
        """What is left of the minutes; of an earlier run that was stopped, only what it distilled counts."""
        minutes = self.settings.minutes
        if minutes is not None:
            minutes = max(0.0, minutes - (time.monotonic() - self._started) / 60)
        return Budget(minutes, self.settings.steps)

    def _windows_to_train_and_to_judge(self) -> tuple[Tensor, Tensor]:
        """Of one text: distillation learns from the first, and a perplexity budget, if any, holds on the second."""
        windows = self._windows()
        judged = 0 if self.settings.max_perplexity_ratio is None else min(keep_dense.WINDOWS, (len(windows) + 1) // 2)
        return windows[: len(windows) - judged], windows[len(windows) - judged :]

    def _windows(self) -> Tensor:
        """(W, SEQLEN) or narrower: all there is of the calibration text, or what the model sampled."""
        data = self.load_data()
        assert data is not None
        tokens = data.tokens
        sampled = tokens if self.settings.calibration == "self" else tokens[self._conversation_rows(len(tokens))]
        width = min(SEQLEN, tokens.shape[1]) if len(sampled) else SEQLEN
        sampled = sampled[:, : tokens.shape[1] // width * width].reshape(-1, width)
        if self.settings.calibration == "self":
            return sampled
        needed = max(1, _TRAINING_WINDOWS * width // tokens.shape[1])
        text = CalibrationText(
            self.settings.calibration, self.checkpoint, seqlen=tokens.shape[1], needed=needed,
            column=self.settings.text_column,
        ).windows(width, self.settings.seed)  # fmt: skip
        if not len(sampled):
            return text
        often = max(1, len(text) // (_EVERY_CONVERSATION - 1) // len(sampled))
        # Text comes last, since that is what is held back: conversations are there several times.
        return torch.cat([sampled.repeat(often, 1), text])

    def _put_pruned(self, student: nn.Module, store: BlockStore) -> dict[str, Tensor]:
        """Puts the tensors of all blocks into `student`; returns the keep_masks by parameter."""
        masks = {}
        places = student.state_dict()
        outside = self.checkpoint.read(self.targets.outside)  # they may be permuted
        for name, tensor in self.targets.tensor_of.items():
            if tensor in outside and name in places:
                places[name].copy_(outside[tensor])
        for block in self.targets.blocks:
            stored = store.load(block)
            pruned = {linear.tensor for linear in block.linears}
            for name, tensor in self._parameters(block).items():
                places[name].copy_(stored[tensor])
                if tensor in pruned:
                    masks[name] = stored[tensor] != 0
        return masks

    def _by_parameter(self, block: Block, weights: Mapping[str, PrunedWeight]) -> dict[str, Tensor]:
        """Those of `weights`, by tensor name, that the block's parameters are made of: dense, by parameter name."""
        return {
            name: packing.unpack(weights[tensor], name)
            for name, tensor in self._parameters(block).items()
            if tensor in weights
        }

    def _parameters(self, block: Block) -> dict[str, str]:
        """Parameter or buffer of the model -> tensor of the checkpoint, of one block.

        A tensor that the model has no place for, as older checkpoints hold some, is not among them.
        """
        own = set(block.tensors)
        return {
            name: tensor for name, tensor in self.targets.tensor_of.items() if tensor in own and name in self._places
        }

    def _distilled(self, student: nn.Module, block: Block) -> PrunedBlock:
        linears = {linear.tensor: linear for linear in block.linears}
        weights: dict[str, PrunedWeight] = {}
        results = []
        before = self.checkpoint.read(linears)
        parameters = dict(student.named_parameters())
        for name, tensor in self._parameters(block).items():
            parameter = parameters.get(name)
            if parameter is None or not parameter.requires_grad:
                continue
            linear = linears.get(tensor)
            weights[tensor] = self._to_store(tensor, parameter.detach().cpu(), linear is not None)
            if linear:
                results.append(_result(linear, before[tensor], weights[tensor], None, 0.0))
        return PrunedBlock(block, weights, results)

    def stored_dtype(self, linear: Linear) -> torch.dtype:
        """The type that the weight of `linear` is written in."""
        dtype = self.checkpoint.tensors[linear.tensor].dtype
        assert dtype is not None, "find_targets refuses others"
        return self._stored(dtype)

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return DTYPES[self.settings.dtype] if self.settings.dtype else dtype

    def _forward_finished(
        self, runner: BlockRunner, block: Block, weights: Mapping[str, Tensor], tick: Callable[[], None]
    ) -> None:
        with self.clock("calibrate"), runner.block(block):
            runner.advance_dense(block)
            runner.advance(block, {} if self.settings.one_pass else self._by_parameter(block, weights), tick)

    def _prune_block(self, block: Block, runner: BlockRunner | None, tick: Callable[[], None]) -> PrunedBlock:
        stats: dict[str, InputStats] = {}
        if runner:
            with self.clock("calibrate"):
                stats = runner.collect(block, self.needs, tick, advance=self.settings.one_pass)
                _check_inputs(stats, block, self.checkpoint.folder)
        with self.clock("read"):
            dense = self.checkpoint.read(linear.tensor for linear in block.linears)
        weights: dict[str, PrunedWeight] = {}
        seconds: dict[str, float] = {}
        for linears in self._together(block, stats):
            layer_stats = stats.get(linears[0].name)
            before = [dense[linear.tensor] for linear in linears]
            start = time.perf_counter()
            after = self._prune_linears(linears, before, layer_stats or InputStats(token_count=0))
            elapsed = time.perf_counter() - start
            self.clock.seconds["mask"] += elapsed
            size = sum(weight.numel() for weight in before)
            for linear, old, new in zip(linears, before, after, strict=True):
                seconds[linear.name] = elapsed * old.numel() / size
                weights[linear.tensor] = new
        if runner and "blocks" in self.settings.refine:
            with self.clock("refine blocks"):
                weights = self._refine_block(block, weights, runner, tick)
        with self.clock("output error"):
            results = [
                _result(
                    linear, dense[linear.tensor], weights[linear.tensor], stats.get(linear.name), seconds[linear.name]
                )
                for linear in block.linears
            ]
        return PrunedBlock(block, weights, results)

    def _refine_block(
        self, block: Block, weights: dict[str, PrunedWeight], runner: BlockRunner, tick: Callable[[], None]
    ) -> dict[str, PrunedWeight]:
        pruned = self._by_parameter(block, weights)
        keep_masks = {name: weight != 0 for name, weight in pruned.items()}
        refined = refine_blocks.refine(runner, block, pruned, keep_masks, tick)
        parameters = self._parameters(block)
        return {
            parameters[name]: self._to_store(parameters[name], weight, name in pruned)
            for name, weight in refined.items()
        }

    def _to_store(self, tensor: str, weight: Tensor, sparse: bool) -> PrunedWeight:
        """A trained fp32 weight as it is written. Raises FormatError where its type cannot hold it."""
        dtype = self.checkpoint.tensors[tensor].dtype
        assert dtype is not None
        weight = weight.to(self._stored(dtype))
        if sparse and self.pattern.name == spec.FORMAT:
            return packing.pack(weight, tensor)
        check_finite(weight, tensor)
        return weight

    def _together(self, block: Block, stats: Mapping[str, InputStats]) -> list[list[Linear]]:
        """The linears of a block in order; those on the same inputs together, where methods share what inputs cost."""
        if self.method.prune is None or not self.pattern.structured or not stats:
            return [[linear] for linear in block.linears]
        sharing: dict[int, list[Linear]] = defaultdict(list)
        for linear in block.linears:
            sharing[id(stats[linear.name])].append(linear)
        return list(sharing.values())

    def _prune_linears(self, linears: list[Linear], weights: list[Tensor], stats: InputStats) -> list[PrunedWeight]:
        # One that does not fit its new type becomes infinite and is refused.
        weights = [weight.to(self._stored(weight.dtype)) for weight in weights]
        if self.method.factors and "weights" not in self.settings.refine and self.pattern.name == spec.FORMAT:
            factors = self.method.factors(weights[0], stats, self.pattern.group)
            return [packing.prune_and_pack(weights[0], factors, linears[0].tensor)]
        for linear, weight in zip(linears, weights, strict=True):
            check_finite(weight, linear.tensor)
        whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        given = None
        if self._masks:
            given = torch.cat([self._given_mask(*pair) for pair in zip(linears, weights, strict=True)])
        pruned = self._prune_dense(whole, stats, linears[0].name, given).to(whole.dtype)
        parts = torch.split(pruned, [len(weight) for weight in weights])
        if self.pattern.name != spec.FORMAT:
            return list(parts)
        return [packing.pack(part, linear.tensor) for part, linear in zip(parts, linears, strict=True)]

    def _given_mask(self, linear: Linear, weight: Tensor) -> Tensor:
        assert self._masks is not None
        mask = self._masks.read(linear.tensor, (weight.shape[0], weight.shape[1]), self.pattern)
        return weight != 0 if mask is None else mask

    def _prune_dense(self, weight: Tensor, stats: InputStats, name: str, given: Tensor | None) -> Tensor:
        """`weight` (N, K) with zeros in place, its kept weights refined where that is asked for.

        `given` is a keep_mask that was made elsewhere.
        """
        if given is not None:
            keep_mask = given
            pruned = torch.where(keep_mask, weight, 0)
        elif self.method.prune is not None:
            pruned = self.method.prune(weight, stats, self.pattern, name)
            keep_mask = pruned != 0
        else:
            assert self.method.factors is not None
            group = self.pattern.group if self.pattern.structured else weight.shape[1]
            scores = self.method.factors(weight, stats, group).scores(weight)
            if self.pattern.structured:  # a zero never takes the place of a weight whose score is 0 too
                scores.masked_fill_(weight == 0, -torch.inf)
            keep_mask = select(scores, self.pattern)
            pruned = torch.where(keep_mask, weight, 0)
        if "weights" not in self.settings.refine:
            return pruned
        assert stats.gram is not None
        return refine_weights(weight, keep_mask, stats.gram, stats.drift(weight))


class _Tick:
    """Counts forwards of one block into the progress of the whole run."""

    def __init__(self, progress: Progress, start: int, total: int, stage: str = "prune") -> None:
        self._progress, self._done, self._total, self._stage = progress, start, total, stage

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._stage, self._done, self._total)

    def to_end(self, blocks: int, steps: int) -> None:
        self._progress(self._stage, blocks * steps, self._total)


def prune(
    model: str | Path, settings: PruneSettings | None = None, *, progress: Progress = silent
) -> Iterator[PrunedBlock]:
    """Prunes a checkpoint without writing anything.

    `model` is a local folder or a hub id. Yields each decoder block as soon as it is done, so that only one is in
    memory; with `refine=("distill",)` or `max_perplexity_ratio`, which work on the whole model, all of them at the end.
    `weights` of a block holds all of its tensors that differ from the checkpoint's: with `permute`, which reorders
    channels throughout the network, these are norms and biases too, and a last item without linears holds those
    outside of the blocks (embeddings, head). `swiftprune.unpack` makes any of them dense. To write the result use
    `exporters.export`.

    >>> for done in prune("./my-model", PruneSettings(method="wanda", calibration="text.txt")):  # doctest: +SKIP
    ...     print(done.block.name, [layer.output_error for layer in done.results])
    """
    pipeline = Pipeline(Checkpoint.open(model), settings or PruneSettings(), progress=progress)
    if "distill" in pipeline.settings.refine or pipeline.settings.max_perplexity_ratio is not None:
        pipeline.run(store := MemoryStore(pipeline))
        done: Iterable[PrunedBlock] = store.blocks.values()
    else:
        done = pipeline.blocks()
    for block in done:
        yield dataclasses.replace(block, weights=pipeline.permuted(block.block.tensors) | block.weights)
    if outside := pipeline.permuted(pipeline.targets.outside):
        yield PrunedBlock(Block("", [], list(outside)), outside, [])


def kept_energy(before: Tensor, after: Tensor) -> float:
    """Sum of squares of `after` over that of `before`; 1 when both are all zeros."""
    energy = float(torch.linalg.vector_norm(before, dtype=torch.float32))
    return (float(torch.linalg.vector_norm(after, dtype=torch.float32)) / energy) ** 2 if energy else 1.0


def check_finite(weight: Tensor, name: str) -> None:
    """Raises FormatError with the index of the first element of `weight` that is NaN or infinite."""
    if weight.is_meta:
        raise FormatError(f"{name}: is on the meta device, which holds no numbers; load the weights first")
    if not weight.numel() or torch.isfinite(torch.stack(torch.aminmax(weight))).all():  # in one pass
        return
    index = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
    raise FormatError(f"{name}: weight {index} is {weight[index].item()}; NaN and infinities cannot be pruned")


def _check_inputs(stats: dict[str, InputStats], block: Block, folder: Path) -> None:
    """Raises CheckpointError for inputs that are not finite, since scores of NaN would order nothing, or that lack."""
    for linear in block.linears:
        name = linear.name
        if name not in stats:
            raise CheckpointError(
                f"{folder}: {name} did not run on the calibration text, so nothing is known of its inputs; leave it "
                "dense with --ignore"
            )
        seen = stats[name].channel_energy
        if torch.isfinite(seen).all():
            continue
        channel = int((~torch.isfinite(seen)).nonzero()[0])
        raise CheckpointError(
            f"{folder}: input channel {channel} of {name} is not finite on the calibration text, though all "
            "weights are: the model computes numbers that are too large"
        )


def _without_distill(settings: PruneSettings) -> dict[str, Any]:
    """The fields of `settings` that leaving distillation out changes."""
    rest = tuple(stage for stage in settings.refine if stage != "distill")
    return {"refine": rest, "minutes": None, "steps": None}


def _first_of(reasons: Mapping[str, str]) -> str:
    return next(f"{name}: {reason}" for name, reason in reasons.items())


def _result(
    linear: Linear, before: Tensor, after: PrunedWeight, stats: InputStats | None, seconds: float
) -> LayerResult:
    kept = after.values if isinstance(after, Packed24) else after
    error = None
    if stats is not None and stats.sample is not None:
        dense = before.float()
        change = torch.linalg.matrix_norm(stats.sample @ (packing.unpack(after, linear.name).float() - dense).T)
        error = float(change / torch.linalg.matrix_norm(stats.sample @ dense.T).clamp_min(1e-30))
    return LayerResult(
        name=linear.name,
        shape=(before.shape[0], before.shape[1]),
        sparsity=1 - int(torch.count_nonzero(kept)) / before.numel(),
        kept_energy=kept_energy(before, kept),
        output_error=error,
        mask_seconds=seconds,
    )
