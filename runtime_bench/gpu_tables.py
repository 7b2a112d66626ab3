"""Two tables that measurements of a GPU fill: which backend for how many tokens, and how to launch Triton's kernels."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from runtime_bench.gpu import Device, GpuResult
from runtime_bench.gpu_backends import fault, inputs, masked_weight, truth
from runtime_bench.layers import SHAPES
from swiftprune.errors import SettingsError
from swiftprune.kernels import triton_linear
from swiftprune.kernels.gpu import EXACT
from swiftprune.kernels.packing import pack
from swiftprune.kernels.plan import TABLE_VERSION
from swiftprune.kernels.triton_linear import Config
from swiftprune.progress import ProgressCallback, no_progress

TUNED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
TUNED_ROUNDS = 10
_VECTOR_TOKENS = 16  # beyond, sums do not fit into registers


def backend_table(found: Sequence[GpuResult]) -> dict[str, Any]:
    """What `plan` reads: by device and weight, the backend with the lowest median for each number of tokens.

    Later results replace earlier ones of a device. Void and unavailable times do not count. Raises SettingsError when
    there is not one cell to tell anything.
    """
    devices: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        if result.machine.gpu is None:
            continue
        best: dict[tuple[str, int, int], dict[int, str]] = {}
        for cell in result.cells:
            times = {t.backend: statistics.median(t.us) for t in cell.times if t.status == "ok" and t.backend in EXACT}
            if times and cell.dtype in ("bfloat16", "float16"):
                best.setdefault((cell.dtype, cell.rows, cell.cols), {})[cell.tokens] = min(times, key=times.__getitem__)
        if best:
            devices[result.machine.gpu.name] = [
                {"dtype": dtype, "rows": rows, "cols": cols, "tokens": sorted(by), "best": [by[m] for m in sorted(by)]}
                for (dtype, rows, cols), by in best.items()
            ]
    if not devices:
        raise SettingsError("no result holds a time of a 2:4 backend that was right: there is nothing to choose from")
    return {"version": TABLE_VERSION, "devices": devices}


def table_text(table: dict[str, Any]) -> str:
    """JSON with a line for each weight, to be read by people too."""
    devices = ",\n".join(
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(cell)}" for cell in cells) + "\n    ]"
        for name, cells in table["devices"].items()
    )
    return f'{{\n  "version": {table["version"]},\n  "devices": {{\n{devices}\n  }}\n}}\n'


def candidates(tokens: int) -> Iterator[Config]:
    """Launch configurations that might be best for so many tokens."""
    padded = 1 << (tokens - 1).bit_length()
    if tokens <= _VECTOR_TOKENS:
        for rows, width, warps, programs in itertools.product((8, 16, 32), (32, 64), (4, 8), (2, 4, 8)):
            # Each thread should hold two bytes of a row, and not so many rows that its sums spill.
            if 2 <= rows * width // (32 * warps) <= max(2, 16 // padded):
                yield Config("", tokens, "vector", (padded, rows, width), warps, 2, programs)
    for rows, width, warps, stages, programs in itertools.product((32, 64, 128), (8, 16), (4, 8), (2, 3, 4), (1, 2, 4)):
        if rows * width <= 1024:
            yield Config("", tokens, "dot", (max(16, padded), rows, width), warps, stages, programs)


def tune(
    device: Device,
    tokens: Sequence[int] = TUNED_TOKENS,
    shapes: Sequence[tuple[int, int]] = SHAPES["llama-3-8b"],
    progress: ProgressCallback = no_progress,
    *,
    multiply: Callable[..., Tensor] = triton_linear.linear24,
    configs: Callable[[int], Iterator[Config]] = candidates,
) -> list[Config]:
    """For each number of tokens the configuration with the least time over all shapes (N, K), in bfloat16.

    A configuration that fails to compile or gives a wrong product does not count. Unmeasured: not run on a GPU yet.
    """
    name = device.facts().name
    chosen = []
    weights = []
    for rows, cols in shapes:
        weight = masked_weight(rows, cols, torch.bfloat16, device.place)
        packed = pack(weight.cpu())
        weights.append((weight, packed.values.to(device.place), packed.metadata.to(device.place)))
    plans = [(count, list(configs(count))) for count in tokens]
    total, done = sum(len(tried) for _, tried in plans), 0
    for count, tried in plans:
        best: tuple[float, Config] | None = None
        samples = [(inputs(count, weight.shape[1], torch.bfloat16, device.place), weight) for weight, *_ in weights]
        expected = [truth(x, weight) for x, weight in samples]
        for config in tried:
            seconds = 0.0
            try:
                for (x, _), (_, values, metadata), want in zip(samples, weights, expected, strict=True):
                    call = device.captured(lambda: multiply(x, values, metadata, config=config))  # noqa: B023 - at once
                    if fault(call.run(), want, torch.bfloat16)[1]:
                        raise RuntimeError("wrong product")
                    seconds += statistics.median(device.timed(call.run, TUNED_ROUNDS))
            except Exception:  # out of shared memory, say: another configuration will do
                seconds = float("inf")
            if seconds < (best[0] if best else float("inf")):
                best = seconds, config
            done += 1
            progress(f"tune for {count} tokens", done, total)
        if best is None:
            raise SettingsError(f"no configuration of the Triton kernels gave a right product for {count} tokens")
        chosen.append(replace(best[1], device=name))
    return chosen


def configs_text(tuned: Sequence[Config]) -> str:
    """TOML: the tuned entries, then the built-in ones of other devices, under the built-in explanation."""
    built_in = triton_linear.BUILT_IN.read_text()
    explained = built_in.partition("[[config]]")[0]
    names = {config.device for config in tuned}
    rest = [config for config in triton_linear.read(triton_linear.BUILT_IN) if config.device not in names]
    return explained + "\n".join(_entry(config) for config in (*tuned, *rest))


def _entry(config: Config) -> str:
    return (
        f'[[config]]\ndevice = {json.dumps(config.device)}\ntokens = {config.tokens:_}\nkernel = "{config.kernel}"\n'
        f"tile = {list(config.tile)}\nwarps = {config.warps}\nstages = {config.stages}\nprograms = {config.programs}\n"
    )
