"""Prunes any torch module in memory to 2:4: encoders, vision transformers, convolutional networks.

`pipeline.py` is for causal LM checkpoints, which it streams block by block. Here the model is whole and of any kind,
and what calibrates it are batches of its own inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.formats.spec import GROUP, check_finite, unpackable_reason
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import prune_and_pack, unpack
from swiftprune.methods.scores import METHODS, Method, find_method
from swiftprune.methods.statistics import InputStats
from swiftprune.models.ignore import Ignore, compile_ignore
from swiftprune.progress import ProgressCallback, no_progress
from swiftprune.results import kept_energy

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Forward = Callable[[nn.Module, Any], object]

IGNORE_NOTHING = r"(?!)"  # matches no name


class PrunedLayer(BaseModel):
    """What pruning did to one layer."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int, ...]
    """(N, K) of a linear, (N, C, *kernel) of a convolution."""
    sparsity: float
    """Share of weights that are zero."""
    kept_energy: float
    """Sum of squares after pruning over that before."""


class ModuleReport(BaseModel):
    """What `prune_module` did. Every module that owns a parameter of two or more dimensions is in one of the two."""

    model_config = ConfigDict(frozen=True)

    method: str
    """The key of METHODS that was used."""
    layers: list[PrunedLayer]
    dense: dict[str, str]
    """Name of a module left as it was -> why."""


def prune_module(
    module: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    method: str = "",
    ignore: str = IGNORE_NOTHING,
    forward: Forward | None = None,
    progress: ProgressCallback = no_progress,
) -> ModuleReport:
    """Prunes the linears and convolutions of `module` to 2:4, in place.

    Two of every four consecutive weights stay: along in_features in nn.Linear, along the input channels, at each
    output channel and kernel position, in nn.Conv1d and nn.Conv2d, as TensorRT wants it (NVIDIA TensorRT
    documentation, "Structured Sparsity"). Weights are float32, bfloat16 or float16; zeros are +0. What cannot be
    pruned stays dense and is reported with its reason: grouped convolutions, input channels that are not a multiple of
    four, a weight that two modules share, layers whose name `ignore` matches (see `Ignore`), and weights of any other
    kind of module, such as nn.Embedding or the in_proj_weight of nn.MultiheadAttention.

    `batches` are calibration inputs, each a tensor, a tuple or list of positional arguments, a mapping of keyword
    arguments, or anything at all that `forward(module, batch)` can run. They are gone through once, in eval mode and
    without gradients, and all statistics are those of the dense model: other than in `prune`, no layer sees what
    pruning the layers before it changed. Padding tokens count like others. A layer that no batch reaches stays dense.

    `method` is any of METHODS that leaves the kept weights alone; empty means `swiftprune` with batches and
    `swiftprune-data-free` without. Methods that need no inputs do not run the batches.

    Raises SettingsError for an unknown or unsuitable method, a bad `ignore`, or when there is nothing to prune;
    FormatError, naming the layer, for weights that are NaN or infinite; CheckpointError where the inputs of a layer
    are. Until all of that is checked, no weight is changed.

    >>> report = prune_module(vit, [{"pixel_values": images}])  # doctest: +SKIP
    >>> print(report.layers[0].kept_energy, report.dense)  # doctest: +SKIP
    """
    method, chosen = _choose_method(method, calibrated=batches is not None)
    ignored = compile_ignore(ignore)
    if ignore != IGNORE_NOTHING:
        ignored.check(name for name, _ in module.named_modules())
    layers, dense = _find_layers(module, ignored)
    if not layers:
        first = next((f" ({name}: {reason})" for name, reason in dense.items()), "")
        raise SettingsError(f"nothing to prune: the module has no suitable Linear, Conv1d or Conv2d{first}")
    for name, layer in layers.items():
        check_finite(layer.weight, f"{name}.weight")

    stats = dict.fromkeys(layers, InputStats(token_count=0))
    if batches is not None and chosen.needs != "nothing":
        stats = _collect(module, layers, batches, forward or _call, progress)
        if not stats:
            raise SettingsError("batches is empty, or none of them goes through a layer that could be pruned")
        dense |= {name: "no calibration batch went through it" for name in layers if name not in stats}

    pruned = []
    for name, layer_stats in stats.items():
        pruned.append(_prune_layer(name, layers[name], chosen, layer_stats))
        progress("prune", len(pruned), len(stats))
    return ModuleReport(method=method, layers=pruned, dense=dense)


def _choose_method(name: str, *, calibrated: bool) -> tuple[str, Method]:
    name = name or ("swiftprune" if calibrated else "swiftprune-data-free")
    method = find_method(name)
    if method.factors is None:
        usable = ", ".join(key for key, other in METHODS.items() if other.factors)
        raise SettingsError(f"method {name!r} changes the kept weights, which prune_module does not do; use {usable}")
    if method.needs != "nothing" and not calibrated:
        raise SettingsError(
            f"method {name!r} needs calibration data; give batches, "
            "or use a data-free method (swiftprune-data-free, magnitude)"
        )
    return name, method


def _find_layers(module: nn.Module, ignored: Ignore) -> tuple[dict[str, Layer], dict[str, str]]:
    """By name, the layers to prune, and the reasons why other modules with matrices of their own stay dense."""
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            owners[parameter].append(name)
    layers: dict[str, Layer] = {}
    dense: dict[str, str] = {}
    for name, child in module.named_modules():
        parameters = dict(child.named_parameters(recurse=False))
        if isinstance(child, Linear24):
            dense[name] = "it is packed already"
        elif all(parameter.ndim < 2 for parameter in parameters.values()):
            continue
        elif not isinstance(child, Layer):
            dense[name] = f"{type(child).__name__} is not a Linear, Conv1d or Conv2d"
        elif ignored.search(name):
            dense[name] = f"matches ignore {ignored.pattern}"
        elif "weight" not in parameters:
            dense[name] = "its weight is not a parameter but computed from others"
        elif others := [owner for owner in owners[parameters["weight"]] if owner != name]:
            dense[name] = f"shares its weight with {', '.join(others)}"
        elif reason := _unsuitable(child):
            dense[name] = reason
        else:
            layers[name] = child
    return layers, dense


def _unsuitable(layer: Layer) -> str | None:
    if layer.weight.is_inference() and not torch.is_inference_mode_enabled():
        return "its weight was made in torch.inference_mode(), and can be changed there only"
    if any(step == 0 and size > 1 for step, size in zip(layer.weight.stride(), layer.weight.shape, strict=True)):
        return "its weight is expanded: many of its elements are one in memory"
    if not isinstance(layer, nn.Linear):
        if layer.groups > 1:
            return f"it is a grouped convolution (groups = {layer.groups})"
        if layer.in_channels % GROUP:
            return f"in_channels = {layer.in_channels} is not a multiple of {GROUP}"
    return unpackable_reason(tuple(_channels_last(layer.weight).flatten(1).shape), layer.weight.dtype)


def _channels_last(weight: Tensor) -> Tensor:
    """A view (N, *kernel, C) of `weight` (N, C, *kernel); that of a linear is (N, K) itself.

    Flattened to (N, *kernel x C), it is the weight of the linear over unfolded patches that a convolution is, with
    groups of four along C. So what methods take from a row (RIA, the data-free form) is taken over all weights of an
    output channel, and a column is one input channel at one kernel position, as in `input_sq_sum`.
    """
    return weight.detach().movedim(1, -1)


def _prune_layer(name: str, layer: Layer, method: Method, stats: InputStats) -> PrunedLayer:
    assert method.factors is not None
    weight = _channels_last(layer.weight)
    matrix = weight.flatten(1)
    packed = prune_and_pack(matrix, method.factors(matrix, stats, GROUP), f"{name}.weight")
    result = PrunedLayer(
        name=name,
        shape=tuple(layer.weight.shape),
        sparsity=1 - int(torch.count_nonzero(packed.values)) / matrix.numel(),
        kept_energy=kept_energy(matrix, packed.values),
    )
    weight.copy_(unpack(packed).view(weight.shape))
    return result


@torch.no_grad()
def _collect(
    module: nn.Module, layers: Mapping[str, Layer], batches: Iterable[Any], forward: Forward, progress: ProgressCallback
) -> dict[str, InputStats]:
    """Runs every batch and returns, by name, what entered the layers that were reached, in the order of `layers`."""
    stats = {name: InputStats(token_count=0) for name in layers}

    def recorder(layer_stats: InputStats) -> Callable[..., None]:
        def record(layer: Layer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            squares = input_sq_sum(layer, args[0] if args else kwargs["input"])
            seen = layer_stats.input_sq_sum
            layer_stats.input_sq_sum = squares if seen is None else seen + squares
            layer_stats.token_count += output.numel() // len(layer.weight)

        return record

    hooks = [layer.register_forward_hook(recorder(stats[name]), with_kwargs=True) for name, layer in layers.items()]
    total = length_hint(batches)  # 0 where it cannot be known
    try:
        with eval_mode(module):
            for done, batch in enumerate(batches, start=1):
                forward(module, batch)
                progress("calibrate", done, max(done, total))
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer_stats in stats.items():
        _check_inputs(name, layers[name], layer_stats)
    return {name: layer_stats for name, layer_stats in stats.items() if layer_stats.token_count}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode, and back at the end to what each submodule was in."""
    training = {child: child.training for child in module.modules()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # In eval mode nn.TransformerEncoder would drop padding and call its linears on nested tensors, which have no shape.
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for child, flag in training.items():
            child.training = flag


def call_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def _call(module: nn.Module, batch: Any) -> object:
    arguments, keywords = call_arguments(batch)
    return module(*arguments, **keywords)


def input_sq_sum(layer: Layer, inputs: Tensor) -> Tensor:
    """Sum of squares of what each column of the weight is multiplied with, over all of `inputs`: fp32.

    A linear takes `inputs` (..., K) and gives (K,). A convolution takes (B, C, *size) or (C, *size) and gives
    (*kernel x C,): element (y, x, c) is the sum, over all output positions, of the squared input of channel c that
    kernel position (y, x) meets there, padding included.
    """
    spatial = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    # The positions that a kernel meets are the same in every sample, so samples are summed first: the windows below
    # are then views of one (C, *size) tensor, where unfolded patches would take a kernel's size times the batch.
    squares = inputs.reshape(-1, *inputs.shape[inputs.ndim - 1 - spatial :]).float().square().sum(0)
    if isinstance(layer, nn.Linear):
        return squares
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(squares, layer._reversed_padding_repeated_twice, mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=1
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return windows.sum(tuple(range(1, 1 + spatial))).movedim(0, -1).flatten()


def _check_inputs(name: str, layer: Layer, stats: InputStats) -> None:
    """Scores of NaN would order nothing."""
    if stats.input_sq_sum is not None and not (finite := torch.isfinite(stats.input_sq_sum)).all():
        channel = int((~finite).nonzero()[0]) % layer.weight.shape[1]
        raise CheckpointError(
            f"input channel {channel} of {name} is not finite on the calibration batches; "
            "look for NaN or infinities in the batches, and in the embeddings and norms before it"
        )
