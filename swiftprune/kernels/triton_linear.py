"""The backend `triton`: products by the packed pair as it is, for few tokens, where a GPU waits for weights.

It reads 9/16 of the bytes of a dense weight, so where memory is the bound it takes at best 9/16 of the time. Verified
in Triton's interpreter and compiled for sm_80 to sm_100; not run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from swiftprune.errors import SettingsError
from swiftprune.kernels.semi_structured import ALIGNMENT, aligned_rows

WEIGHTS_PER_BYTE = 8  # of metadata
CONFIGS_VARIABLE = "SWIFTPRUNE_TRITON_CONFIGS"
BUILT_IN = Path(__file__).with_name("triton_configs.toml")
_FEWEST_STEPS = 4  # of a program; below, splitting K further costs more than it spreads
_FINISHED_ROWS = 256
_UNPACKED_TILE = (16, 64)


@dataclass(frozen=True)
class Config:
    """An entry of triton_configs.toml, which explains the fields."""

    device: str
    tokens: int
    kernel: Literal["vector", "dot"]
    tile: tuple[int, int, int]
    warps: int
    stages: int
    programs: int


def read(path: Path) -> tuple[Config, ...]:
    """The entries of a table, in order. Raises SettingsError when the file is missing or is no such table."""
    try:
        entries = tomllib.loads(path.read_text())["config"]
        return tuple(Config(**{**entry, "tile": tuple(entry["tile"])}) for entry in entries)
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise SettingsError(f"{path}: not a table of Triton configurations: {error}") from error


@functools.cache
def table() -> tuple[Config, ...]:
    """The entries of triton_configs.toml, or of the file that SWIFTPRUNE_TRITON_CONFIGS names."""
    return read(Path(os.environ.get(CONFIGS_VARIABLE) or BUILT_IN))


def config_for(device: str, tokens: int) -> Config:
    """The first entry of the table for this device's name and so many tokens."""
    for config in table():
        if config.device in ("", device) and tokens <= config.tokens:
            return config
    raise SettingsError(f"no Triton configuration for {tokens} tokens on {device or 'any device'}")


def unsupported_reason(shape: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why these kernels cannot take a weight of this shape (N, K) and dtype here, or None when they can."""
    if not installed():
        return "Triton is not installed: pip install 'swiftprune[gpu]'"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the Triton kernels take float16 or bfloat16, not {dtype}"
    if shape[1] % WEIGHTS_PER_BYTE:
        return f"the Triton kernels need in_features in multiples of {WEIGHTS_PER_BYTE}, not {shape[1]}"
    return None


def installed() -> bool:
    """Whether there is a Triton to compile the kernels."""
    return importlib.util.find_spec("triton") is not None


def shares_of(config: Config, rows: int, width: int, tokens: int, multiprocessors: int) -> tuple[int, int]:
    """(shares, bytes): into how many parts K is split, of how many bytes of metadata each but the last.

    So many that every multiprocessor has its `programs`, as long as each has `_FEWEST_STEPS` tiles to go. All begin
    where the row is aligned as it is at its start.
    """
    tile_tokens, tile_rows, tile_bytes = config.tile
    programs = -(-rows // tile_rows) * (1 if config.kernel == "vector" else -(-tokens // tile_tokens))
    tiles = -(-width // tile_bytes)
    wanted = min(-(-config.programs * multiprocessors // programs), max(1, tiles // _FEWEST_STEPS))
    whole = math.lcm(tile_bytes, _alignment(width))
    share = -(-(-(-tiles // wanted) * tile_bytes) // whole) * whole
    return -(-width // share), share


def _alignment(width: int) -> int:
    """Bytes of metadata that rows of `width` of them are a multiple of, as far as that widens loads."""
    return math.gcd(width, ALIGNMENT)


def linear24(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """x W^T * scale + bias: (..., N) in the dtype of `x` (..., K), which is float16 or bfloat16 and not empty.

    `values` (N, K/2) are of that dtype, or int8 with a `scale` (N,) float32. Sums are float32.
    """
    # Here, since deciding on interpreter or compiler is done on import.
    from swiftprune.kernels import triton_kernels as kernels

    rows, half = values.shape
    columns = 2 * half
    flat = aligned_rows(x)
    tokens = flat.shape[0]
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    config = config or config_for(_device_name(x.device), tokens)
    width = columns // WEIGHTS_PER_BYTE
    align = _alignment(width)
    shares, share = shares_of(config, rows, width, tokens, _multiprocessors(x.device))
    tile_tokens, tile_rows, tile_bytes = config.tile
    given: dict[str, Any] = {"SCALED": scale is not None, "BIASED": bias is not None}
    out, now = y, given
    if shares > 1:
        out = torch.empty(shares, tokens, rows, dtype=torch.float32, device=x.device)
        now = {"SCALED": False, "BIASED": False}
    if config.kernel == "vector":
        kernel, grid, how = kernels.vector, (-(-rows // tile_rows), shares, 1), {"BITS": 8 * values.dtype.itemsize}
    else:
        kernel, grid = kernels.dot, (-(-rows // tile_rows), shares, -(-tokens // tile_tokens))
        how = {"DTYPE": kernels.dot_type(x.dtype)}
    kernel[grid](
        flat,
        values,
        metadata,
        scale,
        bias,
        out,
        tokens,
        rows,
        width // align,
        share // align,
        ALIGN=align,
        **now,
        **how,
        BM=tile_tokens,
        BN=tile_rows,
        BYTES=tile_bytes,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if shares > 1:
        kernels.finish[-(-rows // _FINISHED_ROWS), tokens](
            out, scale, bias, y, rows, shares, **given, BN=_FINISHED_ROWS
        )
    return y


def unpack24(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense weight (N, K) of a packed pair with K a multiple of 8, which is not checked."""
    from swiftprune.kernels import triton_kernels as kernels

    rows, half = values.shape
    width = 2 * half // WEIGHTS_PER_BYTE
    align = _alignment(width)
    weight = torch.empty(rows, 2 * half, dtype=values.dtype, device=values.device)
    tile_rows, tile_bytes = _UNPACKED_TILE
    kernels.unpack[-(-rows // tile_rows), -(-width // tile_bytes)](
        values, metadata, weight, rows, width // align, ALIGN=align, BN=tile_rows, BYTES=tile_bytes
    )
    return weight


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter, a few, so that K is split there too.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
