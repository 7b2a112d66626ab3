"""Runs decoder blocks one at a time on calibration tokens and records what enters each linear."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swiftprune.calibration.observers import InputObserver
from swiftprune.calibration.residual import residual_writers
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.compute import Compute, move_buffers
from swiftprune.errors import CheckpointError, SwiftpruneError, first_line
from swiftprune.methods.statistics import InputStats, Needs
from swiftprune.models.experts import Expert, all_experts
from swiftprune.models.plan import Block, Linear, Targets, decoder_blocks
from swiftprune.ranks import Ranks

logger = logging.getLogger(__name__)

_Arguments = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
"""By block, what the model hands to it beside the hidden states of one sample."""

# Tokens whose inputs are kept to measure a linear's output error.
SAMPLE_TOKENS = 256
# Of an expert's inputs: with fewer tokens than that it is calibrated on all, as if the router sent them there.
_SHARE_OF_INPUTS = 0.25
# Of a device's free memory: hidden states that take more stay on the CPU.
_SHARE_OF_HIDDEN = 0.3
# Of what a block adds to a token, on average, where that is the same but for biases rounded anew.
_SAME = 5e-3


class BlockRunner:
    """The hidden states of all calibration samples, moved through the model block by block.

    With `ranks`, the samples are those of this process, and statistics are of the samples of all.
    One block's weights are in memory at a time, in fp32, on the device of `compute`, which multiplies. `hidden` holds
    one (1, T, H) fp32 tensor per sample, on that device or, where all would take too much of its memory, on the CPU:
    the input of the next block in the pruned model. `dense_hidden` is the same in the dense model, and None unless
    asked for. Whatever else the model hands to its blocks (masks, positions, inputs that depend on the tokens, keys and
    values that blocks share) is kept for each sample, and for each of the two models.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        targets: Targets,
        tokens: Tensor,
        *,
        compute: Compute | None = None,
        track_dense: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._model = model
        self._compute = compute or Compute()
        move_buffers(model, self._compute.device)
        self._checkpoint = checkpoint
        self._tensor_of = targets.tensor_of
        _, modules = decoder_blocks(model)
        self._modules = {block.name: module for block, module in zip(targets.blocks, modules, strict=True)}
        self._arguments: list[_Arguments] = []
        self.hidden = self._embed(tokens)
        self._home = self._compute.device
        if not self._compute.on_cpu:
            taken = sum(hidden.nbytes for hidden in self.hidden) * (2 if track_dense else 1)
            if taken > _SHARE_OF_HIDDEN * self._compute.free_bytes():
                self._home = torch.device("cpu")
        self.hidden = [self._kept(hidden) for hidden in self.hidden]
        self.dense_hidden = list(self.hidden) if track_dense else None
        self._dense_arguments = (
            [_without_shared_containers(sample) for sample in self._arguments] if track_dense else []
        )
        self._warned = False

    @torch.no_grad()
    def _embed(self, tokens: Tensor) -> list[Tensor]:
        """Runs all but the blocks, which only note their arguments: these differ by block and by sample.

        Blocks return their hidden states, or these in a tuple: what the model takes is found by trying.
        Raises CheckpointError for one that does not hand them from each block to the next as they are.
        """
        base: Any = getattr(self._model, getattr(self._model, "base_model_prefix", ""), self._model)
        blocks = tuple(f"{name}." for name in self._modules)
        outside = [name for name in self._model.state_dict() if not name.startswith(blocks)]
        base_modules = {id(module) for module in base.modules()}
        wanted = [name for name in outside if id(self._model.get_submodule(name.rpartition(".")[0])) in base_modules]
        failure: Exception | None = None
        for in_tuple in (False, True):
            hidden: list[Tensor] = []
            self._arguments = []
            try:
                with self._loaded(wanted), self._recording(hidden, in_tuple):
                    for row in tokens:
                        self._arguments.append({})
                        base(input_ids=self._compute.here(row[None]), use_cache=False)
                        if len(self._arguments) > 1:
                            _share_equal_tensors(self._arguments[-1], self._arguments[-2])
                if len(hidden) < len(tokens):
                    raise _ChangedError(f"{next(iter(self._modules))} does not run on text")
                return hidden
            except SwiftpruneError:
                raise
            except Exception as error:  # of any type, from code that was given what it does not take
                if not isinstance(failure, _ChangedError):
                    failure = error
        assert failure is not None
        raise CheckpointError(
            f"{type(self._model).__name__}: cannot be calibrated block by block ({first_line(failure)}); prune it with "
            "--calibration none"
        ) from failure

    @contextmanager
    def _recording(self, hidden: list[Tensor], in_tuple: bool) -> Iterator[None]:
        names = list(self._modules)

        def record(name: str) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                arguments = self._arguments[-1]
                if name == names[0]:
                    hidden.append(hidden_states)
                if len(arguments) == len(names) or names[len(arguments)] != name:
                    raise _ChangedError(f"its blocks do not run one after the other, each once: {name}")
                if hidden_states is not hidden[-1] and not torch.equal(hidden_states, hidden[-1]):
                    raise _ChangedError(f"{name} is not given what the block before it returns")
                arguments[name] = (args, kwargs)
                return (hidden_states, None) if in_tuple else hidden_states

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
        names = [f"{block.name}.{name}" for name in module.state_dict()]
        with self._loaded(names):
            yield module

    @contextmanager
    def _loaded(self, names: list[str]) -> Iterator[None]:
        """Puts the named parameters and buffers in place in fp32, and what was there before back at the end."""
        tensor_of = {name: self._tensor_of[name] for name in names if name in self._tensor_of}
        tensors = self._checkpoint.read(set(tensor_of.values()))
        before = {name: self._put(name, tensors[tensor]) for name, tensor in tensor_of.items()}
        del tensors
        try:
            yield
        finally:
            for name, tensor in before.items():
                self._put(name, tensor)

    def _put(self, name: str, tensor: Tensor) -> Tensor:
        """Puts `tensor`, in fp32, in the place of a parameter or buffer; returns what was there."""
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        before: Tensor = getattr(module, leaf)
        if not tensor.is_meta:
            tensor = self._compute.here(tensor)  # in its own type, which is half as much to copy
        if isinstance(before, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.float(), requires_grad=False)
        elif not isinstance(before, nn.Parameter) and tensor.is_floating_point():
            tensor = tensor.float()
        setattr(module, leaf, tensor)
        return before

    def run(self, block: Block, sample: int, hidden: Tensor, *, dense: bool = False) -> Tensor:
        """The output of the loaded block for (1, T, H) `hidden`, with that sample's arguments, or its `dense` ones."""
        return self._run(block, hidden, (self._dense_arguments if dense else self._arguments)[sample])

    def _try(self, block: Block) -> Tensor:
        """`run` on the first sample, with products in fp32, and without a trace in what blocks share."""
        return self._run(block, self.hidden[0], _without_shared_containers(self._arguments[0]), torch.float32)

    def _run(self, block: Block, hidden: Tensor, arguments: _Arguments, dtype: torch.dtype | None = None) -> Tensor:
        args, kwargs = arguments[block.name]
        with self._compute.autocast(dtype):
            out = self._modules[block.name](self._compute.here(hidden), *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result.float()

    def _kept(self, hidden: Tensor) -> Tensor:
        """Hidden states where those of all samples are kept."""
        return hidden.to(self._home)

    @torch.no_grad()
    def collect(
        self, block: Block, needs: Needs, tick: Callable[[], None], *, advance: bool = False
    ) -> dict[str, InputStats]:
        """Runs the loaded block on every sample and returns, by linear name, what entered it.

        `dense_hidden` moves on to the next block, `hidden` only with `advance`. Experts see the tokens that the dense
        model routes to them; those that it routes too few to, all tokens.
        """
        before = list(self.hidden), None if self.dense_hidden is None else list(self.dense_hidden)
        writers = self._residual_writers(block) if needs == "drift" else {}
        stats = self._observe(block, block.linears, needs, writers, tick, advance=advance)
        if starved := self._starved(block, stats):
            after = self.hidden, self.dense_hidden
            self.hidden, self.dense_hidden = before
            with self._on_all_tokens(block, starved):
                more = self._observe(block, starved, needs, writers, lambda: None, advance=False)
            self.hidden, self.dense_hidden = after
            for each in more.values():
                each.on_all_tokens = True
            stats |= more
        return stats

    def _observe(
        self,
        block: Block,
        linears: list[Linear],
        needs: Needs,
        writers: Mapping[str, float],
        tick: Callable[[], None],
        *,
        advance: bool,
    ) -> dict[str, InputStats]:
        observer = InputObserver(needs, max(1, SAMPLE_TOKENS // len(self.hidden)), writers)
        experts = list(all_experts(self._modules[block.name]))
        for index, hidden in enumerate(self.hidden):
            observer.new_sample()
            if self.dense_hidden is not None:
                dense = self.dense_hidden[index]
                with self._watched(linears, observer.update_dense):
                    self.dense_hidden[index] = self._kept(self.run(block, index, dense, dense=True))
                observer.residual_drift = self._compute.here(dense - hidden).flatten(0, -2)
                for each in experts:  # drift is between the same tokens
                    each.routing = each.routed
            with self._watched(linears, observer.update):
                out = self.run(block, index, hidden)
            for each in experts:
                each.routing = None
            if advance:
                self.hidden[index] = self._kept(out)
            tick()
        observer.add_others(self._ranks, linears, self._compute.device)
        return observer.stats

    def _starved(self, block: Block, stats: Mapping[str, InputStats]) -> list[Linear]:
        """The linears of experts that saw too few tokens."""
        found = []
        for name, module in self._modules[block.name].named_modules():
            if isinstance(module, Expert):
                own = [linear for linear in block.linears if linear.name.startswith(f"{block.name}.{name}.")]
                if any(_too_few(stats.get(each.name), self._model.get_submodule(each.name)) for each in own):
                    found += own
        return found

    @contextmanager
    def _on_all_tokens(self, block: Block, linears: list[Linear]) -> Iterator[None]:
        """All tokens go through the experts that `linears` are of, besides what the router sends there."""
        owners = {id(self._model.get_submodule(linear.name.rpartition(".")[0])) for linear in linears}
        experts = list(all_experts(self._modules[block.name]))
        for each in experts:
            each.on_all_tokens = {index for index, expert in enumerate(each) if id(expert) in owners}
        try:
            yield
        finally:
            for each in experts:
                each.on_all_tokens = set()

    @contextmanager
    def _watched(self, linears: list[Linear], watch: Callable[[Linear, Tensor], None]) -> Iterator[None]:
        """Calls `watch` with every one of `linears` that runs and what enters it."""

        def hook(linear: Linear) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def watched(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                with self._compute.autocast(torch.float32):  # what statistics are summed up in
                    watch(linear, args[0])

            return watched

        hooks = [self._model.get_submodule(linear.name).register_forward_pre_hook(hook(linear)) for linear in linears]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    @torch.no_grad()
    def advance_dense(self, block: Block) -> None:
        """Moves `dense_hidden`, where there is one, through the loaded block, which must still be dense."""
        if self.dense_hidden is not None:
            self.dense_hidden = [
                self._kept(self.run(block, index, hidden, dense=True)) for index, hidden in enumerate(self.dense_hidden)
            ]

    @torch.no_grad()
    def fed_by_norms(self, block: Block) -> tuple[dict[str, list[str]], Tensor]:
        """By norm of the loaded block, the linears whose inputs are its outputs as they are; all are nn.Linear.

        And the block's output, for `gives`.
        """
        given: list[tuple[Tensor, str]] = []
        fed: dict[str, list[str]] = {}

        def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def noting(module: nn.Module, args: Any, out: Any) -> None:
                if isinstance(out, Tensor):
                    given.append((out, name))

            return noting

        def watch(linear: Linear, inputs: Tensor) -> None:
            if norm := next((name for out, name in given if out is inputs), None):
                fed.setdefault(norm, []).append(linear.name)

        hooks = [
            module.register_forward_hook(note(f"{block.name}.{name}"))
            for name, module in self._modules[block.name].named_modules()
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 1
        ]
        try:
            with self._watched(block.linears, watch):
                out = self._try(block)
        finally:
            for handle in hooks:
                handle.remove()
        plain = {
            norm: names
            for norm, names in fed.items()
            if all(isinstance(self._model.get_submodule(name), nn.Linear) for name in names)
        }
        return plain, out

    def norm_parameters(self, norm: str) -> dict[str, Tensor]:
        """The parameters of a norm of the loaded block, by their names in the model, in fp32."""
        return {f"{norm}.{name}": each.detach() for name, each in self._model.get_submodule(norm).named_parameters()}

    @torch.no_grad()
    def gives(self, block: Block, output: Tensor, norm: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> bool:
        """Whether the loaded block gives `output` with other parameters of a norm too, and weights times `scales`.

        Both by name, of parameters and of linears. All is put back. It is asked of each token by itself, since in some
        blocks one of them is as large as all others together.
        """
        changed = dict(norm) | {
            f"{name}.weight": self._model.get_parameter(f"{name}.weight") * scale for name, scale in scales.items()
        }
        own = {name: self._put(name, tensor) for name, tensor in changed.items()}
        after = self._try(block)
        for name, tensor in own.items():
            self._put(name, tensor)
        added = (output - self._compute.here(self.hidden[0])).norm(dim=-1)
        off = (after - output).norm(dim=-1) / added.clamp_min(torch.finfo(torch.float32).tiny)
        return self._ranks.from_first(bool(off.mean() <= _SAME))

    def parameters(self, block: Block, weights: Collection[str]) -> dict[str, nn.Parameter]:
        """Those of `weights`, names of parameters, and the norms and biases of the loaded block, by name."""
        names = (f"{block.name}.{name}" for name, _ in self._modules[block.name].named_parameters())
        found = {name: self._model.get_parameter(name) for name in names}
        return {name: parameter for name, parameter in found.items() if parameter.ndim == 1 or name in weights}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Puts `weights`, by parameter name, into the loaded block, in fp32."""
        for name, weight in weights.items():
            self._put(name, weight)

    def _residual_writers(self, block: Block) -> dict[str, float]:
        linears = {linear.name: self._model.get_submodule(linear.name) for linear in block.linears}
        hidden = self._compute.here(self.hidden[0])
        writers = self._ranks.from_first(
            residual_writers(functools.partial(self.run, block, 0, hidden), hidden, linears)
        )
        if not writers and linears and not self._warned:
            logger.warning(
                "%s adds the output of none of its linears to the residual stream as it is (there may be a norm "
                "between), so what the residual stream has lost is not made up for",
                block.name,
            )
            self._warned = True
        return writers

    @torch.no_grad()
    def advance(self, block: Block, pruned: Mapping[str, Tensor], tick: Callable[[], None]) -> None:
        """Puts `pruned` weights, by parameter name, into the loaded block and moves `hidden` through it."""
        self.put(pruned)
        for index, hidden in enumerate(self.hidden):
            self.hidden[index] = self._kept(self.run(block, index, hidden))
            tick()


def _too_few(stats: InputStats | None, module: nn.Module) -> bool:
    """Whether an expert's linear saw less than a `_SHARE_OF_INPUTS` of as many tokens as it has inputs."""
    linear: Any = module
    return stats is None or stats.token_count < _SHARE_OF_INPUTS * linear.in_features


class _ChangedError(Exception):
    """Hidden states do not go from block to block as they are."""


def _without_shared_containers(arguments: _Arguments) -> _Arguments:
    """A copy that shares tensors but no container: blocks may leave keys and values in one for those that follow."""
    copies: dict[int, Any] = {}
    return {name: (_copied(args, copies), _copied(kwargs, copies)) for name, (args, kwargs) in arguments.items()}


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    if type(value) is tuple:
        return tuple(_copied(item, copies) for item in value)
    if not isinstance(value, list | MutableMapping):
        return value
    if id(value) not in copies:
        copies[id(value)] = other = copy.copy(value)
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            other[key] = _copied(item, copies)
    return copies[id(value)]


def _share_equal_tensors(arguments: _Arguments, before: _Arguments) -> None:
    """Lets arguments that are equal in two samples, as masks and positions are, take up memory once."""
    chosen: dict[int, Tensor] = {}

    def share(value: Any, other: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in chosen:
                same = isinstance(other, Tensor) and value.shape == other.shape and torch.equal(value, other)
                chosen[id(value)] = other if same else value
            return chosen[id(value)]
        if type(value) is tuple and isinstance(other, tuple) and len(value) == len(other):
            return tuple(share(item, its) for item, its in zip(value, other, strict=True))
        return value

    for name, (args, kwargs) in arguments.items():
        args_before, kwargs_before = before[name]
        arguments[name] = (
            share(args, args_before),
            {key: share(value, kwargs_before.get(key)) for key, value in kwargs.items()},
        )
