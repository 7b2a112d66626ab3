"""Runs decoder blocks one at a time on calibration tokens and records what enters each linear."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swiftprune.pruning.checkpoint import Checkpoint
from swiftprune.pruning.compute import autocast
from swiftprune.pruning.refine_blocks import refine_block
from swiftprune.pruning.score import InputStats, Needs
from swiftprune.pruning.targets import RESIDUAL_WRITERS, Block, Linear, Targets, decoder_blocks
from swiftprune.sparse24.format import GROUP

# Tokens whose inputs are kept to measure a linear's output error.
SAMPLE_TOKENS = 256


class BlockRunner:
    """The hidden states of all calibration samples, moved through the model block by block.

    One block's weights are in memory at a time, in fp32; products are computed in `compute`. `hidden` holds one
    (1, T, H) fp32 tensor per sample: the input of the next block in the pruned model. `dense_hidden` is the same in the
    dense model, and None unless asked for.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, targets: Targets, tokens: Tensor, *,
        compute: torch.dtype = torch.float32, with_dense: bool = False,
    ) -> None:  # fmt: skip
        self._model = model
        self._compute = compute
        self._checkpoint = checkpoint
        self._tensor_of = targets.tensor_of
        _, modules = decoder_blocks(model)
        self._modules = {block.name: module for block, module in zip(targets.blocks, modules, strict=True)}
        self._arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.hidden = self._embed(tokens)
        self.dense_hidden = list(self.hidden) if with_dense else None

    @torch.no_grad()
    def _embed(self, tokens: Tensor) -> list[Tensor]:
        """Runs all but the blocks, which only note their arguments: masks and positions differ by kind of block."""
        base: Any = getattr(self._model, getattr(self._model, "base_model_prefix", ""), self._model)
        outside = [name for name, _ in self._model.named_parameters() if not name.startswith(tuple(self._modules))]
        base_modules = {id(module) for module in base.modules()}
        wanted = [name for name in outside if id(self._model.get_submodule(name.rpartition(".")[0])) in base_modules]
        hidden: list[Tensor] = []
        with self._loaded(wanted), self._recording(hidden):
            for row in tokens:
                base(input_ids=row[None], use_cache=False)
        return hidden

    @contextmanager
    def _recording(self, hidden: list[Tensor]) -> Iterator[None]:
        first = next(iter(self._modules))

        def record(name: str) -> Callable[..., Tensor]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                self._arguments[name] = (args, kwargs)
                if name == first:
                    hidden.append(hidden_states)
                return hidden_states

            return forward

        for name, module in self._modules.items():
            module.forward = record(name)
        try:
            yield
        finally:
            for module in self._modules.values():
                del module.forward

    @contextmanager
    def block(self, block: Block) -> Iterator[nn.Module]:
        """The module of `block` with its dense fp32 weights loaded; they are let go at the end."""
        module = self._modules[block.name]
        names = [f"{block.name}.{name}" for name, _ in module.named_parameters()]
        with self._loaded(names):
            yield module

    @contextmanager
    def _loaded(self, parameters: list[str]) -> Iterator[None]:
        """Puts the named parameters in place in fp32, and back on the meta device at the end."""
        tensor_of = {name: self._tensor_of[name] for name in parameters if name in self._tensor_of}
        tensors = self._checkpoint.read(tensor_of.values())
        meta = {name: self._model.get_parameter(name) for name in tensor_of}
        for name, tensor in tensor_of.items():
            self._put(name, nn.Parameter(tensors.pop(tensor).float(), requires_grad=False))
        try:
            yield
        finally:
            for name, parameter in meta.items():
                self._put(name, parameter)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(owner), leaf, parameter)

    def _run(self, block: Block, hidden: Tensor) -> Tensor:
        args, kwargs = self._arguments[block.name]
        with autocast(self._compute):
            out = self._modules[block.name](hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result.float()

    @torch.no_grad()
    def collect(
        self, block: Block, needs: Needs, tick: Callable[[], None], *, advance: bool = False
    ) -> dict[str, InputStats]:
        """Runs the loaded block on every sample and returns, by linear name, what entered it.

        `dense_hidden` moves on to the next block, `hidden` only with `advance`.
        """
        recorder = _Recorder(needs, max(1, SAMPLE_TOKENS // len(self.hidden)))
        for index, hidden in enumerate(self.hidden):
            recorder.new_sample()
            if self.dense_hidden is not None:
                dense = self.dense_hidden[index]
                with self._watched(block, recorder.keep_dense):
                    self.dense_hidden[index] = self._run(block, dense)
                recorder.residual_drift = (dense - hidden).flatten(0, -2)
            with self._watched(block, recorder.add):
                out = self._run(block, hidden)
            if advance:
                self.hidden[index] = out
            tick()
        return recorder.stats

    @contextmanager
    def _watched(self, block: Block, watch: Callable[[Linear, Tensor], None]) -> Iterator[None]:
        """Calls `watch` with every linear of `block` that runs and what enters it."""

        def hook(linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def watched(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                with autocast(torch.float32):  # what statistics are summed up in
                    watch(linear, args[0])

            return watched

        hooks = [
            self._model.get_submodule(linear.name).register_forward_pre_hook(hook(linear)) for linear in block.linears
        ]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    @torch.no_grad()
    def advance_dense(self, block: Block) -> None:
        """Moves `dense_hidden`, where there is one, through the loaded block, which must still be dense."""
        if self.dense_hidden is not None:
            self.dense_hidden = [self._run(block, hidden) for hidden in self.dense_hidden]

    def refine(
        self, block: Block, pruned: Mapping[str, Tensor], keep_masks: Mapping[str, Tensor], tick: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Puts `pruned` weights into the loaded block, trains it (see `refine_blocks`), and returns them by name.

        `dense_hidden` must be that behind the block, as `collect` leaves it. Names are those of parameters; what is
        returned has the block's norms and biases too.
        """
        assert self.dense_hidden is not None
        self._put_all(pruned)
        module = self._modules[block.name]
        names = [
            f"{block.name}.{name}"
            for name, parameter in module.named_parameters()
            if parameter.ndim == 1 or f"{block.name}.{name}" in pruned
        ]
        parameters = {name: self._model.get_parameter(name) for name in names}
        refine_block(functools.partial(self._run, block), parameters, keep_masks, self.hidden, self.dense_hidden, tick)
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def _put_all(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._put(name, nn.Parameter(weight.float(), requires_grad=False))

    @torch.no_grad()
    def advance(self, block: Block, pruned: Mapping[str, Tensor], tick: Callable[[], None]) -> None:
        """Puts `pruned` weights, by parameter name, into the loaded block and moves `hidden` through it."""
        self._put_all(pruned)
        for index, hidden in enumerate(self.hidden):
            self.hidden[index] = self._run(block, hidden)
            tick()


class _Recorder:
    """Accumulates InputStats; linears that are fed the same tensor (q, k, v) share one object and its cost."""

    def __init__(self, needs: Needs, tokens_kept: int) -> None:
        self.stats: dict[str, InputStats] = {}
        self.residual_drift: Tensor | None = None
        """(T, H): what the residual stream lacks in the sample at hand."""
        self._needs = needs
        self._tokens_kept = tokens_kept
        self._seen: list[tuple[Tensor, InputStats]] = []
        self._dense: dict[str, Tensor] = {}

    def new_sample(self) -> None:
        self._seen = []
        self._dense = {}

    def keep_dense(self, linear: Linear, inputs: Tensor) -> None:
        self._dense[linear.name] = inputs

    def add(self, linear: Linear, inputs: Tensor) -> None:
        for seen, stats in self._seen:
            if seen is inputs:
                self.stats[linear.name] = stats
                return
        stats = self.stats.setdefault(linear.name, InputStats(token_count=0))
        self._seen.append((inputs, stats))
        rows = _rows(inputs)
        stats.token_count += len(rows)
        step = max(1, len(rows) // self._tokens_kept)
        some = rows[step // 2 :: step][: self._tokens_kept].clone()
        stats.sample = some if stats.sample is None else torch.cat((stats.sample, some))
        if self._needs == "input_sq_sum":
            stats.input_sq_sum = _plus(stats.input_sq_sum, rows.square().sum(0))
        elif self._needs == "group_gram":
            groups = rows.T.reshape(-1, GROUP, len(rows))
            stats.group_gram = _plus(stats.group_gram, groups @ groups.mT)
        else:
            stats.gram = _plus_product(stats.gram, rows, rows)
        if self._needs == "drift":
            stats.input_drift = _plus_product(stats.input_drift, _rows(self._dense[linear.name]) - rows, rows)
            if linear.kind in RESIDUAL_WRITERS:
                assert self.residual_drift is not None
                stats.residual_drift = _plus_product(stats.residual_drift, self.residual_drift, rows)


def _rows(inputs: Tensor) -> Tensor:
    return inputs.reshape(-1, inputs.shape[-1]).float()


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total` + left^T right, in place: for wide layers a second (K, K) would be as large as a block."""
    return left.T @ right if total is None else total.addmm_(left.T, right)
