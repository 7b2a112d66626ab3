"""Which GPU backend is chosen, on devices that are only named."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swiftprune.errors import SettingsError
from swiftprune.kernels import dispatch, gpu, plan, triton_linear
from swiftprune.kernels.plan import Plan

H100 = "NVIDIA H100 80GB HBM3", (9, 0)
A100 = "NVIDIA A100-SXM4-40GB", (8, 0)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _all_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_linear, "installed", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.delenv(plan.TABLE_VARIABLE, raising=False)
    dispatch.gpu_backend.cache_clear()
    plan._table.cache_clear()
    yield
    dispatch.gpu_backend.cache_clear()


@given(st.lists(st.integers(1, 10**6), unique=True, max_size=5), st.data())
def test_plans_survive_their_text(limits: list[int], data: st.DataObject) -> None:
    names = data.draw(
        st.lists(st.sampled_from(sorted(gpu.BACKENDS)), min_size=len(limits) + 1, max_size=len(limits) + 1)
    )
    made = Plan(tuple(zip([*sorted(limits), None], names, strict=True)))
    assert Plan.parse(str(made)) == made
    for tokens in (1, 5, 10**7):
        expected = next(name for limit, name in made.choices if limit is None or limit >= tokens)
        assert made.backend(tokens) == expected


@pytest.mark.parametrize(
    "text", ["", "avx2", "triton,", "triton<=8", "triton<=8,unpack<=4,unpack", "triton<=x,unpack", "triton<=-1,unpack"]
)
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(SettingsError, match="is no plan"):
        Plan.parse(text)


def test_where_two_measured_numbers_of_tokens_differ_their_geometric_mean_divides() -> None:
    made = Plan.of_best([1, 16, 64, 1024], ["triton", "triton", "unpack", "unpack"])
    assert str(made) == "triton<=32,unpack"
    assert str(Plan.of_best([1, 16], ["cutlass", "cutlass"])) == "cutlass"


def test_the_model_by_hand() -> None:
    """4096 x 4096 on an H100: 16.8 M weights, 18.9 MB packed and 33.6 MB dense; 2847.5 MB/ms are read."""
    h100 = plan.gpu_model(*H100)
    one = plan.modelled_seconds("triton", h100, 4096, 4096, 1)
    assert one == pytest.approx(3e-6 + (9 / 8 * 4096**2 + 2 * 8192) / (0.85 * 3350e9))
    many = plan.modelled_seconds("triton", h100, 4096, 4096, 4096)
    assert many == pytest.approx(3e-6 + 2 * 4096**3 / (0.4 * 989e12))
    unpacked = plan.modelled_seconds("unpack", h100, 4096, 4096, 1)
    assert unpacked == pytest.approx(6e-6 + (25 / 8 + 2) * 4096**2 / (0.85 * 3350e9), rel=1e-3)
    a100 = plan.gpu_model(*A100)
    padded = plan.modelled_seconds("cutlass", a100, 4096, 4096, 129)
    assert padded == pytest.approx(3e-6 + max(2 * 256 * 4096**2 / (0.95 * 312e12), 0))


def test_data_sheets_by_name() -> None:
    for name, expected in [
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A10G", "unknown"),
        ("NVIDIA B200", "B200"),
    ]:
        assert plan.gpu_model(name, (8, 6)).name == expected


def chosen(device: tuple[str, tuple[int, int]], shape: tuple[int, int] = (4096, 4096)) -> Plan:
    return Plan.parse(dispatch.gpu_backend(BF16, shape, *device))


def test_without_a_table_the_model_decides() -> None:
    h100, a100 = chosen(H100), chosen(A100)
    assert h100.backend(1) == a100.backend(1) == "triton"
    assert h100.backend(8192) == "unpack"
    assert a100.backend(8192) == "cutlass"
    assert h100.backends | a100.backends <= set(gpu.EXACT)


def test_shapes_that_no_backend_takes_run_on_the_reference_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    assert dispatch.gpu_backend(BF16, (64, 132), *H100) == "reference"
    assert dispatch.gpu_backend(torch.float32, (64, 128), *H100) == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "multiples of 8, not 132" in caplog.text


def test_a_choice_is_logged_once_for_a_shape(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(3):
        chosen(H100)
        chosen(H100, (14336, 4096))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("swiftprune: 4096x4096 bfloat16 on NVIDIA H100 80GB HBM3: triton<=")
    assert "by the model of bytes and operations for H100" in said[0]


def write_table(path: Path, **change: Any) -> Path:
    cell = {"dtype": "bfloat16", "rows": 4096, "cols": 4096, "tokens": [1, 64], "best": ["triton", "cusparselt"]}
    path.write_text(json.dumps({"version": 1, "devices": {H100[0]: [cell | change]}}))
    return path


def test_a_measured_table_comes_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.TABLE_VARIABLE, str(write_table(tmp_path / "gpu.json")))
    assert str(chosen(H100)) == str(chosen(H100, (4096, 8192))) == "triton<=8,cusparselt"
    assert "cusparselt" not in chosen(H100, (4096, 8208)).backends  # too far off
    assert "cusparselt" not in chosen(A100).backends
    assert "cusparselt" not in dispatch.gpu_backend(torch.float16, (4096, 4096), *H100)


def test_what_was_measured_and_cannot_run_here_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.TABLE_VARIABLE, str(write_table(tmp_path / "gpu.json")))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert chosen(H100).backends == {"triton", "unpack"}


@pytest.mark.parametrize(
    "change",
    [
        {"best": ["triton"]},
        {"best": ["triton", "cublas"]},
        {"tokens": [64, 1]},
        {"tokens": [0, 1]},
        {"rows": "many"},
        {"best": [], "tokens": []},
    ],
)
def test_a_broken_table_is_named(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.TABLE_VARIABLE, str(write_table(tmp_path / "gpu.json", **change)))
    with pytest.raises(SettingsError, match=r"gpu\.json \(SWIFTPRUNE_GPU_TABLE\): not a table"):
        chosen(H100)


def test_tables_that_are_missing_or_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.TABLE_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(SettingsError, match="No such file"):
        chosen(H100)
    (tmp_path / "old.json").write_text('{"version": 0, "devices": {}}')
    monkeypatch.setenv(plan.TABLE_VARIABLE, str(tmp_path / "old.json"))
    with pytest.raises(SettingsError, match="version 0, not 1: measure again"):
        chosen(H100)


def asked(text: str, device: tuple[str, tuple[int, int]] = H100, shape: tuple[int, int] = (4096, 4096)) -> str:
    return dispatch.gpu_backend(BF16, shape, *device, text, " (asked for by SWIFTPRUNE_BACKEND)")


def test_what_is_asked_for_is_what_runs() -> None:
    for text in ("triton", "unpack", "cusparselt", "triton-int8", "cusparselt-fp8", "triton<=8,unpack", "reference"):
        assert asked(text) == text
    assert asked("cutlass", A100) == "cutlass"


@pytest.mark.parametrize(
    ("text", "device", "shape", "message"),
    [
        ("cutlass", H100, (64, 64), "cutlass needs compute capability 8.x"),
        ("triton<=8,cutlass-int8", H100, (64, 128), "'cutlass-int8' cannot run .* capability 8.x"),
        ("cusparselt-fp8", A100, (64, 64), r"needs compute capability 8\.9, and this is 8\.0"),
        ("cutlass-int8", A100, (64, 64), r"needs int8 weights in multiples of \(16, 128\)"),
        ("triton", H100, (64, 12), "multiples of 8, not 12"),
        ("avx2", H100, (64, 64), "unknown backend 'avx2' .*; known: .*triton"),
        (
            "triton<=8,fast",
            H100,
            (64, 64),
            "is no plan: 'fast' is not one of .* tokens .asked for by SWIFTPRUNE_BACKEND",
        ),
        ("triton<=8", H100, (64, 64), "limits must rise, and the last backend has none .asked for by"),
        ("fast", H100, (64, 64), "unknown backend 'fast' .*asked for by SWIFTPRUNE_BACKEND"),
    ],
)
def test_what_cannot_run_is_refused(
    text: str, device: tuple[str, tuple[int, int]], shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        asked(text, device, shape)


def test_on_a_cpu_gpu_backends_are_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"'triton' cannot run .* on this machine's cpu; available: "):
        dispatch.linear_backend(BF16, "triton")
    with pytest.raises(SettingsError, match=r"unknown backend 'fastest'; known: avx512_bf16.*cusparselt"):
        dispatch.linear_backend(BF16, "fastest")
