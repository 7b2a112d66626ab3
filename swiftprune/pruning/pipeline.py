"""The pruning pipeline: calibrate, score, mask and refine, one decoder block after the other."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from swiftprune.errors import CheckpointError, FormatError, SettingsError
from swiftprune.pruning.calibrate import BlockRunner
from swiftprune.pruning.calibration_text import calibration_tokens
from swiftprune.pruning.checkpoint import Checkpoint
from swiftprune.pruning.mask import Pattern, select
from swiftprune.pruning.progress import Progress, silent
from swiftprune.pruning.score import InputStats, find_method
from swiftprune.pruning.sparsegpt import sparsegpt
from swiftprune.pruning.targets import DEFAULT_IGNORE, Block, Linear, Targets, compile_ignore, empty_model, find_targets
from swiftprune.sparse24 import format as format24
from swiftprune.sparse24.format import Packed24

DtypeName = Literal["bfloat16", "float16", "float32"]
DTYPES: dict[DtypeName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

PrunedWeight = Packed24 | Tensor
"""A pruned weight: packed when the pattern is 2:4, else dense (N, K) with zeros."""


class PruneSettings(BaseModel):
    """What to prune and how; equal settings on an equal checkpoint give equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = "2:4"
    method: str = ""
    """A key of METHODS. Empty: `swiftprune`, or `swiftprune-data-free` without calibration."""
    calibration: str = "self"
    """`none`, `self`, a text file, or a data set id."""
    samples: int = Field(default=32, ge=1)
    seqlen: int = Field(default=512, ge=1)
    seed: int = 0
    ignore: str = DEFAULT_IGNORE
    dtype: DtypeName | None = None
    """Type of the written weights; None keeps that of the checkpoint."""

    def resolved(self) -> PruneSettings:
        """The same with defaults that depend on each other filled in. Raises SettingsError where they clash."""
        Pattern.parse(self.pattern)
        compile_ignore(self.ignore)
        name = self.method or ("swiftprune-data-free" if self.calibration == "none" else "swiftprune")
        method = find_method(name)
        if method.needs == "nothing":
            return self.model_copy(update={"method": name, "calibration": "none"})
        if self.calibration == "none":
            raise SettingsError(f"--method {name} needs calibration data; give --calibration self or a text file, "
                                "or use a data-free method (swiftprune-data-free, magnitude)")  # fmt: skip
        return self.model_copy(update={"method": name})


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


@dataclass
class PrunedBlock:
    """One finished decoder block."""

    block: Block
    weights: dict[str, PrunedWeight]
    """By tensor name in the checkpoint."""
    results: list[LayerResult]


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
    """A pruning run over one checkpoint. Making it checks settings and headers; iterating does the work.

    Blocks come in order, each pruned on the outputs of the pruned blocks before it. `clock` fills up on the way.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: PruneSettings, *, tokens: Tensor | None = None,
        progress: Progress = silent,
    ) -> None:  # fmt: skip
        checkpoint.refuse_quantized()
        self.checkpoint = checkpoint
        self.settings = settings.resolved()
        self.pattern = Pattern.parse(self.settings.pattern)
        self.method = find_method(self.settings.method)
        self.clock = StageClock()
        self.tokens = tokens
        self._progress = progress
        self._model = empty_model(checkpoint)
        group = self.pattern.group if self.pattern.structured else 1
        self.targets: Targets = find_targets(self._model, checkpoint, ignore=self.settings.ignore, group=group)

    def load_tokens(self) -> Tensor | None:
        """The (samples, seqlen) calibration tokens, made on the first call; None when the method needs none."""
        if self.tokens is None and self.method.needs != "nothing":
            with self.clock("calibration text"):
                s = self.settings
                self.tokens = calibration_tokens(
                    s.calibration, self.checkpoint,
                    samples=s.samples, seqlen=s.seqlen, seed=s.seed, progress=self._progress,
                )  # fmt: skip
        return self.tokens

    def blocks(
        self, finished: Callable[[Block], Mapping[str, Tensor] | None] = lambda _: None
    ) -> Iterator[PrunedBlock]:
        """Prunes block after block.

        `finished` gives the dense pruned weights, by tensor name, of a block that an earlier run completed; such a
        block is only run forward (when there is calibration) and is not yielded.
        """
        tokens = self.load_tokens()
        runner = None
        if tokens is not None:
            with self.clock("calibrate"):
                runner = BlockRunner(self._model, self.checkpoint, self.targets, tokens)
        steps = 2 * len(tokens) if tokens is not None else 1
        for index, block in enumerate(self.targets.blocks):
            tick = _Tick(self._progress, index * steps, len(self.targets.blocks) * steps)
            if (weights := finished(block)) is not None:
                if runner:
                    self._forward_finished(runner, block, weights, tick)
                continue
            with runner.block(block) if runner else nullcontext():
                pruned = self._prune_block(block, runner, tick)
                if runner:
                    dense = {
                        linear.name: _dense(pruned.weights[linear.tensor], linear.name) for linear in block.linears
                    }
                    with self.clock("calibrate"):
                        runner.advance(block, dense, tick)
            tick.to_end(index + 1, steps)
            yield pruned

    def _forward_finished(
        self, runner: BlockRunner, block: Block, weights: Mapping[str, Tensor], tick: Callable[[], None]
    ) -> None:
        with self.clock("calibrate"), runner.block(block):
            runner.advance(block, {linear.name: weights[linear.tensor] for linear in block.linears}, tick)

    def _prune_block(self, block: Block, runner: BlockRunner | None, tick: Callable[[], None]) -> PrunedBlock:
        stats: dict[str, InputStats] = {}
        if runner:
            with self.clock("calibrate"):
                stats = runner.collect(block, self.method.needs, tick)
                _check_inputs(stats, block, self.checkpoint)
        with self.clock("read"):
            dense = self.checkpoint.read(linear.tensor for linear in block.linears)
        weights: dict[str, PrunedWeight] = {}
        results = []
        for linear in block.linears:
            before = dense.pop(linear.tensor)
            layer_stats = stats.get(linear.name)
            weight, seconds = self._prune_linear(linear, before, layer_stats)
            self.clock.seconds["mask"] += seconds
            with self.clock("output error"):
                results.append(_result(linear, before, weight, layer_stats, seconds))
            weights[linear.tensor] = weight
        return PrunedBlock(block, weights, results)

    def _prune_linear(self, linear: Linear, weight: Tensor, stats: InputStats | None) -> tuple[PrunedWeight, float]:
        stats = stats or InputStats(token_count=0)
        if self.settings.dtype:
            weight = weight.to(DTYPES[self.settings.dtype])  # one that does not fit becomes infinite and is refused
        start = time.perf_counter()
        pruned: PrunedWeight
        if self.method.factors is None:
            assert stats.gram is not None
            check_finite(weight, linear.tensor)
            pruned = sparsegpt(weight, stats.gram, self.pattern, linear.name).to(weight.dtype)
            if self.pattern.name == format24.FORMAT:
                pruned = format24.pack(pruned, linear.tensor)
        else:
            factors = self.method.factors(
                weight, stats, self.pattern.group if self.pattern.structured else weight.shape[1]
            )
            if self.pattern.name == format24.FORMAT:
                pruned = format24.prune_and_pack(weight, factors, linear.tensor)
            else:
                check_finite(weight, linear.tensor)
                pruned = torch.where(select(factors.scores(weight), self.pattern), weight, 0)
        return pruned, time.perf_counter() - start


class _Tick:
    """Counts forwards of one block into the progress of the whole run."""

    def __init__(self, progress: Progress, start: int, total: int) -> None:
        self._progress, self._done, self._total = progress, start, total

    def __call__(self) -> None:
        self._done += 1
        self._progress("prune", self._done, self._total)

    def to_end(self, blocks: int, steps: int) -> None:
        self._progress("prune", blocks * steps, self._total)


def prune(
    model: str | Path, settings: PruneSettings | None = None, *, progress: Progress = silent
) -> Iterator[PrunedBlock]:
    """Prunes a checkpoint block by block without writing anything.

    `model` is a local folder or a hub id. Yields each decoder block as soon as it is done, so that only one is in
    memory. To write the result use `exporters.export`.

    >>> for done in prune("./my-model", PruneSettings(method="wanda", calibration="text.txt")):  # doctest: +SKIP
    ...     print(done.block.name, [layer.output_error for layer in done.results])
    """
    yield from Pipeline(Checkpoint.open(model), settings or PruneSettings(), progress=progress).blocks()


def _dense(weight: PrunedWeight, name: str) -> Tensor:
    return format24.unpack(weight, name) if isinstance(weight, Packed24) else weight


def kept_energy(before: Tensor, after: Tensor) -> float:
    """Sum of squares of `after` over that of `before`; 1 when both are all zeros."""
    energy = float(torch.linalg.vector_norm(before, dtype=torch.float32))
    return (float(torch.linalg.vector_norm(after, dtype=torch.float32)) / energy) ** 2 if energy else 1.0


def check_finite(weight: Tensor, name: str) -> None:
    """Raises FormatError with the index of the first element of `weight` that is NaN or infinite."""
    finite = torch.isfinite(weight)
    if not finite.all():
        index = tuple((~finite).nonzero()[0].tolist())
        raise FormatError(f"{name}: weight {index} is {weight[index].item()}; NaN and infinities cannot be pruned")


def _check_inputs(stats: dict[str, InputStats], block: Block, checkpoint: Checkpoint) -> None:
    """Scores of NaN would order nothing: better to stop, and to name the weight behind it."""
    for name, layer in stats.items():
        seen = layer.gram.diagonal() if layer.gram is not None else layer.input_sq_sum
        if seen is None or torch.isfinite(seen).all():
            continue
        for tensor_name, tensor in checkpoint.read(block.tensors).items():
            check_finite(tensor, tensor_name)
        channel = int((~torch.isfinite(seen)).nonzero()[0])
        raise CheckpointError(
            f"{checkpoint.folder}: input channel {channel} of {name} is not finite on the calibration text, though the "
            "weights of its block are; look for NaN or infinities in the embedding"
        )


def _result(
    linear: Linear, before: Tensor, after: PrunedWeight, stats: InputStats | None, seconds: float
) -> LayerResult:
    kept = after.values if isinstance(after, Packed24) else after
    error = None
    if stats is not None and stats.sample is not None:
        dense = before.float()
        change = torch.linalg.matrix_norm(stats.sample @ (_dense(after, linear.name).float() - dense).T)
        error = float(change / torch.linalg.matrix_norm(stats.sample @ dense.T).clamp_min(1e-30))
    return LayerResult(
        name=linear.name,
        shape=(before.shape[0], before.shape[1]),
        sparsity=1 - int(torch.count_nonzero(kept)) / before.numel(),
        kept_energy=kept_energy(before, kept),
        output_error=error,
        mask_seconds=seconds,
    )
