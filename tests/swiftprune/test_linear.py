"""Linear24 and its kernels against products in float64, on every backend that runs here."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from swiftprune.errors import FormatError, SettingsError
from swiftprune.formats.spec import Packed24, validate
from swiftprune.kernels import dispatch, native, reference
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import pack, prune_and_pack, unpack
from swiftprune.kernels.score_factors import ScoreFactors
from swiftprune.module import prune_module

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FAST = [(isa, dtype) for dtype in DTYPES for isa in native.linear_isas(dtype)]
ANY = [(backend, dtype) for dtype in DTYPES for backend in dispatch.linear_backends(dtype)]
IDS = [f"{backend}-{dtype}".replace("torch.", "") for backend, dtype in ANY]
FAST_IDS = [f"{backend}-{dtype}".replace("torch.", "") for backend, dtype in FAST]
# Relative Frobenius error over float64: of sums in float32, and once they are rounded to the dtype.
SUM_ERROR = 1e-5
ROUNDED_ERROR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: SUM_ERROR}


def random_packed(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Packed24:
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    return prune_and_pack(weight, ScoreFactors(torch.rand(cols, generator=generator)))


def product(x: Tensor, packed: Packed24, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), unpack(packed).double(), None if bias is None else bias.double())


def relative_error(got: Tensor, want: Tensor, x: Tensor | None = None, packed: Packed24 | None = None) -> float:
    """Frobenius norm of the error over that of the product, or over what that is where few products do not cancel."""
    assert got.shape == want.shape
    norm = want.norm()
    if x is not None and packed is not None:
        norm = norm.maximum((x.double().square() @ unpack(packed).double().square().T).sum().sqrt())
    return float((got.double() - want).norm() / norm)


def strided(x: Tensor, form: str) -> Tensor:
    """The values of x (M, K) in memory that is not contiguous, or with more dimensions."""
    if form == "every second column":
        return torch.stack([x, -x], dim=2).flatten(1)[:, ::2]
    if form == "part of wider rows":
        return torch.cat([x, x[:, :3]], dim=1)[:, : x.shape[1]]
    if form == "transposed":
        return x.T.contiguous().T
    return {"plain": x, "leading": x[None, :, None]}[form]


@pytest.mark.parametrize(("backend", "dtype"), ANY, ids=IDS)
@settings(max_examples=60)
@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([64, 200])),
    groups=st.one_of(st.integers(1, 40), st.sampled_from([128, 193, 500])),
    tokens=st.one_of(st.integers(1, 20), st.sampled_from([33, 128, 131])),
    form=st.sampled_from(["plain", "leading", "every second column", "part of wider rows", "transposed"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_equal_those_in_float64(
    backend: str, dtype: torch.dtype, rows: int, groups: int, tokens: int, form: str, with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = random_packed(rows, 4 * groups, dtype, generator)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    x = strided(torch.randn(tokens, 4 * groups, generator=generator).to(dtype), form)
    layer = Linear24.from_packed(packed, bias, backend)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (*x.shape[:-1], rows))
    assert relative_error(y, product(x, packed, bias), x, packed) < ROUNDED_ERROR[dtype]


@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=FAST_IDS)
@settings(max_examples=40)
@given(tokens=st.integers(1, 40), groups=st.integers(1, 900), seed=st.integers(0, 2**32 - 1))
def test_sums_are_kept_in_float32(backend: str, dtype: torch.dtype, tokens: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = random_packed(24, 4 * groups, dtype, generator)
    x = torch.randn(tokens, 4 * groups, generator=generator).to(dtype)
    tiled = native.to_tiled(packed.values, packed.metadata)
    assert tiled is not None
    sums = native.linear24(backend, x, tiled, None, 24, out_dtype=torch.float32)
    assert sums.dtype == torch.float32
    assert relative_error(sums, product(x, packed, None), x, packed) < SUM_ERROR
    if dtype != torch.float32:  # the output is those sums, rounded once, to nearest and ties to even, as torch does
        assert torch.equal(native.linear24(backend, x, tiled, None, 24), sums.to(dtype))


@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=FAST_IDS)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_which_values_meet_which_inputs(backend: str, dtype: torch.dtype, tokens: int) -> None:
    """Small whole numbers: every product and sum is exact, so every bit must be right, and every element written."""
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randint(-4, 5, (19, 332), generator=generator).to(dtype)
    packed = prune_and_pack(weight, ScoreFactors.of_magnitude(332))
    x = torch.randint(-2, 3, (tokens, 332), generator=generator).to(dtype)
    want = product(x, packed, None).float()
    tiled = native.to_tiled(packed.values, packed.metadata)
    assert tiled is not None
    poison = torch.full((10, tokens, 19), float("nan"))  # freed at once: the next allocations get this memory
    del poison
    for _ in range(5):
        assert torch.equal(native.linear24(backend, x, tiled, None, 19, out_dtype=torch.float32), want)


@pytest.mark.parametrize(("backend", "dtype"), ANY, ids=IDS)
@pytest.mark.parametrize("scale", [1e-40, 1e-6, 1e15, 1e30])
def test_extreme_magnitudes(backend: str, dtype: torch.dtype, scale: float) -> None:
    """Sums that float32 holds come out right and others as infinities; subnormal inputs may count as zero."""
    generator = torch.Generator().manual_seed(1)
    packed = random_packed(16, 256, dtype, generator)
    x = (torch.randn(2, 256, generator=generator, dtype=torch.float64) * scale).to(dtype)
    y = Linear24.from_packed(packed, None, backend)(x)
    want = product(x, packed, None)
    if scale == 1e-40:  # subnormal in bf16 and fp32, zero in fp16; vdpbf16ps takes subnormals for zeros
        assert ((y.double() - want).abs() <= want.abs().max() * 1.01).all()
    elif not torch.isfinite(x).all():  # fp16
        assert not torch.isfinite(y).any()
    else:
        smallest_step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((y.double() - want).abs() <= want.abs().max() * ROUNDED_ERROR[dtype] + smallest_step).all()


@pytest.mark.parametrize(("backend", "dtype"), ANY, ids=IDS)
def test_negative_zeros_nan_and_infinity(backend: str, dtype: torch.dtype) -> None:
    """A NaN or infinity reaches the outputs whose weights keep that input, and no others."""
    values = torch.tensor([[1.0, -0.0], [2.0, 3.0]], dtype=dtype)
    layer = Linear24.from_packed(Packed24(values, torch.tensor([[0b0100], [0b1110]], dtype=torch.uint8)), None, backend)
    assert layer(torch.full((1, 4), -0.0, dtype=dtype)).tolist() == [[0, 0]]
    only_first = layer(torch.tensor([[float("nan"), 1, 1, 1]], dtype=dtype))
    assert only_first[0, 0].isnan()
    if backend != dispatch.REFERENCE:  # which multiplies every input, by zeros too
        assert only_first[0, 1] == 5
    assert layer(torch.tensor([[0, 0, float("inf"), 0]], dtype=dtype))[0, 1] == float("inf")


@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=FAST_IDS)
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_results_depend_on_neither_the_run_nor_the_threads(backend: str, dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear24.from_packed(random_packed(300, 1024, dtype, generator), None, backend)
    x = torch.randn(tokens, 1024, generator=generator).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("backend", "dtype"), ANY, ids=IDS)
def test_empty_batches_and_single_vectors(backend: str, dtype: torch.dtype) -> None:
    layer = Linear24.from_packed(random_packed(5, 12, dtype, torch.Generator()), None, backend)
    assert layer(torch.empty(0, 12, dtype=dtype)).shape == (0, 5)
    assert layer(torch.empty(3, 0, 12, dtype=dtype)).shape == (3, 0, 5)
    assert layer(torch.ones(12, dtype=dtype)).shape == (5,)


@pytest.mark.parametrize(("backend", "dtype"), ANY, ids=IDS)
def test_wrong_inputs_are_refused(backend: str, dtype: torch.dtype) -> None:
    layer = Linear24.from_packed(random_packed(5, 12, dtype, torch.Generator()), None, backend)
    with pytest.raises(ValueError, match=r"\(\.\.\., 12\).*\(3, 16\)"):
        layer(torch.ones(3, 16, dtype=dtype))
    with pytest.raises(ValueError, match="float64"):
        layer(torch.ones(3, 12, dtype=torch.float64))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_inputs_may_have_another_type(dtype: torch.dtype, compiled: bool) -> None:
    """As of a dense linear the product comes in autocast's type, whatever the type of x and of the weight."""
    generator = torch.Generator().manual_seed(0)
    packed = random_packed(48, 64, dtype, generator)
    layer = Linear24.from_packed(packed)
    x = torch.randn(5, 64, generator=generator)
    run = torch.compile(layer) if compiled else layer
    for inputs in (x, x.bfloat16()):
        with pytest.raises(ValueError, match="expected x") if inputs.dtype != dtype else nullcontext():
            layer(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, dense = run(inputs), F.linear(inputs, unpack(packed))
        if inputs.dtype != dtype:
            assert got.dtype == dense.dtype == torch.bfloat16
        assert relative_error(got, product(inputs, packed, None)) < 1e-2


def test_kernels_refuse_what_does_not_fit() -> None:
    packed = random_packed(5, 12, torch.float32, torch.Generator())
    tiled = native.to_tiled(packed.values, packed.metadata)
    assert tiled is not None
    with pytest.raises(ValueError, match="does not fit a tiled weight"):
        native.linear24("generic", torch.ones(1, 128), tiled, None, 5)
    if "avx512_bf16" in native.linear_isas(torch.bfloat16):
        with pytest.raises(ValueError, match=r"avx512_bf16.*float32.*generic"):
            native.linear24("avx512_bf16", torch.ones(1, 12), tiled, None, 5)


def test_the_tiled_layout_in_bits() -> None:
    """A hand-worked chunk (csrc/tiled.h): rows 2 and 3 are pair 1; group 9 is group 1 of the second half."""
    values, metadata = torch.zeros(4, 32, dtype=torch.bfloat16), torch.full((4, 8), 0x44, dtype=torch.uint8)
    values[2, 18], values[2, 19], values[3, 18] = 1.0, -2.0, 3.0  # 0x3F80, 0xC000, 0x4040
    metadata[2, 4] = 0b1101_0100  # group 9: positions 1 and 3
    metadata[3, 4] = 0b1110_0100  # group 9: positions 2 and 3
    tiled = native.to_tiled(values, metadata)
    assert tiled is not None
    assert tiled.numel() == 576
    words = tiled[:64].view(torch.int16).view(2, 4, 4)
    second = 0b01_01_01_01_01_01_01_01  # position 1 for all eight groups
    assert words[0].tolist() == [[0, second] * 2] * 2 + [[0, 0] * 2] * 2  # rows 4..7 do not exist
    changed = second & ~0b1100 | 0b1100
    assert words[1, 1].tolist() == [0b01_00, changed, 0b10_00, changed]
    lanes = tiled[64:].view(torch.int16).view(2, 4, 8, 4)
    assert lanes[1, 1, 1].tolist() == [0x3F80, 0xC000 - 2**16, 0x4040, 0]
    assert lanes.count_nonzero() == 3


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 40), groups=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_the_tiled_layout_gives_the_pair_back(dtype: torch.dtype, rows: int, groups: int, seed: int) -> None:
    packed = random_packed(rows, 4 * groups, dtype, torch.Generator().manual_seed(seed))
    layer = Linear24.from_packed(packed)
    assert layer.backend != dispatch.REFERENCE
    for got in (layer.packed, layer.use_backend("reference").packed, layer.use_backend("generic").packed):
        assert torch.equal(got.values, packed.values)
        assert torch.equal(got.metadata, packed.metadata)


@pytest.mark.parametrize("backend", ["generic", "reference"])
def test_layers_save_load_copy_and_convert(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    packed, bias = random_packed(10, 68, torch.float32, generator), torch.randn(10, generator=generator)
    layer = Linear24.from_packed(packed, bias, backend)
    state = layer.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "weight": (10, 34),
        "weight_meta": (10, 9),
        "bias": (10,),
    }
    other = Linear24.from_packed(random_packed(10, 68, torch.float32, generator), torch.zeros(10), backend)
    other.load_state_dict(state)
    x = torch.randn(3, 68, generator=generator)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.dtype == half.packed.values.dtype == torch.bfloat16
    assert torch.equal(half.packed.values, packed.values.bfloat16())
    assert relative_error(half(x.bfloat16()), layer(x).double()) < 2e-2
    assert backend in repr(layer)


@pytest.mark.parametrize(("backend", "dtype"), ANY, ids=IDS)
def test_compiled_layers_give_the_same(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = Linear24.from_packed(random_packed(12, 64, dtype, generator), torch.ones(12, dtype=dtype), backend)
    model = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(2, 3, 64, generator=generator).to(dtype)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_the_operators_follow_the_rules_of_torch() -> None:
    packed = random_packed(12, 64, torch.float32, torch.Generator().manual_seed(4))
    tiled = native.to_tiled(packed.values, packed.metadata)
    assert tiled is not None
    x = torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.swiftprune.unpack24, ([tiled], torch.float32, 12, 64, "generic"))
    torch.library.opcheck(torch.ops.swiftprune.linear24, (x, [tiled], torch.ones(12), 12, "generic"))


@pytest.mark.parametrize(("backend", "dtype"), ANY, ids=IDS)
def test_gradients_reach_the_inputs(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    packed = random_packed(12, 64, dtype, generator)
    x = torch.randn(3, 64, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(3, 12, generator=generator).to(dtype)
    Linear24.from_packed(packed, None, backend)(x).backward(gradient)
    assert x.grad is not None
    assert relative_error(x.grad, gradient.double() @ unpack(packed).double()) < 4e-3


def test_backends_are_chosen_by_name_and_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear24.from_packed(random_packed(4, 8, torch.float32, torch.Generator()))
    assert layer.backend == dispatch.linear_backends(torch.float32)[0]
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "generic")
    assert layer.use_backend().backend == "generic"
    assert layer.use_backend("reference").backend == "reference"
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "sse9")
    said = r"unknown backend 'sse9' \(asked for by SWIFTPRUNE_BACKEND\); known: avx512_bf16.*reference"
    with pytest.raises(SettingsError, match=said):
        layer.use_backend()
    monkeypatch.setenv("SWIFTPRUNE_BACKEND", "avx512_bf16")
    with pytest.raises(SettingsError, match=r"'avx512_bf16' cannot run torch.float32 .*SWIFTPRUNE_BACKEND"):
        layer.use_backend()


WITHOUT_KERNELS = """
import sys
sys.modules["swiftprune.kernels._native"] = None  # what an installation without a compiler looks like
import torch
from swiftprune.kernels.packing import prune_and_pack
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.score_factors import ScoreFactors
packed = prune_and_pack(torch.randn(8, 16), ScoreFactors.of_magnitude(16))
layers = [Linear24.from_packed(packed) for _ in range(3)]
print(layers[0].backend, layers[0](torch.ones(2, 16)).shape)
Linear24.from_packed(packed, backend="avx2")
"""


def test_without_native_kernels_the_reference_runs_and_says_so_once() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], capture_output=True, text=True, check=False)
    assert run.stdout == "reference torch.Size([2, 8])\n", run.stderr
    assert run.stderr.count("without its native kernels") == 1
    assert "SettingsError: unknown backend 'avx2'; known: reference, " in run.stderr
    assert "(this installation has no native kernels)" in run.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_without_checks_is_unpacking(dtype: torch.dtype) -> None:
    """What `reference` runs on a GPU, run here."""
    packed = random_packed(5, 132, dtype, torch.Generator().manual_seed(0))
    positions = reference.stored_positions(packed.values, packed.metadata)
    assert torch.equal(reference.scatter(packed.values, positions), unpack(packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_does_not_fit_is_refused_before_it_reaches_the_kernels(dtype: torch.dtype) -> None:
    layer = Linear24.from_packed(pack(torch.zeros(256, 256, dtype=dtype)))
    tiled = layer.get_buffer("tiled")
    x = torch.zeros(2, 256, dtype=dtype)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for bad, why in (
        (lambda: layer(x.to("meta")), "x is on meta"),
        (lambda: layer.multiply(x, torch.zeros(256, dtype=other)), "bias is"),
        (lambda: layer.multiply(x, torch.zeros(255, dtype=dtype)), "bias is"),
        (lambda: layer.multiply(x, torch.zeros(256, 1, dtype=dtype)), "bias is"),
        (lambda: layer.multiply(x, torch.zeros(256, dtype=dtype, device="meta")), "bias is"),
        (lambda: native.linear24(layer.backend, x, tiled[:-1], None, 256), "does not fit a tiled weight"),
        (lambda: native.linear24(layer.backend, x, tiled.to("meta"), None, 256), "a tiled weight is"),
        (lambda: native.linear24(layer.backend, x, tiled, None, 256, torch.float64), "output can be"),
        (lambda: native.from_tiled(tiled, dtype, 256, 128), "does not fit a tiled weight"),
        (lambda: native.to_tiled(torch.zeros(4, 8, dtype=dtype), torch.zeros(4, 3, dtype=torch.uint8)), "belong"),
        (lambda: native.to_tiled(torch.zeros(4, 8, dtype=dtype), torch.zeros(4, 2)), "belong"),
    ):
        with pytest.raises(ValueError, match=why):
            bad()
    spaced = torch.randn(256, 2).to(dtype)[:, 0]
    assert torch.equal(layer.multiply(x, spaced), spaced.expand(2, 256))


def test_tensors_without_numbers_are_refused() -> None:
    for call in (
        lambda: pack(torch.zeros(8, 8, device="meta")),
        lambda: unpack(Packed24(torch.zeros(8, 4, device="meta"), torch.zeros(8, 1, dtype=torch.uint8))),
        lambda: prune_module(torch.nn.Linear(8, 8, device="meta")),
    ):
        with pytest.raises(FormatError, match=r"meta device|different devices"):
            call()


@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    spoil=st.sampled_from(["nothing", "nibble", "padding", "inf", "nan"]),
)
def test_what_is_laid_out_is_checked_as_the_specification_says(
    rows: int, groups: int, dtype: torch.dtype, seed: int, spoil: str
) -> None:
    """Every pair that breaks the format anywhere is refused, and no other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 4 * groups, generator=generator).to(dtype)
    packed = prune_and_pack(weight, ScoreFactors.of_magnitude(4 * groups))
    values, metadata = packed.values.clone(), packed.metadata.clone()
    row, group = int(torch.randint(rows, (), generator=generator)), int(torch.randint(groups, (), generator=generator))
    if spoil == "nibble":
        bad = [0x0, 0x1, 0x2, 0x3, 0x5, 0x6, 0x7, 0xA, 0xB, 0xF][seed % 10]
        shift = group % 2 * 4
        metadata[row, group // 2] = int(metadata[row, group // 2]) & (0xF0 >> shift) | bad << shift
    elif spoil == "padding" and groups % 2:
        metadata[row, -1] |= 0x40
    elif spoil in ("inf", "nan"):
        values[row, 2 * group + seed % 2] = float("-inf") if spoil == "inf" else float("nan")
    try:
        validate(Packed24(values, metadata))
    except FormatError:
        assert native.to_tiled(values, metadata) is None
        with pytest.raises(FormatError, match=r"^w: "):
            Linear24.from_packed(Packed24(values, metadata), name="w")
    else:
        assert spoil == "nothing" or (spoil == "padding" and groups % 2 == 0)
        tiled = native.to_tiled(values, metadata)
        assert tiled is not None
        back = native.from_tiled(tiled, dtype, rows, 4 * groups)
        assert torch.equal(back[0], values)
        assert torch.equal(back[1], metadata)


def test_a_bias_is_trained_too() -> None:
    packed = random_packed(12, 64, torch.float32, torch.Generator().manual_seed(1))
    layer = Linear24.from_packed(packed, torch.zeros(12))
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 64)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, 2 * layer(x).detach().flatten(0, 1).sum(0))


def test_tracers_record_the_operator() -> None:
    """And so what they give follows its inputs; where they cannot, they say so."""
    packed = random_packed(12, 64, torch.float32, torch.Generator().manual_seed(1))
    layer = Linear24.from_packed(packed)
    x, other = torch.randn(3, 64), torch.randn(5, 64)
    for traced in (make_fx(layer)(x), torch.jit.trace(layer, x)):  # type: ignore[no-untyped-call]
        assert torch.equal(traced(other), layer(other))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))  # type: ignore[no-untyped-call]


def test_tensors_without_numbers_and_with_a_hidden_sign() -> None:
    weight = unpack(random_packed(8, 16, torch.float32, torch.Generator().manual_seed(1)))
    layer = Linear24.from_packed(pack(weight))
    x = torch.randn(3, 16)
    assert torch.equal(unpack(pack(torch._neg_view(weight))), -weight)
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(8, 16)
        with pytest.raises(FormatError, match="FakeTensor"):
            pack(fake)
        assert layer(torch.empty(3, 16)).shape == (3, 8)
    with pytest.raises(FormatError, match="TwoTensor"):
        pack(TwoTensor(weight, weight))  # type: ignore[no-untyped-call]


def test_a_change_of_type_that_cannot_be_changes_nothing() -> None:
    weight = unpack(random_packed(8, 16, torch.float32, torch.Generator().manual_seed(1)))
    weight[0, 0:4] = torch.tensor([1e6, 0, 1, 0])
    layer = Linear24.from_packed(pack(weight), torch.randn(8))
    x = torch.randn(3, 16)
    y, backend = layer(x), layer.backend
    for change, error in ((torch.double, SettingsError), (torch.complex64, SettingsError), (torch.half, FormatError)):
        with pytest.raises(error):
            layer.to(change)
        assert (layer.dtype, layer.backend) == (torch.float32, backend)
        assert torch.equal(layer(x), y)


def test_another_type_can_be_assigned() -> None:
    packed = random_packed(8, 64, torch.bfloat16, torch.Generator().manual_seed(1))
    layer = Linear24.from_packed(packed)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in layer.state_dict().items()
    }
    layer.load_state_dict(state, assign=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ unpack(packed).float().T)
