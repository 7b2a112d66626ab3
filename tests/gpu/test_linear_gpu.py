"""Linear24 on GPU plans: on the CPU with stand-ins for operators, and traced on tensors that only claim a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from swiftprune.errors import SettingsError
from swiftprune.formats.spec import Packed24
from swiftprune.kernels import dispatch, gpu, triton_linear
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import pack, unpack
from tests.gpu.weights import random_weight

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def stand_ins(cuda_operators: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU on which the GPU backends may be asked for. Triton's products are made by torch; their calls are listed."""
    calls: list[str] = []

    def dense(values: Tensor, metadata: Tensor) -> Tensor:
        calls.append("unpack")
        return unpack(Packed24(values.float(), metadata)).to(values.dtype)

    def linear24(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        weight = unpack(Packed24(values.float(), metadata)).double()
        calls.append(f"triton {values.dtype.itemsize * 8} bits")
        weight = weight if scale is None else weight * scale[:, None]
        return F.linear(x.double(), weight, None if bias is None else bias.double()).to(x.dtype)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_linear, "installed", lambda: True)
    monkeypatch.setattr(triton_linear, "unpack24", dense)
    monkeypatch.setattr(triton_linear, "linear24", linear24)
    dispatch.gpu_backend.cache_clear()
    return calls


PLANS = ["triton", "unpack", "cutlass", "cusparselt", "triton<=4,unpack", "triton<=4,cutlass", "triton<=1,cusparselt"]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_the_way_back(plan: str, with_bias: bool) -> None:
    packed = pack(random_weight(64, 128, BF16))
    bias = torch.randn(64).to(BF16) if with_bias else None
    layer = Linear24.from_packed(packed, bias, plan)
    assert layer.backend == plan
    assert f"backend={plan}" in repr(layer)
    assert not [name for name in layer.state_dict() if name not in ("weight", "weight_meta", "bias")]
    for shape in ((1, 128), (3, 2, 128), (0, 128), (40, 128)):
        x = torch.randn(shape).to(BF16)
        want = F.linear(x.double(), random_weight(64, 128, BF16).double(), None if bias is None else bias.double())
        y = layer(x)
        assert (y.dtype, y.shape) == (BF16, want.shape)
        assert torch.allclose(y.double(), want, rtol=1e-2, atol=1e-2)
    state = layer.state_dict()
    for again in (layer.packed, copy.deepcopy(layer).packed, layer.use_backend("reference").packed):
        assert torch.equal(again.values, packed.values)
        assert torch.equal(again.metadata, packed.metadata)
    other = Linear24.from_packed(pack(random_weight(64, 128, BF16, seed=9)), bias, plan)
    other.load_state_dict(state)
    assert other.backend == plan
    assert torch.equal(other.packed.values, packed.values)


@pytest.mark.parametrize(("tokens", "backend"), [(1, "triton 16 bits"), (4, "triton 16 bits"), (5, "unpack")])
def test_the_number_of_tokens_decides(tokens: int, backend: str, stand_ins: list[str]) -> None:
    layer = Linear24.from_packed(pack(random_weight(64, 128, BF16)), None, "triton<=4,unpack")
    layer(torch.randn(1, tokens, 128).to(BF16))
    assert stand_ins == [backend]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("backend", sorted(set(gpu.BACKENDS) - set(gpu.EXACT)))
def test_eight_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the exact product, and the exact weight is gone: that is said instead of giving another one."""
    monkeypatch.setattr(gpu, "CAPABILITY", dict.fromkeys(gpu.CAPABILITY, (8, 0)))
    weight, bias = random_weight(64, 128, BF16), torch.randn(64).to(BF16)
    layer = Linear24.from_packed(pack(weight), bias, backend)
    x = torch.randn(5, 128).to(BF16)
    want = F.linear(x.double(), weight.double(), bias.double())
    error = float((layer(x).double() - want).norm() / want.norm())
    assert 1e-4 < error < (0.05 if backend.endswith("fp8") else 0.015)
    with pytest.raises(SettingsError, match="8-bit values only"):
        layer.state_dict()
    with pytest.raises(SettingsError, match="8-bit values only"):
        layer.use_backend("reference")
    assert torch.equal(layer(x), layer(x))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_reach_inputs(plan: str) -> None:
    weight = random_weight(64, 128, BF16)
    layer = Linear24.from_packed(pack(weight), None, plan)
    x = torch.randn(3, 128).to(BF16).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), weight.double().sum(0).expand(3, -1), rtol=1e-2, atol=5e-2)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("plan", ["triton", "triton<=4,cutlass"])
def test_shards_along_k_and_n_add_up(plan: str) -> None:
    """Tensor parallelism: rows anywhere, columns at multiples of 8, of values and metadata alike."""
    weight = random_weight(128, 256, BF16)
    values, metadata = pack(weight).values, pack(weight).metadata
    x = torch.randn(3, 256).to(BF16)
    want = x.double() @ weight.double().T

    def shard(rows: slice, first: int, last: int) -> Linear24:
        part = Packed24(
            values[rows, first // 2 : last // 2].contiguous(), metadata[rows, first // 8 : last // 8].contiguous()
        )
        return Linear24.from_packed(part, None, plan)

    along_k = [shard(slice(None), first, last)(x[:, first:last]).double() for first, last in ((0, 64), (64, 256))]
    rounded = sum(part.abs() for part in along_k) * 2.0**-8  # each to bfloat16
    assert ((along_k[0] + along_k[1] - want).abs() <= rounded).all()
    along_n = [shard(rows, 0, 256)(x) for rows in (slice(0, 32), slice(32, 128))]
    assert torch.allclose(torch.cat(along_n, 1).double(), want, rtol=1e-2, atol=5e-2)


def test_traced_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors: one graph for all numbers of tokens, right shapes and strides, nothing read by the host."""
    monkeypatch.setattr(triton_linear, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = Linear24(4096, 1024, bias=True, dtype=BF16, device="cuda").use_backend()
        assert layer.backend.startswith("triton<=")
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph.forward

        step = torch.compile(lambda x: F.relu(layer(x)) + 1, backend=keep, fullgraph=True, dynamic=True)
        for tokens in (1, 3, 200):
            y = step(torch.empty(2, tokens, 4096, dtype=BF16, device="cuda"))
            assert (y.device.type, y.dtype, y.shape) == ("cuda", BF16, (2, tokens, 1024))
            assert y.is_contiguous()
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(torch.ops.swiftprune.linear24) + targets.count(torch.ops.swiftprune.linear24.default) == len(
        graphs
    )
    assert len(graphs) <= 2  # tokens of 1 are a graph of their own
