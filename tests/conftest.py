"""Fixtures that several test files share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
from transformers.utils import logging

from tests import models

logging.disable_progress_bar()
# No deadline for an example: a busy machine is no failure.
hypothesis.settings.register_profile("swiftprune", deadline=None)
hypothesis.settings.load_profile("swiftprune")


@pytest.fixture(autouse=True)
def _computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test gets must not depend on whether its machine is faster in bfloat16."""
    monkeypatch.setattr("swiftprune.config.faster_type", lambda device: "float32")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(models.TEXT)
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of that name on first use; tests must not write to it."""
    root = tmp_path_factory.mktemp("models")

    def get(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            models.write_model(folder, (models.SUPPORTED)[name])
        return folder

    return get


@pytest.fixture
def tiny_copy(tiny_models: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_models("llama-gqa-tied"), tmp_path / "model"))


@pytest.fixture
def cuda_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU stand-ins for the operators that torch has for CUDA only; they insist on what the real ones insist on."""

    def product(weight: Tensor, dense: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
        assert dense.dtype == weight.dtype
        assert dense.data_ptr() % 16 == 0, "misaligned operand"
        assert dense.stride(0) == 1, "8-bit kernels take the dense side column-major only"
        assert dense.shape[1] % (8 if dense.element_size() == 2 else 16) == 0
        sums = weight.double() @ dense.double()
        if bias is not None:
            assert bias.dtype == dense.dtype
            assert bias.shape == sums.shape[:1]
            sums += bias.double()[:, None]
        return sums.to(out_dtype or dense.dtype)

    def cutlass(packed: Tensor, meta: Tensor, dense: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        weight: Tensor = sparse_semi_structured_to_dense_cutlass(packed, meta)  # type: ignore[no-untyped-call]
        return product(weight, dense, None, out_dtype)

    def cutlass_with_bias(
        bias: Tensor,
        packed: Tensor,
        meta: Tensor,
        dense: Tensor,
        *,
        alpha: Any = 1,
        beta: Any = 1,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        weight: Tensor = sparse_semi_structured_to_dense_cutlass(packed, meta)  # type: ignore[no-untyped-call]
        return product(weight, dense, bias, out_dtype)

    def cusparselt(
        packed: Tensor,
        dense: Tensor,
        bias: Any = None,
        alpha: Any = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
        split_k: int = 1,
        split_k_mode: int = -1,
    ) -> Tensor:
        assert alpha is None
        assert dense.t().is_contiguous(), "cuSPARSELt takes the rows of x to be adjacent, whatever their strides"
        y = product(packed, dense, bias, out_dtype)
        return y.t().contiguous() if transpose_result else y

    monkeypatch.setattr(SparseSemiStructuredTensor, "_validate_device_dim_dtype_shape", lambda weight: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_sparse_semi_structured_mm", cutlass, "CPU")
        library.impl("_sparse_semi_structured_addmm", cutlass_with_bias, "CPU")
        library.impl("_cslt_compress", torch.clone, "CPU")
        library.impl("_cslt_sparse_mm", cusparselt, "CPU")
        yield
