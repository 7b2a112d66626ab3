"""Mixtures of experts with each expert's linears as linears of its own.

transformers stacks the experts of a block into three-dimensional parameters, whatever their checkpoint stores. Separate
linears are found, calibrated, pruned, packed and served like all others, under the names that the checkpoint has for
them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from swiftprune.checkpoints.source import Part
from swiftprune.models.architectures import STACKS, Stacks

_DOWN = "down_proj"
_UP = "up_proj"
_GATE_UP = "gate_up_proj"


class Expert(nn.Module):
    """One expert: its linears under the checkpoint's names for them, `down` last."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)

    @property
    def first(self) -> list[nn.Module]:
        """Those that read hidden states: gate and up, or up alone."""
        return list(self.children())[:-1]

    @property
    def down(self) -> nn.Module:
        return list(self.children())[-1]


class Experts(nn.ModuleList):
    """In the place of a module of stacked experts, with its arguments and results; each expert is an `Expert`.

    Every expert multiplies the tokens that are routed to it, one after the other. Numbers from that of experts on stand
    for none, or for one that returns what it is given where the module has such.
    """

    def __init__(self, stacked: Any, stacks: Stacks, experts: list[Expert]) -> None:
        super().__init__(experts)
        self._stacked = (stacked,)  # in a tuple, so that it is no child
        self._stacks = stacks
        self._has_identities = hasattr(stacked, "identity_expert")
        self.routed: Tensor | None = None
        """(T, top k) int64: to which experts the tokens went when it last ran."""
        self.routing: Tensor | None = None
        """The same, to be taken instead of the router's choice while calibrating."""
        self.on_all_tokens: set[int] = set()
        """Experts that multiply all tokens while calibrating; of those not routed to them the results are left out."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H) -> (T, H): of each token the sum over its experts, weighted by `top_k_weights` (T, top k)."""
        chosen = self.routed = top_k_index if self.routing is None else self.routing
        total = torch.zeros_like(hidden_states)
        used = set(range(len(self))).intersection(chosen.flatten().tolist())
        for index in sorted(used | self.on_all_tokens):
            token, rank = torch.where(chosen == index)
            if index in self.on_all_tokens:
                out = self._expert(index, hidden_states)[token]
            else:
                out = self._expert(index, hidden_states[token])
            total.index_add_(0, token, (out * top_k_weights[token, rank, None]).to(total.dtype))
        if self._has_identities:
            weight = (top_k_weights * (chosen >= len(self))).sum(-1, keepdim=True)
            total += (hidden_states * weight).to(total.dtype)
        return total

    def _expert(self, index: int, x: Tensor) -> Tensor:
        (module,) = self._stacked
        expert: Any = self[index]
        parts = [linear(x) for linear in expert.first]
        if not self._stacks.has_gate:
            hidden = module.act_fn(parts[0])
        elif hasattr(module, "_apply_gate"):
            # Some architectures interleave gate and up, and some bound or scale them: the module knows.
            both = torch.cat(parts, -1) if self._stacks.is_concatenated else torch.stack(parts, -1).flatten(-2)
            hidden = module._apply_gate(both)
        else:
            hidden = module.act_fn(parts[0]) * parts[1]
        out: Tensor = expert.down(hidden)
        return out


class SortedExperts(Experts):
    """In the place of one that is given (experts x T, H): all tokens, times the expert's score, for each expert.

    Tokens that an expert was not chosen for have score 0, and it has no biases, so these are left out. `routed` and
    `routing` are (experts, T) bool.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """(experts x T, H) -> (experts x T, H)."""
        shares = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        chosen = self.routed = shares.any(-1) if self.routing is None else self.routing
        total = torch.zeros_like(shares)
        for index, share in enumerate(shares):
            token = chosen[index].nonzero()[:, 0]
            if index in self.on_all_tokens:  # those of others as these are given them
                every = torch.where(share.any(-1, keepdim=True), share, shares.sum(0))
                total[index, token] = self._expert(index, every)[token].to(total.dtype)
            elif len(token):
                total[index, token] = self._expert(index, share[token]).to(total.dtype)
        return total.view_as(hidden_states)


def separate_experts(model: Any) -> dict[str, Part]:
    """Puts an `Experts` in the place of every module of stacked experts in `model`.

    Returns, by name, the parameters that are new, and where in which stacked parameter they were; they share its
    memory where rows are not interleaved or turned. Modules of experts in a form that is not standard stay.
    """
    names = _names(model)
    parts: dict[str, Part] = {}
    for name, module in list(model.named_modules()):
        stacks = _stacks(module)
        if stacks and is_stacked(module) and unseparable_reason(module) is None:
            own = _parts(name, module, stacks, names)
            model.set_submodule(name, _separated(module, stacks, own))
            owner: Any = model.get_submodule(name.rpartition(".")[0])
            owner._is_hf_initialized = True  # else some fill the stacked weights with random numbers
            parts |= own
    return parts


def is_stacked(module: nn.Module) -> bool:
    """Whether its own parameters are those of many linears."""
    return any(p.ndim == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)


def unseparable_reason(module: nn.Module) -> str | None:
    """Why stacked experts cannot be made linears of their own, or None when they can."""
    if _stacks(module) is None:
        return f"{type(module).__name__} stacks weights in a form of its own"
    if getattr(module, "has_post_expert_norm", False):
        return f"{type(module).__name__} has a norm behind each expert"
    known = {name + suffix for name in (_GATE_UP, _UP, _DOWN) for suffix in ("", "_bias")}
    if unknown := sorted({name for name, _ in module.named_parameters(recurse=False)} - known):
        return f"{type(module).__name__} has weights of unknown use: {', '.join(unknown)}"
    return None


def _stacks(module: Any) -> Stacks | None:
    """How it stacks its experts: as transformers' `use_experts_implementation` says of it, or as is known."""
    if known := STACKS.get(type(module).__name__):
        return known
    try:
        return Stacks(module.has_gate, module.has_bias, module.is_transposed, module.is_concatenated)
    except AttributeError:
        return None


def all_experts(module: nn.Module) -> Iterator[Experts]:
    return (each for each in module.modules() if isinstance(each, Experts))


def _names(model: Any) -> dict[str, list[str]]:
    """By stacked parameter, what the checkpoint calls the linears that it is made of."""
    names = {_GATE_UP: ["gate_proj", "up_proj"], _UP: [_UP], _DOWN: [_DOWN]}
    for conversion in get_model_conversion_mapping(model):
        if merges_experts(conversion):
            target = conversion._original_target_patterns[0].rpartition(".")[2]
            parts = [source.split("*.")[1].removesuffix(".weight") for source in conversion._original_source_patterns]
            if target in names and len(parts) == len(names[target]):
                names[target] = parts
    return names


def merges_experts(conversion: Any) -> bool:
    """Whether it stacks experts that a checkpoint stores one by one."""
    return isinstance(conversion, WeightConverter) and all(
        "*." in source and source.endswith(".weight") for source in conversion._original_source_patterns
    )


def _parts(path: str, stacked: Any, stacks: Stacks, names: dict[str, list[str]]) -> dict[str, Part]:
    """By the name of a new parameter, which part of which parameter of `stacked`, at `path`, it is."""
    up = _GATE_UP if stacks.has_gate else _UP
    parts = {}
    for index in range(len(stacked.down_proj)):
        for parameter in (up, _DOWN):
            for place, name in enumerate(names[parameter]):
                rows = _rows_of(stacked, stacks, place) if parameter == _GATE_UP else slice(None)
                for kind, suffix in (("weight", ""), ("bias", "_bias"))[: 2 if stacks.has_bias else 1]:
                    part = Part(f"{path}.{parameter}{suffix}", index, rows, stacks.is_transposed)
                    parts[f"{path}.{index}.{name}.{kind}"] = part
    return parts


def _rows_of(stacked: Any, stacks: Stacks, place: int) -> slice:
    """Of the outputs of gate and up together, those of gate (`place` 0) or up (1)."""
    if not stacks.is_concatenated:
        return slice(place, None, 2)
    half = stacked.gate_up_proj.shape[2 if stacks.is_transposed else 1] // 2
    return slice(place * half, (place + 1) * half)


def _separated(stacked: Any, stacks: Stacks, parts: Mapping[str, Part]) -> Experts:
    experts: dict[int, dict[str, nn.Linear]] = defaultdict(dict)
    for name, part in parts.items():
        assert part.index is not None
        linear, kind = name.split(".")[-2:]
        # Of interleaved rows a copy: fused optimizers take weights for dense and would step at wrong places.
        tensor = part.of(getattr(stacked, part.tensor.rpartition(".")[2])).detach().contiguous()
        if kind == "weight":
            rows, cols = tensor.shape
            experts[part.index][linear] = nn.Linear(cols, rows, bias=stacks.has_bias, device="meta")
        setattr(experts[part.index][linear], kind, nn.Parameter(tensor, requires_grad=False))
    for name, _ in list(stacked.named_parameters(recurse=False)):
        delattr(stacked, name)
    made = SortedExperts if stacks.sorted_inputs else Experts
    return made(stacked, stacks, [Expert(experts[index]) for index in sorted(experts)])
