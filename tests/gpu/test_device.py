"""On a real GPU, where there is one: every backend and plan, as servers call them. Nothing here has run yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters import torch_sparse
from exporters.checkpoint import export
from swiftprune import pack, prune_module, unpack
from swiftprune.config import PruneSettings
from swiftprune.kernels import dispatch, gpu
from swiftprune.kernels.linear import Linear24
from tests.gpu.weights import random_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS, COLS = 256, 512
TOLERANCE = {None: 5e-3, torch.int8: 3e-2, torch.float8_e4m3fn: 6e-2}


def the_weight() -> Tensor:
    return random_weight(ROWS, COLS, torch.bfloat16)


def layer_on(backend: str) -> Linear24:
    bias = torch.arange(ROWS) / ROWS
    layer = Linear24.from_packed(pack(the_weight()), bias, backend=dispatch.REFERENCE).to("cuda")
    reason = gpu.unsupported_reasons(torch.bfloat16, (ROWS, COLS), torch.cuda.get_device_capability())
    for name in backend.replace("<=8", "").split(","):
        if reason.get(name):
            pytest.skip(str(reason[name]))
    return layer.use_backend(backend)


def check(layer: Linear24, x: Tensor, y: Tensor, backend: str) -> None:
    assert layer.bias is not None
    expected = x.double() @ the_weight().cuda().double().T + layer.bias.double()
    quantized = [gpu.BACKENDS[name].quantized for name in backend.replace("<=8", "").split(",")]
    error = float((y.double() - expected).norm() / expected.norm())
    assert error < max(TOLERANCE[dtype] for dtype in quantized), error


PLANS = [*gpu.BACKENDS, "triton<=8,unpack", "triton<=8,cutlass"]


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 33, 300])
def test_eager_and_sliced(backend: str, tokens: int) -> None:
    layer = layer_on(backend)
    wide = torch.randn(tokens, 3 * COLS + 1, device="cuda").bfloat16()
    for x in (wide[:, :COLS].contiguous(), wide[:, :COLS], wide[:, 1 : COLS + 1], wide[None, :, COLS : 2 * COLS]):
        check(layer, x.reshape(-1, COLS), layer(x).reshape(-1, ROWS), backend)


@pytest.mark.parametrize("backend", PLANS)
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_captured_graph_replayed_with_other_inputs(backend: str, tokens: int) -> None:
    layer = layer_on(backend)
    x = torch.randn(tokens, COLS, device="cuda").bfloat16()
    for _ in range(3):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        check(layer, x, y, backend)


@pytest.mark.parametrize("backend", PLANS)
def test_compiled(backend: str) -> None:
    layer = layer_on(backend)
    compiled: Callable[[Tensor], Tensor] = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for tokens in (1, 5, 64):
        x = torch.randn(tokens, COLS, device="cuda").bfloat16()
        with torch.no_grad():
            check(layer, x, compiled(x).clone(), backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", PLANS)
def test_another_device_than_the_current_one(backend: str) -> None:
    layer = layer_on(backend)
    x = torch.randn(5, COLS, device="cuda:1").bfloat16()
    y = layer.to("cuda:1")(x)
    assert y.device == x.device
    check(layer.to("cuda:0"), x.to("cuda:0"), y.to("cuda:0"), backend)


def test_pack_unpack_and_prune_on_the_device() -> None:
    """By the torch reference, which gives the CPU's bits."""
    weight = the_weight()
    packed, expected = pack(weight.cuda()), pack(weight)
    assert torch.equal(packed.values.cpu(), expected.values)
    assert torch.equal(packed.metadata.cpu(), expected.metadata)
    assert torch.equal(unpack(packed).cpu(), weight)
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 64)
    on_gpu = torch.nn.Linear(64, 64, device="cuda")
    on_gpu.load_state_dict(linear.state_dict())
    batches = [torch.randn(16, 64)]
    prune_module(linear, batches)
    prune_module(on_gpu, [batch.cuda() for batch in batches])
    assert torch.equal(on_gpu.weight.cpu() != 0, linear.weight != 0)


def test_the_torch_target_multiplies(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    if torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("torch's CUTLASS kernels are for compute capability 8.x")
    export(tiny_models("llama-mha-untied"), tmp_path / "out", PruneSettings(calibration="none"), target="torch")
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = torch_sparse.load(tmp_path / "out", "cuda")[name]
    x = torch.randn(64, 64, device="cuda").bfloat16()
    y = torch.nn.functional.linear(x, weight)
    assert torch.allclose(y, x @ weight.to_dense().T, atol=0.05, rtol=0.05)
