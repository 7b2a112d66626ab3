"""Tables out of GPU measurements, which are made up here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from runtime_bench import cli, gpu_tables, results
from runtime_bench.gpu import GpuCell, GpuResult, GpuTime
from runtime_bench.machine import Gpu, this_machine
from swiftprune.errors import SettingsError
from swiftprune.formats.spec import Packed24
from swiftprune.kernels import dispatch, plan, triton_linear
from swiftprune.kernels.packing import unpack
from swiftprune.kernels.triton_linear import Config
from tests.runtime_bench.test_gpu import FakeDevice

L4 = "NVIDIA L4"


def measured(us: dict[int, dict[str, float]], dtype: str = "bfloat16") -> GpuResult:
    """Medians by tokens and backend; a negative one is of a wrong product."""
    cells = [
        GpuCell(
            rows=4096,
            cols=4096,
            tokens=tokens,
            dtype=dtype,
            times=[
                GpuTime(backend=name, status="ok", us=[time, time / 2, 3 * time])
                if time > 0
                else GpuTime(backend=name, status="void", reason="wrong")
                for name, time in by.items()
            ],
        )
        for tokens, by in us.items()
    ]
    gpu = Gpu(name=L4, compute_capability="8.9", memory_gb=24, cuda="13.0")
    return GpuResult(
        machine=this_machine(gpu=gpu),
        command="swiftprune-bench gpu-suite",
        checks=[],
        peaks=None,
        cells=cells,
        l2_flush_mb=96,
        graph_capture=True,
    )


MEASURED = {
    1: {"cublas": 1.0, "triton": 5.0, "cutlass": 9.0, "reference": 2.0},
    16: {"cublas": 9.0, "triton": -1.0, "cutlass": 8.0, "unpack": 8.5},
    256: {"cublas": 9.0, "triton": 20.0, "cusparselt": 4.0},
}


def test_the_fastest_that_was_right_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not cublas, which holds the dense weight, nor the reference. What is written is what serving reads."""
    results.save(measured(MEASURED), tmp_path / "gpu-suite.json")
    out = tmp_path / "table.json"
    run = CliRunner().invoke(cli.app, ["gpu-table", str(tmp_path / "gpu-suite.json"), "--out", str(out)])
    assert run.exit_code == 0, run.output
    best = ["triton", "cutlass", "cusparselt"]
    expected = {"dtype": "bfloat16", "rows": 4096, "cols": 4096, "tokens": [1, 16, 256], "best": best}
    assert json.loads(out.read_text())["devices"][L4] == [expected]
    monkeypatch.setenv(plan.TABLE_VARIABLE, str(out))
    monkeypatch.setattr(triton_linear, "installed", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    dispatch.gpu_backend.cache_clear()
    assert dispatch.gpu_backend(torch.bfloat16, (4096, 4096), L4, (8, 9)) == "triton<=4,cutlass<=64,cusparselt"
    dispatch.gpu_backend.cache_clear()


def test_nothing_right_is_no_table() -> None:
    with pytest.raises(SettingsError, match="nothing to choose from"):
        gpu_tables.backend_table([measured({1: {"cublas": 1.0, "triton": -1.0}}), measured(MEASURED, "int8")])


def test_other_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    run = CliRunner().invoke(cli.app, ["gpu-table", str(tmp_path / "x.json")])
    assert run.exit_code != 0


def test_tuning_takes_the_fastest_right_configuration() -> None:
    """Of four: one fails, one is fast and wrong, one slow. The table that comes out is one that launches read."""
    device = FakeDevice(us={"fast and wrong": lambda turn: 1.0, "right": lambda turn: 2.0, "slow": lambda turn: 3.0})
    names = {1: "fails", 2: "fast and wrong", 4: "slow", 8: "right"}

    def configs(tokens: int) -> Iterator[Config]:
        for warps in names:
            yield Config("", tokens, "dot", (16, 64, 16), warps, 2, 1)

    def multiply(x: Tensor, values: Tensor, metadata: Tensor, *, config: Config) -> Tensor:
        device.ran = names[config.warps]
        if device.ran == "fails":
            raise RuntimeError("out of shared memory")
        weight = unpack(Packed24(values, metadata))
        return x @ weight.T * (2 if device.ran == "fast and wrong" else 1)

    tuned = gpu_tables.tune(device, [1, 8], [(64, 128)], multiply=multiply, configs=configs)
    assert [(config.device, config.tokens, config.warps) for config in tuned] == [("fake", 1, 8), ("fake", 8, 8)]


def test_tuned_tables_are_read_back(tmp_path: Path) -> None:
    tuned = [Config(L4, 1, "vector", (1, 8, 64), 8, 2, 4), Config(L4, 10**9, "dot", (16, 64, 16), 4, 2, 1)]
    path = tmp_path / "own.toml"
    path.write_text(gpu_tables.configs_text(tuned))
    assert triton_linear.read(path) == (*tuned, *triton_linear.read(triton_linear.BUILT_IN))
    assert path.read_text().startswith("# How the Triton kernels are launched")


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 128])
def test_candidates_hold_all_tokens(tokens: int) -> None:
    tried = list(gpu_tables.candidates(tokens))
    assert len(tried) == len(set(tried)) >= 12
    assert all(config.tile[0] >= tokens and config.tokens == tokens for config in tried)
    assert {config.kernel for config in tried} == ({"vector", "dot"} if tokens <= 16 else {"dot"})
