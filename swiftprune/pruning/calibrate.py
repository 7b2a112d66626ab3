"""Runs decoder blocks one at a time on calibration tokens and records what enters each linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swiftprune.pruning.checkpoint import Checkpoint
from swiftprune.pruning.score import InputStats, Needs
from swiftprune.pruning.targets import Block, Targets, decoder_blocks

# Tokens whose inputs are kept to measure a linear's output error.
SAMPLE_TOKENS = 256


class BlockRunner:
    """The hidden states of all calibration samples, moved through the model block by block.

    One block's weights are in memory at a time, in fp32. `hidden` holds one (1, T, H) fp32 tensor per sample: the
    input of the next block.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, targets: Targets, tokens: Tensor) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._tensor_of = targets.tensor_of
        _, modules = decoder_blocks(model)
        self._modules = {block.name: module for block, module in zip(targets.blocks, modules, strict=True)}
        self._arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.hidden = self._embed(tokens)

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
        out = self._modules[block.name](hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def collect(self, block: Block, needs: Needs, tick: Callable[[], None]) -> dict[str, InputStats]:
        """Runs the loaded block on every sample and returns, by linear name, what entered it. `hidden` stays."""
        stats: dict[str, InputStats] = {}
        recorder = _Recorder(stats, needs, max(1, SAMPLE_TOKENS // len(self.hidden)))
        hooks = [
            self._model.get_submodule(linear.name).register_forward_pre_hook(recorder.hook(linear.name))
            for linear in block.linears
        ]
        try:
            for hidden in self.hidden:
                recorder.new_sample()
                self._run(block, hidden)
                tick()
        finally:
            for hook in hooks:
                hook.remove()
        return stats

    @torch.no_grad()
    def advance(self, block: Block, pruned: dict[str, Tensor], tick: Callable[[], None]) -> None:
        """Puts `pruned` weights, by linear name, into the loaded block and moves `hidden` through it."""
        for name, weight in pruned.items():
            self._put(f"{name}.weight", nn.Parameter(weight.float(), requires_grad=False))
        for index, hidden in enumerate(self.hidden):
            self.hidden[index] = self._run(block, hidden)
            tick()


class _Recorder:
    """Accumulates InputStats; linears that are fed the same tensor (q, k, v) share one object and its cost."""

    def __init__(self, stats: dict[str, InputStats], needs: Needs, tokens_kept: int) -> None:
        self._stats = stats
        self._needs = needs
        self._tokens_kept = tokens_kept
        self._seen: list[tuple[Tensor, InputStats]] = []

    def new_sample(self) -> None:
        self._seen = []

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tensor = args[0]
            for seen, stats in self._seen:
                if seen is tensor:
                    self._stats[name] = stats
                    return
            stats = self._stats.setdefault(name, InputStats(token_count=0))
            self._seen.append((tensor, stats))
            self._add(stats, tensor.reshape(-1, tensor.shape[-1]).float())

        return record

    def _add(self, stats: InputStats, inputs: Tensor) -> None:
        stats.token_count += len(inputs)
        step = max(1, len(inputs) // self._tokens_kept)
        rows = inputs[step // 2 :: step][: self._tokens_kept].clone()
        stats.sample = rows if stats.sample is None else torch.cat((stats.sample, rows))
        if self._needs == "gram":
            if stats.gram is None:
                stats.gram = torch.zeros(inputs.shape[1], inputs.shape[1])
            stats.gram.addmm_(inputs.T, inputs)
        else:
            squares = inputs.square().sum(0)
            stats.input_sq_sum = squares if stats.input_sq_sum is None else stats.input_sq_sum + squares
