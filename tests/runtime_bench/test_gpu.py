"""The GPU benchmark on a stand-in for the device: CPU tensors, times that were made up. No test asserts a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from runtime_bench import gpu, gpu_backends, result_files, results
from runtime_bench.gpu import Call, CudaDevice, GpuResult, GpuTime
from runtime_bench.gpu_backends import BACKENDS, DTYPES, Backend
from runtime_bench.machine import Gpu
from swiftprune.errors import SettingsError
from swiftprune.formats import cutlass
from swiftprune.kernels import reference, triton_linear
from swiftprune.kernels.packing import unpack

CPU = torch.device("cpu")
BY_NAME = {backend.name: backend for backend in BACKENDS}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class FakeDevice:
    """CPU tensors; a call takes the time written down for the contestant that ran last."""

    place = CPU
    flush_bytes = 96 << 20

    def __init__(self, capability: str = "9.0", us: dict[str, Callable[[int], float]] | None = None) -> None:
        self.capability = capability
        self.us = us or {}
        self.graphs = True
        self.clock_mhz = 1500.0
        self.ran = ""
        self.turns: list[str] = []

    def facts(self) -> Gpu:
        return Gpu(
            name="fake", compute_capability=self.capability, memory_gb=1, cuda="13.0", sm_clock_mhz=self.clock_mhz
        )

    def captured(self, run: Callable[[], Tensor]) -> Call:
        run()
        return Call(run, self.graphs)

    def timed(self, run: Callable[[], object], rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            self.ran = ""
            run()
            self.turns.append(self.ran)
            turn = self.turns.count(self.ran)
            times.append(self.us[self.ran](turn) if self.ran in self.us else 10.0)
        return times

    def contestant(self, name: str, product: Callable[[Tensor, Tensor], Tensor] | None = None) -> Backend:
        """A dense product, or what `product` makes of x and the weight."""

        def prepare(weight: Tensor) -> gpu_backends.Run:
            def run(x: Tensor) -> Tensor:
                self.ran = name
                return product(x, weight) if product else gpu_backends.truth(x, weight)

            return run

        return Backend(name, lambda shape, dtype: None, prepare)


@pytest.fixture(autouse=True)
def _small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(gpu, "GEMM", 64)


def measure(device: FakeDevice, backends: list[Backend] | None = None, **settings: Any) -> GpuResult:
    defaults: dict[str, Any] = {"dtypes": ["bfloat16"], "shapes": [(64, 128)], "tokens": [1], "rounds": 5}
    return gpu.suite(device, backends=BACKENDS if backends is None else backends, **defaults | settings)


def times_of(result: GpuResult, dtype: str = "bfloat16") -> dict[str, GpuTime]:
    cell = next(cell for cell in result.cells if cell.dtype == dtype)
    return {time.backend: time for time in cell.times}


@pytest.fixture
def layers_on_a_cpu(cuda_operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Linear24` takes backends of GPUs here, by stand-ins for torch's operators; Triton's kernels need a device."""

    def no_device(*_: object, **__: object) -> Tensor:
        raise RuntimeError("Triton has no device here")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kernel in ("linear24", "unpack24"):
        monkeypatch.setattr(triton_linear, kernel, no_device)


# On a CPU a layer takes the device for one of compute capability 8.0, which multiplies no fp8.
NOT_HERE = {"triton", "unpack", "triton-int8", "cusparselt-fp8"}


@pytest.mark.usefixtures("layers_on_a_cpu")
def test_every_backend_multiplies_right_up_to_its_operator() -> None:
    result = measure(FakeDevice("8.9"), dtypes=list(DTYPES), tokens=[1, 7, 40], rounds=2)
    failed = {check.name.partition(" ")[0].rstrip(":") for check in result.checks if not check.passed}
    assert failed == NOT_HERE  # Triton's are for devices, and tested on their own
    quantized = {backend.name for backend in BACKENDS if backend.quantized}
    assert quantized == {
        "cublas-int8",
        "cublas-fp8",
        "triton-int8",
        "cutlass-int8",
        "cusparselt-int8",
        "cusparselt-fp8",
    }
    assert len(result.checks) == 2 + (4 + 1) + (4 + 1) + (3 + 1) + 3 * (2 + 1) + 1 + len(quantized) * (2 + 1)
    assert len(result.cells) == 4 * 3
    for cell in result.cells:
        eight_bit = cell.dtype in ("int8", "float8_e4m3fn")
        unavailable = {time.backend for time in cell.times if time.status == "unavailable"}
        assert {time.status for time in cell.times} == {"ok", "unavailable"}
        assert unavailable == NOT_HERE | ({"reference"} | quantized if eight_bit else set()) | (
            {"cutlass"} if cell.dtype == "float8_e4m3fn" else set()
        )
    assert all(time.error == 0 for time in times_of(result, "int8").values() if time.status == "ok")
    errors = {name: time.error or 0 for name, time in times_of(result).items() if time.status == "ok"}
    assert all(error > 0 for error in errors.values())  # it is measured
    assert all(errors[name] > 2 * errors["cublas"] for name in quantized - NOT_HERE)
    assert result.peaks
    assert set(result.peaks.gemm_tflop_per_s) == set(DTYPES)


@no_gpu
def test_what_needs_cuda_is_unavailable_and_the_rest_still_measured() -> None:
    result = measure(FakeDevice("8.9"))
    times = times_of(result)
    assert [times[name].status for name in ("cublas", "cusparselt", "cutlass", "triton", "reference")] == [
        "ok",
        "unavailable",
        "unavailable",
        "unavailable",
        "ok",
    ]
    assert "cannot run torch.bfloat16 on this machine's cpu" in (times["cusparselt"].reason or "")
    assert "cannot run torch.bfloat16 on this machine's cpu" in (times["triton"].reason or "")
    passed = {check.name: check.passed for check in result.checks}
    assert not passed["cusparselt bfloat16: products"]
    assert not passed["CUTLASS layout: the products of torch's own"]
    assert passed["reference: -0.0 and groups of zeros"]
    detail = next(check.detail for check in result.checks if check.name == "cutlass float16: products")
    assert "backend 'cutlass' cannot run" in detail


@pytest.mark.parametrize(
    ("capability", "refused"),
    [
        ((7, 5), {"bfloat16", "float16", "int8", "float8_e4m3fn"}),
        ((8, 0), {"float8_e4m3fn"}),
        ((8, 6), {"float8_e4m3fn"}),
        ((8, 9), set()),
        ((9, 0), set()),
        ((10, 0), set()),
        ((12, 0), set()),
    ],
)
def test_dtypes_by_capability(capability: tuple[int, int], refused: set[str]) -> None:
    reasons = {
        name: BY_NAME["cusparselt"].unsupported_reason(dtype, (64, 128), capability) for name, dtype in DTYPES.items()
    }
    assert {name for name, reason in reasons.items() if reason} == refused
    for reason in filter(None, reasons.values()):
        assert reason.endswith(f"this is {capability[0]}.{capability[1]}")


def test_cutlass_is_for_ampere_and_ada() -> None:
    result = measure(FakeDevice("9.0"))
    assert times_of(result)["cutlass"].reason == "cutlass needs compute capability 8.x, and this is 9.0"
    assert not [check for check in result.checks if "cutlass" in check.name.lower()]  # no failure, as no fault of it
    assert all(
        BY_NAME["cutlass"].unsupported_reason(torch.bfloat16, (64, 128), (8, minor)) is None for minor in (0, 6, 7, 9)
    )


@pytest.mark.parametrize(
    ("backend", "dtype", "smallest"),
    [
        ("cublas", "bfloat16", (1, 4)),
        ("cublas", "int8", (8, 8)),
        ("cublas", "float8_e4m3fn", (16, 16)),
        ("cusparselt", "bfloat16", (16, 16)),
        ("cusparselt", "int8", (32, 32)),
        ("cusparselt", "float8_e4m3fn", (32, 32)),
        ("cutlass", "float16", (32, 64)),
        ("cutlass", "int8", (16, 128)),
        ("cutlass", "float8_e4m3fn", None),
        ("reference", "bfloat16", (1, 4)),
        ("reference", "int8", None),
    ],
)
def test_shapes_by_backend(backend: str, dtype: str, smallest: tuple[int, int] | None) -> None:
    def refusal(rows: int, cols: int) -> str | None:
        return BY_NAME[backend].unsupported_reason(DTYPES[dtype], (rows, cols), (8, 9))

    if smallest is None:
        assert refusal(256, 256)
        return
    rows, cols = smallest
    assert refusal(rows, cols) is None
    assert refusal(3 * rows, 5 * cols) is None
    if rows > 1:
        assert refusal(rows // 2, cols)
        assert refusal(3 * rows // 2, cols)
    if cols > 4:
        assert refusal(rows, cols // 2)


def test_a_wrong_backend_is_void_without_times() -> None:
    device = FakeDevice()

    def forgets_an_input(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x[:, :-4], weight[:, :-4])

    backends = [
        device.contestant("cublas"),
        device.contestant("wrong", forgets_an_input),
        device.contestant("narrow", lambda x, weight: F.linear(x, weight)[:, 1:]),
        device.contestant("nan", lambda x, weight: F.linear(x, weight) * torch.nan),
    ]
    result = measure(device, backends, tokens=[3])
    times = times_of(result)
    assert times["cublas"].status == "ok"
    assert all(times[name].status == "void" and times[name].us == [] for name in ("wrong", "narrow", "nan"))
    assert "wrong" not in device.turns  # it was not even timed
    assert times["wrong"].error is not None
    assert times["wrong"].error > 5e-3
    assert "tolerance" in (times["wrong"].reason or "")
    assert "(3, 63)" in (times["narrow"].reason or "")
    assert result.cells[0].speedups == {}
    assert not next(check for check in result.checks if check.name == "wrong bfloat16: products").passed
    assert "| void: wrong result" in gpu.markdown(result)


def test_int8_has_no_tolerance() -> None:
    device = FakeDevice()
    backends = [device.contestant("off by one", lambda x, weight: gpu_backends.truth(x, weight) + 1)]
    assert times_of(measure(device, backends, dtypes=["int8"]), "int8")["off by one"].status == "void"


def test_an_exception_makes_a_backend_unavailable() -> None:
    device = FakeDevice()

    def refuses(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: not supported\nCompile with TORCH_USE_CUDA_DSA")

    def unprepared(weight: Tensor) -> gpu_backends.Run:
        raise ValueError("no such layout")

    backends = [
        device.contestant("cublas"),
        device.contestant("late", refuses),
        Backend("early", lambda shape, dtype: None, unprepared),
    ]
    times = times_of(measure(device, backends))
    assert (times["late"].status, times["late"].reason) == ("unavailable", "RuntimeError: CUDA error: not supported")
    assert (times["early"].status, times["early"].reason) == ("unavailable", "ValueError: no such layout")
    assert times["cublas"].status == "ok"


def test_no_figures_without_being_right() -> None:
    for broken in (
        {"status": "void", "reason": "wrong", "us": [1.0]},
        {"status": "unavailable", "us": []},
        {"status": "ok", "us": []},
        {"status": "ok", "us": [1.0], "reason": "why"},
    ):
        with pytest.raises(ValidationError, match="figures"):
            GpuTime.model_validate({"backend": "cutlass", **broken})


def test_speedups_are_of_paired_rounds() -> None:
    device = FakeDevice(us={"cublas": lambda turn: 10.0 * turn, "cutlass": lambda turn: 4.0 * turn})
    result = measure(device, [device.contestant("cublas"), device.contestant("cutlass")], rounds=9)
    times = times_of(result)
    assert times["cublas"].us == [10.0 * turn for turn in range(8, 17)]  # seven went into the measured peak
    (speedup,) = result.cells[0].speedups.values()
    # By rounds of each: turns of the two differ by the seven of the peak.
    ratios = [10 * (turn + 7) / (4 * turn) for turn in range(1, 10)]
    assert speedup.value == pytest.approx(sorted(ratios)[4])
    assert speedup.low < speedup.value < speedup.high
    assert f"{speedup.value:.2f} (" in gpu.markdown(result)


def test_contestants_take_turns_in_changing_order() -> None:
    device = FakeDevice()
    names = ["a", "b", "c"]
    measure(device, [device.contestant(name) for name in names], rounds=20)
    turns = [turn for turn in device.turns if turn]
    rounds = [tuple(turns[index : index + 3]) for index in range(0, len(turns), 3)]
    assert len(rounds) == 20
    assert all(sorted(each) == names for each in rounds)
    assert len(set(rounds)) > 3


def test_cells_beyond_the_budget_are_left_out_and_counted() -> None:
    device = FakeDevice()
    seconds = iter(range(0, 10_000, 10))
    result = measure(
        device,
        [device.contestant("cublas")],
        tokens=[1, 2, 3, 4, 5, 6],
        budget_seconds=65,
        clock=lambda: float(next(seconds)),
    )
    # A cell begins at 10, 30, 50 s and takes 10 s; the one that would begin at 70 s is too late.
    assert [cell.tokens for cell in result.cells] == [1, 2, 3]
    assert result.left_out == 3
    assert "65 s" in (result.stopped or "")
    assert "3 cells were left out" in gpu.markdown(result)
    assert result.checks


def test_the_most_informative_cells_come_first() -> None:
    device = FakeDevice()
    result = measure(
        device,
        [device.contestant("cublas")],
        dtypes=list(DTYPES),
        shapes=[(64, 128), (128, 64)],
        tokens=[1, 2],
        rounds=1,
    )
    order = [(cell.dtype, cell.rows, cell.tokens) for cell in result.cells]
    assert order[:4] == [("bfloat16", 64, 1), ("bfloat16", 64, 2), ("bfloat16", 128, 1), ("bfloat16", 128, 2)]
    assert [dtype for dtype, _, _ in order[::4]] == ["bfloat16", "float16", "int8", "float8_e4m3fn"]
    assert (result.left_out, result.stopped) == (0, None)


def test_a_device_that_gives_up_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    timed = device.timed

    def breaks(run: Callable[[], object], rounds: int) -> list[float]:
        if len(device.turns) > 20:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return timed(run, rounds)

    monkeypatch.setattr(device, "timed", breaks)
    result = measure(device, [device.contestant("cublas")], tokens=[1, 2, 3, 4], rounds=5)
    assert len(result.cells) == 1  # 14 turns were for the peaks
    assert result.left_out == 3
    assert "illegal memory access" in (result.stopped or "")


def test_a_check_that_raises_is_reported_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> Tensor:
        raise IndexError("out of range")

    monkeypatch.setattr(reference, "scatter", broken)
    device = FakeDevice()
    result = measure(device, [device.contestant("cublas")], rounds=1)
    checks = {check.name: check for check in result.checks}
    unpacked = checks.pop("packed pair: unpacked on the device")
    assert (unpacked.passed, unpacked.detail) == (False, "IndexError: out of range")
    assert checks["cublas bfloat16: products"].passed
    assert "FAILED packed pair" in gpu.markdown(result)


def test_checks_find_wrong_zeros_and_wrong_unpacking(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    nearly = device.contestant("cublas", lambda x, weight: gpu_backends.truth(x, weight) + 1e-6)
    monkeypatch.setattr(gpu_backends, "unpack", lambda packed: unpack(packed).roll(1, 0))
    result = measure(device, [nearly], rounds=1)
    failed = {check.name: check.detail for check in result.checks if not check.passed}
    assert "rows of zeros" in failed["cublas: -0.0 and groups of zeros"]
    assert "differs" in failed["packed pair: unpacked on the device"]


@pytest.mark.usefixtures("cuda_operators")
def test_the_check_of_the_layout_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def row_major(values: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
        return values, metadata.view(torch.int16)

    monkeypatch.setattr(cutlass, "to_cutlass", row_major)
    result = measure(FakeDevice("8.0"), [BY_NAME["cutlass"]], rounds=1)
    passed = {check.name for check in result.checks if check.passed}
    assert "CUTLASS layout: the products of torch's own" in {check.name for check in result.checks} - passed
    assert passed == {check.name for check in result.checks if "cutlass" not in check.name.lower()}


def test_launching_without_a_graph_is_said() -> None:
    device = FakeDevice()
    backends = [device.contestant("cublas")]
    assert measure(device, backends).graph_capture
    device.graphs = False
    result = measure(device, backends)
    assert not result.graph_capture
    assert not times_of(result)["cublas"].graph
    assert "(no graph)" in gpu.markdown(result)


def test_clocks_that_fall_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    clocks = iter([1900.0, 1900.0, 1200.0])
    facts = device.facts
    monkeypatch.setattr(device, "facts", lambda: facts().model_copy(update={"sm_clock_mhz": next(clocks)}))
    result = measure(device, [device.contestant("cublas")], tokens=[1, 2])
    assert result.conditions
    assert "GPU clocks went from 1200 to 1900 MHz" in result.conditions.warnings


def test_results_survive_the_disk(tmp_path: Path) -> None:
    device = FakeDevice()
    backends = [
        device.contestant("cublas"),
        device.contestant("cutlass", lambda x, weight: F.linear(x, weight) * torch.nan),
        BY_NAME["triton"],
    ]
    result = measure(device, backends)
    results.save(result, tmp_path / "gpu.json")
    loaded = result_files.load(tmp_path / "gpu.json")
    assert isinstance(loaded, GpuResult)
    assert loaded == result
    assert loaded.machine.gpu
    assert loaded.machine.gpu.name == "fake"
    assert loaded.l2_flush_mb == 96


def test_a_masked_weight_is_two_of_four_in_all_places() -> None:
    for dtype in DTYPES.values():
        weight = gpu_backends.masked_weight(64, 256, dtype, CPU).double()
        groups = weight.view(64, 64, 4) != 0
        assert int(groups.sum(-1).max()) == 2
        assert not (weight.signbit() & (weight == 0)).any()  # no -0.0
        patterns = {tuple(group) for group in groups.flatten(0, 1).tolist() if sum(group) == 2}
        assert len(patterns) == 6


@no_gpu
def test_without_a_gpu_it_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SettingsError, match=rf"torch {torch.__version__.replace('+', '.')} is built without CUDA"):
        gpu.require()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(SettingsError, match=r"built for CUDA 13\.0 but finds no device .*driver"):
        gpu.require()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu.require("cuda:1")
    with pytest.raises(SettingsError, match="torch finds 2"):
        gpu.require("cuda:2")
    with pytest.raises(SettingsError, match="cpu is no GPU"):
        gpu.require("cpu")


@no_gpu
def test_no_device_and_no_suite_without_cuda() -> None:
    with pytest.raises(SettingsError, match="no GPU"):
        CudaDevice()
    with pytest.raises(SettingsError, match="no GPU"):
        gpu.suite()


def test_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Properties:
        name, major, minor, uuid, total_memory = "NVIDIA L4", 8, 9, "12-ab", 24_000_000_000

    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *GPU-12-ab*) echo "580.65.06, 2040, [N/A]";; *) exit 6;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpu.facts()
    assert (found.name, found.compute_capability, found.memory_gb) == ("NVIDIA L4", "8.9", 24.0)
    assert (found.driver, found.sm_clock_mhz, found.memory_clock_mhz) == ("580.65.06", 2040, None)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.facts().driver is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    result = gpu.suite(shapes=[(256, 512)], tokens=[1, 33], dtypes=["bfloat16"], rounds=3)
    assert result.machine.gpu
    assert not [f"{check.name}: {check.detail}" for check in result.checks if not check.passed]
    assert times_of(result)["cublas"].status == "ok"
