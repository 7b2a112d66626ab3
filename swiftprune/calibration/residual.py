"""Which linears of a decoder block write to the residual stream: seen from what the block does with their outputs."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_MULTIPLIES = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}
_SAME_NUMBERS = {
    "view",
    "reshape",
    "to",
    "float",
    "type",
    "type_as",
    "contiguous",
    "clone",
    "dropout",
    "feature_dropout",
    "squeeze",
    "unsqueeze",
    "flatten",
    "unflatten",
    "view_as",
    "bfloat16",
    "half",
    "__getitem__",
}


def residual_writers(block: Callable[[], object], hidden: Tensor, linears: Mapping[str, nn.Module]) -> dict[str, float]:
    """Name of each of `linears` whose output `block` adds to the residual stream -> the factor it is scaled by first.

    `block` runs the block on `hidden`, with which the residual stream begins: it is `hidden` and every sum of it with
    something else. A linear whose output goes through a norm first, as in Gemma, does not write to it by itself.
    """
    trace = _Trace(hidden)
    hooks = [
        module.register_forward_hook(lambda _module, _args, out, name=name: trace.label(out, {name: 1.0}))
        for name, module in linears.items()
    ]
    try:
        with trace:
            block()
    finally:
        for hook in hooks:
            hook.remove()
    return trace.writers


class _Trace(TorchFunctionMode):
    """Follows the residual stream and outputs of linears through additions, scaling and changes of shape or type."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.writers: dict[str, float] = {}
        self._residual = {id(hidden)}
        self._labels: dict[int, dict[str, float]] = {}
        self._alive: list[Tensor] = [hidden]  # so that no id is used again

    def label(self, out: Tensor, names: dict[str, float]) -> None:
        self._labels[id(out)] = names
        self._alive.append(out)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            self._follow(getattr(function, "__name__", ""), args, out)
        return out

    def _follow(self, name: str, args: Any, out: Tensor) -> None:
        first, second = args[0], args[1] if len(args) > 1 else None
        labels = self._labels.get(id(first))
        if name in _SAME_NUMBERS:
            if id(first) in self._residual:
                self._is_residual(out)
            elif labels:
                self.label(out, labels)
        elif name in _MULTIPLIES and labels and isinstance(second, numbers.Real):
            self.label(out, {key: factor * float(second) for key, factor in labels.items()})
        elif name in _ADDS and isinstance(second, Tensor):
            both = (labels or {}) | self._labels.get(id(second), {})
            if {id(first), id(second)} & self._residual:
                self.writers |= both
                self._is_residual(out)
            elif both:
                self.label(out, both)

    def _is_residual(self, out: Tensor) -> None:
        self._labels.pop(id(out), None)
        self._residual.add(id(out))
        self._alive.append(out)
