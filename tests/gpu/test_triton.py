"""The Triton kernels: their results, in Triton's interpreter, and the code they compile to for real GPUs."""

from __future__ import annotations

import collections
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftprune.errors import SettingsError
from swiftprune.kernels import triton_linear
from swiftprune.kernels.triton_linear import Config

triton = pytest.importorskip("triton")


def test_interpreted() -> None:
    """All of interpreted.py passes, and nothing of it is skipped."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("interpreted.py")),
    ]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d\d+ passed in", run.stdout, re.MULTILINE), run.stdout


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((8, 12), torch.float16, "multiples of 8, not 12"), ((8, 16), torch.float32, "not torch.float32")],
)
def test_weights_that_are_refused(shape: tuple[int, int], dtype: torch.dtype, message: str) -> None:
    assert message in (triton_linear.unsupported_reason(shape, dtype) or "")
    assert triton_linear.unsupported_reason((8, 16), torch.bfloat16) is None


def test_the_table_covers_all_tokens_and_devices_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in (1, 2, 3, 4, 5, 16, 17, 100_000):
        config = triton_linear.config_for("any", tokens)
        assert config.kernel == ("vector" if tokens <= 4 else "dot")
        assert config.kernel == "dot" or config.tile[0] >= tokens
    own = tmp_path / "own.toml"
    entry = '[[config]]\ndevice = "{}"\ntokens = 9\nkernel = "dot"\ntile = [16, {}, 16]\n'
    entry += "warps = 4\nstages = 2\nprograms = 1\n"
    own.write_text(entry.format("L4", 32) + entry.format("", 64))
    monkeypatch.setenv("SWIFTPRUNE_TRITON_CONFIGS", str(own))
    triton_linear.table.cache_clear()
    try:
        assert triton_linear.config_for("L4", 3).tile == (16, 32, 16)
        assert triton_linear.config_for("A100", 9).tile == (16, 64, 16)
        with pytest.raises(SettingsError, match="for 10 tokens on L4"):
            triton_linear.config_for("L4", 10)
        own.write_text("[[config]]\ntokens = 1\n")
        triton_linear.table.cache_clear()
        with pytest.raises(SettingsError, match=r"own\.toml: not a table"):
            triton_linear.config_for("L4", 1)
    finally:
        triton_linear.table.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "rows", "width", "multiprocessors"),
    [(1, 14336, 512, 132), (1, 256, 64, 132), (64, 4096, 1792, 108), (300, 128, 8208, 132), (1, 64, 4104, 132)],
)
def test_k_is_split_until_all_multiprocessors_work(tokens: int, rows: int, width: int, multiprocessors: int) -> None:
    config = triton_linear.config_for("", tokens)
    shares, share = triton_linear.shares_of(config, rows, width, tokens, multiprocessors)
    assert (shares - 1) * share < width <= shares * share
    assert share % config.tile[2] == share % math.gcd(width, 16) == 0
    together = 1 if config.kernel == "vector" else math.ceil(tokens / config.tile[0])
    programs = shares * math.ceil(rows / config.tile[1]) * together
    assert programs >= config.programs * multiprocessors / 2 or share <= 8 * config.tile[2]


# Compute capability: instruction that feeds the tensor cores.
TARGETS = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
COMPILED = [
    (capability, tokens, bits)
    for capability in TARGETS
    for tokens in (1, 4, 16, 128)
    for bits in (16, 8)
    if capability in (80, 90) or (tokens, bits) in ((1, 16), (16, 16))
]


def compiled(
    kernel: Any, constants: dict[str, Any], target: Any, warps: int = 4, stages: int = 2, bits: int = 16
) -> Any:
    """As a launch with bfloat16 inputs and aligned tensors would compile it; a bias or scale of None is a constant."""
    from triton.compiler import ASTSource

    pointers = {
        "x_ptr": "*bf16",
        "values_ptr": "*bf16" if bits == 16 else "*i8",
        "metadata_ptr": "*u8",
        "scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
        "sums_ptr": "*fp32",
    }
    names = kernel.arg_names
    assert constants.keys() <= set(names)
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in pointers and name not in constants
    }
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, aligned)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def constants_for(config: Config, tokens: int, bits: int) -> dict[str, Any]:
    """Triton also takes an argument that is 1 for a constant."""
    from swiftprune.kernels import triton_kernels

    constants: dict[str, Any] = {"ALIGN": 16, "SCALED": bits == 8, "BIASED": tokens > 1}
    constants |= dict(zip(("BM", "BN", "BYTES"), config.tile, strict=True))
    constants |= {"BITS": bits} if config.kernel == "vector" else {"DTYPE": triton_kernels.dot_type(torch.bfloat16)}
    constants |= {} if constants["SCALED"] else {"scale_ptr": None}
    return constants | ({} if constants["BIASED"] else {"bias_ptr": None, "tokens": 1})


@pytest.mark.parametrize(("capability", "tokens", "bits"), COMPILED)
def test_compiled_for(capability: int, tokens: int, bits: int, tmp_path: Path) -> None:
    """With the table's configuration: wide loads of the weight, tensor cores where they are meant, no spilling."""
    from triton.backends.compiler import GPUTarget

    from swiftprune.kernels import triton_kernels

    config = triton_linear.config_for("", tokens)
    kernel = getattr(triton_kernels, config.kernel)
    target = GPUTarget("cuda", capability, 32)
    found = compiled(kernel, constants_for(config, tokens, bits), target, config.warps, config.stages, bits)
    ptx = found.asm["ptx"]
    instructions = collections.Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", ptx, re.MULTILINE))
    dense = {name for name in instructions if re.match(r"mma\.|wgmma\.mma|tcgen05\.mma", name)}
    assert bool(dense) == (config.kernel == "dot")
    assert all(name.startswith(TARGETS[capability]) for name in dense)
    # 16 bytes at a time, into registers or on the way to the tensor cores.
    assert any(re.match(r"ld\.global.*\.v(4\.b32|2\.b64)|cp\.async\.cg", name) for name in instructions), instructions
    if config.kernel == "vector":  # nothing but the sums is passed between threads, once the loop is over
        loop = ptx[ptx.index("ld.global") : ptx.index("shfl.sync")]
        assert not re.search(r"bar\.sync|st\.shared", loop)
    usage = resources(found.asm["cubin"], tmp_path)
    assert usage["LOCAL"] == 0, usage  # where registers are spilled
    assert usage["REG"] * 32 * config.warps <= 65536, usage  # of a multiprocessor


@pytest.mark.parametrize("capability", [80, 100])
def test_the_smaller_kernels_compile(capability: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget

    from swiftprune.kernels import triton_kernels

    target = GPUTarget("cuda", capability, 32)
    for constants in (
        {"scale_ptr": None, "bias_ptr": None, "SCALED": False, "BIASED": False},
        {"SCALED": True, "BIASED": True},
    ):
        found = compiled(triton_kernels.finish, constants | {"BN": 256}, target)
        assert resources(found.asm["cubin"], tmp_path)["LOCAL"] == 0
    found = compiled(triton_kernels.unpack, {"ALIGN": 16, "BN": 16, "BYTES": 64}, target)
    assert resources(found.asm["cubin"], tmp_path)["LOCAL"] == 0
    assert re.search(r"st\.global.*\.v(4\.b32|2\.b64)", found.asm["ptx"])


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers of a thread, and bytes of local memory, as cuobjdump has them."""
    (folder / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|LOCAL):(\d+)", said)}


def test_compiled_for_amd() -> None:
    """gfx942 (MI300): its matrix cores."""
    from triton.backends.compiler import GPUTarget

    from swiftprune.kernels import triton_kernels

    config = triton_linear.config_for("", 16)
    target = GPUTarget("hip", "gfx942", 64)
    found = compiled(triton_kernels.dot, constants_for(config, 16, 16), target, config.warps)
    assert "v_mfma_" in found.asm["amdgcn"]
