"""A device that is not there: tensors that say `claimed`, hold CPU values and refuse to be mixed with the CPU's.

`python -m tests.claimed_device` exports tiny models on it and on the CPU and prints, as JSON, what differs by case. It
is a process of its own, since a device type stays registered. What computes there is the CPU, so results are equal to
the bit, and every tensor that code has left behind, or made without saying where, fails with the operator's name.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from exporters import Target, export
from swiftprune.compute import Compute
from swiftprune.config import PruneSettings
from swiftprune.models.load import load_whole_model
from tests import models

_aten = torch.ops.aten
# What may take tensors of both: copies, and what finds its way with indices of the CPU on real devices too.
_MIXED = {_aten._to_copy.default, _aten.copy_.default, _aten.index.Tensor, _aten.index_put_.default}


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("claimed", _Module())
DEVICE = torch.device("claimed:0")


_tensor = torch.tensor


def _tensor_anywhere(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """torch.tensor, which makes tensors in C++: see `Claimed.__getitem__`."""
    if device is None or torch.device(device) != DEVICE:
        return _tensor(data, device=device, **kwargs)
    return _tensor(data, **kwargs).to(device)


class Claimed(Tensor):
    """A tensor of the device, around one of the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Claimed:
        made: Claimed = Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        made.raw = raw
        return made

    def __getitem__(self, index: Any) -> Tensor:
        # torch makes tensors of lists in C++, from where Python's devices cannot be reached.
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(_tensor(list(part)) if isinstance(part, list | tuple) else part for part in parts)
        found: Tensor = super().__getitem__(parts)
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Claimed({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    if func not in _MIXED and (left := [t for t in tensors if not isinstance(t, Claimed) and t.dim()]):
        raise RuntimeError(f"{func}: a tensor of shape {tuple(left[0].shape)} was left on the CPU")
    asked = kwargs.get("device")
    on_cpu = kwargs | ({"device": torch.device("cpu")} if asked is not None else {})
    out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, on_cpu))
    if func is _aten.copy_.default:
        return args[0]
    if asked is not None and torch.device(asked).type == "cpu":
        return out
    wrapped = tree_map(lambda value: Claimed(value) if type(value) is Tensor else value, out)
    if asked is not None:
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)  # type: ignore[no-untyped-call]


def _unwrapped(value: Any) -> Any:
    return value.raw if isinstance(value, Claimed) else value


_fallback = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_fallback.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")  # type: ignore[no-untyped-call]

CASES: dict[str, dict[str, Any]] = {
    "ria": {"method": "ria"},
    "own text": {"method": "swiftprune-pairs", "calibration": "self", "samples": 4, "seqlen": 12},
    "no data": {"method": "swiftprune-data-free", "calibration": "none"},
    "blocks": {"method": "wanda", "refine": ("blocks",)},
    "weights, int8": {"method": "wanda", "refine": ("weights",), "values": "int8"},
    "int4, distill": {"values": "int4", "refine": ("distill",), "steps": 3},
    "permute": {"permute": True},
    "auto": {"method": "sparsegpt", "max_perplexity_ratio": 1.2},
    "unstructured": {"method": "sparsegpt", "pattern": "unstructured:0.5"},
}


def main() -> None:
    _device_constructors()  # remembers the real torch.tensor, which `with torch.device(...)` looks out for
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    with (
        patch.object(torch, "tensor", _tensor_anywhere),
        patch("swiftprune.config.find_device", lambda name: DEVICE if name == "cuda" else torch.device("cpu")),
        patch("swiftprune.config.faster_type", lambda device: "float32"),
        patch.object(Compute, "wait", lambda self: None),
        patch.object(Compute, "free_bytes", lambda self: 10**10),
        patch("swiftprune.stages.context.load_whole_model", _tied(load_whole_model)),
        patch("swiftprune.stages.refine_blocks.STEPS", 5),
        sdpa_kernel(SDPBackend.MATH),  # fused attention is for real devices
        tempfile.TemporaryDirectory() as folder,
    ):
        text = Path(folder) / "text.txt"
        text.write_text(models.TEXT * 2)
        common = {"calibration": str(text), "samples": 2, "seqlen": 16, "conversations": 0}
        for name, cases in (
            ("gpt-neox", ["permute"]),
            ("llama-gqa-tied", [name for name in CASES if name != "permute"]),
        ):
            shape = models.SUPPORTED[name]
            small = type(shape)(**shape.to_dict() | {"num_hidden_layers": 2})
            source = models.write_model(Path(folder) / name, small)
            for case in cases:
                found[f"{name}: {case}"] = _compared(functools.partial(_export, source, common | CASES[case]))
        found["evaluate"] = _compared(functools.partial(_export, source, common, evaluate=text))
        with (
            patch.object(Compute, "free_bytes", lambda self: 1000),  # too little for hidden states
            patch("swiftprune.stages.prepare.block_bytes", lambda run: 0),
        ):
            found["hidden states on the CPU"] = _compared(functools.partial(_export, source, common, check=False))
    json.dump(found, sys.stdout)


def _tied(load: Callable[..., Any]) -> Callable[..., Any]:
    """Ties of weights outlive a move to another device, but not one to a tensor of another class."""

    def load_and_tie(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        move = model.to

        def moved(device: torch.device) -> Any:
            move(device).tie_weights()
            return model

        model.to = moved
        return model

    return load_and_tie


def _compared(run: Callable[..., dict[str, Any]]) -> str:
    """`same`, or what was raised or differs."""
    try:
        here, there = run(device="cpu"), run(device="cuda")
    except Exception:
        return traceback.format_exc()
    different = [name for name in here.keys() | there.keys() if not _equal(here.get(name), there.get(name))]
    return f"differs in {sorted(different)}" if different else "same"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    if isinstance(left, list) and isinstance(right, list):
        return left == pytest.approx(right, rel=1e-4)  # of another layout in memory, sums are in another order
    return False


def _export(
    source: Path, settings: dict[str, Any], *, device: str, evaluate: Path | None = None, check: bool = True
) -> dict[str, Any]:
    out = source.with_name("out")
    target: Target = "dense" if "pattern" in settings else "packed"
    report = export(
        source,
        out,
        PruneSettings(**settings, device=device),
        target=target,
        overwrite=True,
        evaluate=evaluate,
        check=check,
    )
    tensors: dict[str, Any] = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    measured = {
        "check": [report.check.dense, report.check.pruned] if report.check else [],
        "errors": [layer.output_error for layer in report.layers if layer.output_error is not None],
        "evaluated": [report.perplexity_before, report.perplexity_after] if evaluate else [],
    }
    return tensors | measured


if __name__ == "__main__":
    main()
