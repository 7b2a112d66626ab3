"""2:4 weights with 8- and 4-bit values: the format in bits, kernels against integers, layers, and rounding."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import swiftprune
from swiftprune.errors import FormatError, SettingsError
from swiftprune.formats.spec import CODEBOOK, QUANTIZED, Packed24, Quantized, WeightSpec, check_declared, validate
from swiftprune.kernels import dispatch, native, quantize
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import keep_mask, pack, prune_and_pack, unpack
from swiftprune.kernels.score_factors import ScoreFactors
from swiftprune.methods.rounding import round_kept
from tests.quantized import random_packed

KERNELS = [(isa, quantized) for isa in native.QUANT_ISAS for quantized in QUANTIZED]
BACKENDS = [*KERNELS, *(("reference", quantized) for quantized in QUANTIZED)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def slow_integers(packed: Packed24) -> Tensor:
    """(N, K) int64: what the specification says that the stored values are, one by one."""
    rows, cols = packed.shape
    out = torch.zeros(rows, cols, dtype=torch.int64)
    for row in range(rows):
        for group in range(cols // 4):
            nibble = int(packed.metadata[row, group // 2]) >> group % 2 * 4 & 15
            for which, position in enumerate((nibble & 3, nibble >> 2)):
                if packed.quantized == "int8":
                    value = int(packed.values[row, 2 * group + which])
                else:
                    value = CODEBOOK[int(packed.values[row, group]) >> 4 * which & 15]
                out[row, 4 * group + position] = value
    return out


def slow_scales(packed: Packed24) -> Tensor:
    """(N, K) float64: the scale of each input."""
    assert packed.scales is not None
    cols = packed.shape[1]
    each = cols if packed.quantized == "int8" else 128
    return torch.stack([packed.scales[:, k // each].double() for k in range(cols)], dim=1)


def slow_product(x: Tensor, packed: Packed24) -> Tensor:
    """x W^T in float64, x rounded to 8 bits for each token and 128 inputs by their largest."""
    integers, scales = slow_integers(packed).double(), slow_scales(packed)
    y = torch.zeros(x.shape[0], packed.shape[0], dtype=torch.float64)
    for start in range(0, x.shape[1], 128):
        part = x[:, start : start + 128].float()
        largest = part.abs().amax(1, keepdim=True)
        steps = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0)
        rounded = (part * steps).round().double() * (largest / 127).double()
        y += rounded @ (integers * scales)[:, start : start + 128].T
    return y


def test_the_worked_examples_in_bits() -> None:
    """One row of K = 8 as in the specification of version 1, by integers."""
    metadata = torch.tensor([[0x8D]], dtype=torch.uint8)
    scale = torch.tensor([[0.5]], dtype=torch.bfloat16)
    eight = Packed24(torch.tensor([[1, -2, 4, 0]], dtype=torch.int8), metadata, scale)
    assert torch.equal(unpack(eight), torch.tensor([[0, 0.5, 0, -1.0, 2.0, 0, 0, 0]]))
    # Codes 15 and 0 are the ends of the codebook, 7 is zero: the first value of a group stands in the low bits.
    four = Packed24(torch.tensor([[0x0F, 0x79]], dtype=torch.uint8), metadata, scale)
    assert torch.equal(unpack(four), torch.tensor([[0, 63.5, 0, -63.5, 10.0, 0, 0, 0]]))
    assert torch.equal(keep_mask(four), torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0]], dtype=torch.bool))
    nf4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0, 0.0795803, 0.1609302,
           0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]  # fmt: skip
    assert list(CODEBOOK) == [round(127 * level) for level in nf4]


@settings(max_examples=60)
@given(
    rows=st.integers(1, 20), groups=st.integers(1, 70), quantized=st.sampled_from(QUANTIZED), seed=st.integers(0, 99)
)
def test_unpacking_is_what_the_specification_says(rows: int, groups: int, quantized: Quantized, seed: int) -> None:
    packed = random_packed(rows, groups, quantized, seed)
    validate(packed)
    assert packed.spec == WeightSpec((rows, 4 * groups), torch.float32, quantized)
    assert packed.spec.nbytes == sum(tensor.nbytes for tensor in packed.tensors)
    assert torch.equal(unpack(packed).double(), slow_integers(packed) * slow_scales(packed))


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_bits_a_weight(quantized: Quantized) -> None:
    spec = WeightSpec((4096, 4096), torch.bfloat16, quantized)
    bits = 8 * spec.nbytes / 4096**2
    assert bits == pytest.approx({"int8": 5, "int4": 3.125}[quantized], abs=0.01)
    assert spec.compression == pytest.approx(16 / bits)


def hostile(packed: Packed24, **changes: Tensor) -> Packed24:
    return dataclasses.replace(packed, **changes)


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_hostile_tensors_are_refused(quantized: Quantized) -> None:
    packed = random_packed(5, 33, quantized)
    assert packed.scales is not None
    bad_nibble, used_half = packed.metadata.clone(), packed.metadata.clone()
    bad_nibble[3, 2] = 0x44 | 0x0F
    used_half[1, -1] |= 0x40
    infinite = packed.scales.clone()
    infinite[4, -1] = torch.inf
    cases = [
        (hostile(packed, metadata=bad_nibble), r"layer: metadata of row 3, group 4 is 0xf"),
        (hostile(packed, metadata=used_half), "row 1 is not 0"),
        (hostile(packed, scales=infinite), r"scale \(4, \d\) is inf"),
        (hostile(packed, scales=packed.scales.float()), "scales must be"),
        (hostile(packed, scales=packed.scales[:4]), "scales must be"),
        (hostile(packed, metadata=packed.metadata[:, :3]), "metadata must be"),
        (hostile(packed, metadata=packed.metadata.to(torch.int8)), "metadata must be"),
        (hostile(packed, values=packed.values.float()), "quantized values must be"),
        (hostile(packed, values=packed.values[:0]), "quantized values must be"),
    ]
    if quantized == "int8":
        lowest = packed.values.clone()
        lowest[2, 5] = -128
        cases.append((hostile(packed, values=lowest), r"value \(2, 5\) is -128"))
    for case, why in cases:
        for backend in (None, "reference"):
            with pytest.raises(FormatError, match=why):
                Linear24.from_packed(case, None, backend, "layer")


def test_what_config_json_may_declare() -> None:
    check_declared("2:4", 2, "transformers", (1, 2), "int4")
    for version, values, why in (
        (2, None, "version 2 of the packed format with values None"), (1, "int4", "version 1 .* with values 'int4'"),
        (2, "int3", "'int3'"), (3, "int4", "version 3"), ("1", None, "version '1'"), (True, None, "version True"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=why):
            check_declared("2:4", version, "transformers", (1, 2), values)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"version 2 .* vLLM reads 1 here"):
        check_declared("2:4", 2, "vLLM", values="int8")


@pytest.mark.parametrize(("isa", "quantized"), KERNELS)
@settings(max_examples=12)
@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([64, 200])),
    groups=st.one_of(st.integers(1, 40), st.sampled_from([128, 193, 530])),
    tokens=st.one_of(st.integers(1, 20), st.sampled_from([33, 70])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_with_rounded_inputs(
    isa: str, quantized: Quantized, rows: int, groups: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    packed = random_packed(rows, groups, quantized, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 4 * groups, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if seed % 2 else None
    layer = Linear24.from_packed(packed, bias, isa, dtype=dtype)
    assert layer.backend == f"{isa}-{quantized}"
    y = layer(x)
    assert y.dtype == dtype
    want = slow_product(x, packed) + (0 if bias is None else bias.double())
    bound = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}[dtype]
    size = slow_product(x.abs().float(), Packed24(packed.values, packed.metadata, packed.scales)).abs().max() + 1
    assert float((y.double() - want).abs().max()) < bound * float(want.abs().max().maximum(size * 0.05) + 1e-3)


@pytest.mark.parametrize(("isa", "quantized"), KERNELS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 17, 40])
@pytest.mark.parametrize("cols", [332, 8192])
def test_sums_are_exact_integers(isa: str, quantized: Quantized, tokens: int, cols: int) -> None:
    """Inputs of -127 .. 127 round to themselves and scales of 1 change nothing, so every bit must be right."""
    packed = random_packed(19, cols // 4, quantized, tokens)
    assert packed.scales is not None
    packed = hostile(packed, scales=torch.ones_like(packed.scales))
    x = torch.randint(-127, 128, (tokens, cols)).float()
    x[:, ::128] = 127  # the largest of each 128
    layer = Linear24.from_packed(packed, None, isa)
    exact = x.double() @ slow_integers(packed).double().T
    poison = torch.full((10, tokens, 19), float("nan"))  # freed at once: the next allocations get this memory
    del poison
    first = layer(x)
    if cols < 4096:
        assert torch.equal(first.double(), exact)
    else:  # beyond what float32 holds exactly
        torch.testing.assert_close(first.double(), exact, rtol=1e-6, atol=64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(layer(x), first)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(layer(torch.cat([x, x])[:tokens]), first)


@pytest.mark.parametrize(("isa", "quantized"), KERNELS)
def test_inputs_that_are_not_finite_or_all_zero(isa: str, quantized: Quantized) -> None:
    packed = random_packed(9, 64, quantized)
    layer = Linear24.from_packed(packed, None, isa)
    x = torch.randn(6, 256)
    x[1] = 0
    x[2, 7] = torch.nan
    x[3, 200] = -torch.inf
    x[4] = 1e-44
    x[5] *= 1e30
    y = layer(x)
    assert y[[2, 3]].isnan().all()
    assert y[[0, 5]].isfinite().all()
    assert torch.equal(y[[1, 4]], torch.zeros(2, 9))
    torch.testing.assert_close(y[5].double(), slow_product(x[5:], packed)[0], rtol=1e-4, atol=1e25)
    assert layer(torch.empty(0, 256)).shape == (0, 9)


@pytest.mark.parametrize(("backend", "quantized"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_keeps_its_weight_bit_for_bit(backend: str, quantized: Quantized, dtype: torch.dtype) -> None:
    packed = random_packed(21, 67, quantized)
    layer = Linear24.from_packed(packed, torch.randn(21), backend, dtype=dtype)
    x = torch.randn(3, 2, 268).to(dtype)
    y = layer(x)
    state = layer.state_dict()
    assert set(state) == {"weight", "weight_meta", "weight_scale", "bias"}
    empty = Linear24(268, 21, bias=True, dtype=dtype, quantized=quantized)
    empty.load_state_dict(state)
    others = [
        layer,
        copy.deepcopy(layer),
        empty.use_backend(backend),
        layer.use_backend("reference").use_backend(backend),
    ]
    for other in others:
        assert torch.equal(other(x), y)
        for have, want in zip(other.packed.tensors, packed.tensors, strict=True):
            assert torch.equal(have.view(torch.uint8), want.view(torch.uint8))
    # Another type of inputs: the weight stays what it was, and so does the type of its scales.
    for other_type in DTYPES:
        moved = copy.deepcopy(layer).to(other_type)
        assert moved.dtype == other_type
        assert moved(x.to(other_type)).dtype == other_type
        assert all(map(torch.equal, moved.packed.tensors, packed.tensors))


@pytest.mark.parametrize(("backend", "quantized"), BACKENDS)
def test_gradients_and_compilation(backend: str, quantized: Quantized) -> None:
    packed = random_packed(24, 64, quantized)
    layer = Linear24.from_packed(packed, None, backend)
    x = torch.randn(5, 256, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, unpack(packed).sum(0).expand(5, -1))
    torch.compiler.reset()  # of other layers' code, which is this one's too
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_rounding_to_nearest(quantized: Quantized) -> None:
    """No kept weight is further from what is stored than half a step, and what is stored is what it was rounded to."""
    weight = unpack(prune_and_pack(torch.randn(40, 388), ScoreFactors.of_magnitude(388)))
    weight[3] = 0
    packed = swiftprune.pack(weight, values=quantized)
    validate(packed)
    got = unpack(packed)
    assert not got[3].any()
    assert not got[weight == 0].any()
    error = (got - weight).abs()
    scales = slow_scales(packed).float().abs()
    inside = weight.abs() <= 127 * scales
    widest = 0.5 if quantized == "int8" else max(b - a for a, b in itertools.pairwise(CODEBOOK)) / 2
    assert (error <= widest * scales * 1.001)[inside].all()
    assert float(error.norm() / weight.norm()) < {"int8": 0.01, "int4": 0.09}[quantized]
    assert torch.equal(unpack(pack(got, values=quantized)) if quantized == "int8" else got, got)
    with pytest.raises(FormatError, match="row 0, group 0"):
        pack(torch.ones(4, 8), "three", values=quantized)
    with pytest.raises(FormatError, match="NaN and infinities"):
        pack(torch.full((4, 8), torch.nan), values=quantized)


@pytest.mark.parametrize("quantized", QUANTIZED)
def test_rounding_by_outputs_beats_rounding_to_nearest(quantized: Quantized) -> None:
    """On correlated inputs; and on white ones, where nothing can be made up for, it is rounding to nearest."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 24, generator=generator) @ torch.randn(24, 256, generator=generator)
    inputs += 0.1 * torch.randn(2000, 256, generator=generator)
    weight = unpack(prune_and_pack(torch.randn(48, 256, generator=generator), ScoreFactors.of_magnitude(256)))
    mask = weight != 0
    nearest = unpack(quantize.quantize(weight, mask, quantized))
    packed = round_kept(weight, mask, inputs.T @ inputs, quantized)
    validate(packed)
    assert torch.equal(keep_mask(packed), mask)
    errors = [(inputs @ (got - weight).T).norm() for got in (unpack(packed), nearest)]
    assert errors[0] < 0.7 * errors[1]
    white = round_kept(weight, mask, torch.eye(256) * 2000, quantized)
    assert torch.equal(unpack(white), nearest)


def test_coordinate_descent_against_every_level() -> None:
    """No row's error of outputs rises, and of the last weight none of the sixteen levels is better."""
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(200, 24, generator=generator) @ torch.randn(24, 64, generator=generator)).double()
    gram = inputs.T @ inputs + torch.eye(64).double()
    weight = torch.randn(9, 64, generator=generator, dtype=torch.float64)
    keep = torch.rand(9, 64, generator=generator) < 0.5
    keep[:, -1] = True
    scales = (torch.rand(9, 1, generator=generator) / 60 + 0.01).bfloat16()
    levels = torch.tensor(CODEBOOK).double() * scales.double()  # (9, 16)
    nearest = (weight[..., None] - levels[:, None]).abs().argmin(-1)
    before = torch.where(keep, levels.gather(1, nearest), 0)

    def error(stored: Tensor) -> Tensor:
        lacking = weight - stored
        return ((lacking @ gram) * lacking).sum(1)

    gradient = (weight - before) @ gram
    codes, after = dispatch.kernels().descend_columns(before.float(), gradient.float(), keep, gram.float(), scales)
    torch.testing.assert_close(after.double(), torch.where(keep, levels.gather(1, codes.long()), 0))
    assert (error(after.double()) <= error(before) * (1 + 1e-5)).all()
    assert error(after.double()).sum() < 0.8 * error(before).sum()
    for code in range(16):
        other = after.double()
        other[:, -1] = levels[:, code]
        assert (error(other) >= error(after.double()) * (1 - 1e-5)).all()


def test_what_cannot_be() -> None:
    packed = random_packed(8, 32, "int8")
    with pytest.raises(
        SettingsError, match=r"'avx512_bf16' cannot run int8 values .* available: .*reference-quantized"
    ):
        Linear24.from_packed(packed, None, "avx512_bf16")
    layer = Linear24.from_packed(packed)
    with pytest.raises(ValueError, match="expected x of shape"):
        layer(torch.zeros(2, 124))
    tiled = layer.get_buffer("tiled")
    isa = native.QUANT_ISAS[0]
    x = torch.zeros(2, 128)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: native.quant24(isa, "int8", x, tiled[:-1], None, 8), "does not fit a tiled weight"),
        (lambda: native.quant24(isa, "int4", x, tiled, None, 8), "does not fit a tiled weight"),
        (lambda: native.quant24(isa, "int8", x.to("meta"), tiled, None, 8), "x is"),
        (lambda: native.quant24(isa, "int8", x.double(), tiled, None, 8), "x is"),
        (lambda: native.quant24(isa, "int8", x, tiled, torch.zeros(7), 8), "bias is"),
        (lambda: native.quant24(isa, "int8", x, tiled.to("meta"), None, 8), "a tiled weight is"),
    ]
    for bad, why in cases:
        with pytest.raises(ValueError, match=why):
            bad()
