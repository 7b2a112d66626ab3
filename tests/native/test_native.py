"""The C++ kernels outside Python: under the sanitizers here, and for 64-bit Arm in an emulator."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from swiftprune.kernels.native import LINEAR_ISAS, QUANT_ISAS, supported_isas

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "swiftprune" / "kernels" / "csrc"


@pytest.fixture(scope="module")
def cmake() -> str:
    return str(Path(sys.executable).parent / "cmake")  # of the extra `dev`


def sanitized(cmake: str, folder: Path) -> Path:
    # What sanitizers put between takes six times as long to compile at -O3.
    flags = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -g1"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DSWIFTPRUNE_CHECK=ON", f"-DCMAKE_CXX_FLAGS={flags}"]
    for command in (configure, [cmake, "--build", str(folder), "--parallel", "2"]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder / "linear24_check"


@pytest.mark.skipif(platform.system() != "Linux", reason="ASan and UBSan as GCC and Clang have them on Linux")
def test_linear_kernels_under_the_sanitizers(cmake: str, tmp_path: Path) -> None:
    run = subprocess.run([sanitized(cmake, tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[:3000]
    result = dict(line.split(": ") for line in run.stdout.splitlines())
    quantized = ("avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", "generic")
    assert sorted(result) == sorted([*LINEAR_ISAS, *(f"{isa}, 8 and 4 bits" for isa in quantized)])
    for name in (*supported_isas(), *(f"{isa}, 8 and 4 bits" for isa in QUANT_ISAS)):
        assert result[name] == "right"


def test_the_neon_kernel_in_an_emulator(tmp_path: Path) -> None:
    """Compiled by Zig for Linux on 64-bit Arm and run in Unicorn: this says that it is right, not that it is fast."""
    pytest.importorskip("ziglang", reason="make test-neon installs it")
    pytest.importorskip("unicorn", reason="make test-neon installs it")
    from tests.native import emulator

    sources = ["tiled", "dispatch", "prefetch", "prune_pack_generic", "linear24_generic", "linear24_neon"]
    sources += ["threads", "quantized_tiled", "quantized_generic", "quantized_neon_dotprod"]
    program = tmp_path / "linear24_check"
    compiler = [sys.executable, "-m", "ziglang", "c++", "--target=aarch64-linux-musl", "-static", "-std=c++17", "-O2"]
    command = [
        *compiler,
        "-ffp-contract=off",
        "-DSWIFTPRUNE_NEON=1",
        "-DCHECK_THREADS=1",
        "-mcpu=cortex_a76",  # which has the dot product instructions
        f"-I{SOURCES}",
        "-o",
        str(program),
        str(ROOT / "tests" / "native" / "linear24_check.cpp"),
        *(str(SOURCES / f"{name}.cpp") for name in sources),
    ]
    subprocess.run(command, check=True)
    status, written = emulator.run(program)
    assert status == 0, written
    assert "neon: right" in written
    assert "neon_dotprod, 8 and 4 bits: right" in written
