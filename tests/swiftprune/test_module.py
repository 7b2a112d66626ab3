"""Pruning of modules in memory against loops over single weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from swiftprune import ModuleReport, prune_module
from swiftprune.errors import CheckpointError, FormatError, SettingsError
from swiftprune.module import input_sq_sum

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    tokens = torch.arange(24).view(2, 12)
    return BertModel(config), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    return ViTModel(config), {"pixel_values": images(2, 3, 16, 16)}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck")
    return ResNetModel(config), {"pixel_values": images(2, 3, 32, 32)}


FIRST_CONVOLUTION = {
    vit: "embeddings.patch_embeddings.projection",
    resnet: "embedder.embedder.convolution",
}


def convolutional() -> nn.Sequential:
    """Two convolutions and a linear whose inputs differ from each other in every channel."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, (3, 2), padding=(2, 0), dilation=(2, 1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4 * 3, 6),
    )


def groups_of_four(weight: Tensor) -> Iterator[list[float]]:
    """The four weights of every group: consecutive channels at one output channel and kernel position."""
    positions = itertools.product(*(range(size) for size in weight.shape[2:]))
    for position, n, c in itertools.product(positions, range(weight.shape[0]), range(0, weight.shape[1], 4)):
        yield [float(weight[(n, c + i, *position)]) for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [bert, vit, resnet])
def test_every_layer_of_a_model_is_2_of_4(
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    module, batch = make()
    module.to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    before = copy.deepcopy(module.state_dict())
    steps: list[tuple[str, float, float]] = []
    report = prune_module(module, [batch, batch], progress=lambda *step: steps.append(step))

    assert report.method == "swiftprune"
    matrices = {name: child for name, child in module.named_modules() if isinstance(child, MATRICES)}
    first = FIRST_CONVOLUTION.get(make)
    assert {layer.name for layer in report.layers} == matrices.keys() - {first}
    if first is not None:
        assert report.dense[first] == "in_channels = 3 is not a multiple of 4"
    for layer in report.layers:
        weight, old = matrices[layer.name].weight.detach(), before[f"{layer.name}.weight"]
        for group in groups_of_four(weight):
            assert sum(value != 0 for value in group) == 2
        assert torch.equal(weight, torch.where(weight != 0, old, 0))
        assert weight.dtype == dtype
        assert layer.shape == weight.shape
        assert layer.sparsity == 0.5
        assert layer.kept_energy == pytest.approx(float(weight.double().norm() / old.double().norm()) ** 2, rel=1e-4)
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{layer.name}.weight" for layer in report.layers}
    count = len(report.layers)
    assert steps == [("calibrate", 1, 2), ("calibrate", 2, 2), *(("prune", i + 1, count) for i in range(count))]
    assert ModuleReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (nn.Conv2d(4, 2, 3), (7, 6)),
        (nn.Conv2d(4, 2, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1)), (9, 8)),
        (nn.Conv2d(4, 2, 1, stride=2), (5, 5)),
        (nn.Conv2d(4, 2, (4, 3), padding="same", dilation=(1, 2)), (5, 6)),
        (nn.Conv2d(4, 2, 3, padding="valid"), (5, 6)),
        (nn.Conv2d(4, 2, 3, padding=(2, 1), padding_mode="circular"), (5, 6)),
        (nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect", stride=2), (5, 6)),
        (nn.Conv1d(4, 2, 3, stride=2, padding=3, dilation=2), (11,)),
        (nn.Conv1d(4, 2, 3, padding=1, padding_mode="replicate"), (6,)),
    ],
)
def test_statistics_of_a_convolution_are_those_of_its_gradient(
    convolution: nn.Conv1d | nn.Conv2d, size: tuple[int, ...]
) -> None:
    """One output element's derivative by the weights is the patch it saw; here the squares of all are summed."""
    inputs = images(3, 4, *size)
    probe = copy.deepcopy(convolution).double()
    expected = torch.zeros_like(probe.weight[0])
    for sample in inputs.double():
        for element in probe(sample)[0].flatten():
            (patch,) = torch.autograd.grad(element, probe.weight, retain_graph=True)
            expected += patch[0].square()
    expected = expected.flatten(1).T.flatten()  # (C, *kernel) -> (*kernel x C,)
    torch.testing.assert_close(input_sq_sum(convolution, inputs), expected.float())
    alone = sum(input_sq_sum(convolution, sample) for sample in inputs)
    torch.testing.assert_close(alone, expected.float())


def test_statistics_of_a_linear() -> None:
    inputs = images(2, 3, 5, 8)
    expected = [sum(float(x) ** 2 for x in inputs[..., k].flatten()) for k in range(8)]
    torch.testing.assert_close(input_sq_sum(nn.Linear(8, 4), inputs), torch.tensor(expected))
    large = torch.full((2, 4), 300, dtype=torch.float16)  # its square is more than float16 holds
    assert input_sq_sum(nn.Linear(4, 4), large).tolist() == [180000] * 4


def naive_scores(method: str, weight: Tensor, sq_sum: Tensor) -> Tensor:
    """The published score of every weight (N, C, *kernel), `sq_sum` (C, *kernel), in float64."""
    absolute, norm = weight.double().abs(), sq_sum.sqrt()
    if method == "wanda":
        return absolute * norm
    if method == "ria":
        row = absolute.sum(tuple(range(1, absolute.ndim)), keepdim=True)
        return (absolute / row + absolute / absolute.sum(0)) * norm.sqrt()
    if method == "swiftprune":
        return absolute * norm.sqrt()
    energy = absolute.square()  # swiftprune-data-free
    return energy * (1 - energy / energy.sum(tuple(range(1, energy.ndim)), keepdim=True))


def naive_keep(scores: Tensor) -> Tensor:
    """The two highest scores of every four consecutive channels, found one group at a time."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for n, position in itertools.product(
        range(scores.shape[0]), itertools.product(*(range(size) for size in scores.shape[2:]))
    ):
        for c in range(0, scores.shape[1], 4):
            four = torch.stack([scores[(n, c + i, *position)] for i in range(4)])
            for i in four.argsort(descending=True, stable=True)[:2]:
                keep[(n, c + int(i), *position)] = True
    return keep


def unfolded_sq_sum(layer: Any, inputs: list[Tensor]) -> Tensor:
    """(C, *kernel) of what entered a Conv2d, from all its patches at once; (K,) of a linear."""
    if isinstance(layer, nn.Linear):
        return torch.cat(inputs).double().square().sum(0)
    patches = F.unfold(torch.cat(inputs).double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.square().sum((0, 2)).view(layer.weight.shape[1:])


@pytest.mark.parametrize("method", ["swiftprune", "wanda", "ria", "swiftprune-data-free"])
def test_kept_positions_are_those_of_a_sort_of_every_group(method: str) -> None:
    """The inputs of all layers are those of the dense model, over all batches."""
    module = convolutional()
    dense = copy.deepcopy(module).eval()
    inputs: dict[str, list[Tensor]] = {"0": [], "3": [], "6": []}
    for name, seen in inputs.items():
        dense[int(name)].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
    batches = [images(2, 4, 8, 8), images(3, 4, 8, 8) * 2 + 1]
    with torch.no_grad():
        for batch in batches:
            dense(batch)

    report = prune_module(module, batches, method=method)
    assert report.method == method
    assert [layer.name for layer in report.layers] == list(inputs)
    for name, seen in inputs.items():
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight = layer.weight.detach()
        keep = naive_keep(naive_scores(method, weight, unfolded_sq_sum(layer, seen)))
        assert torch.equal(module.get_parameter(f"{name}.weight"), torch.where(keep, weight, 0)), name


def test_channels_that_are_never_active_are_dropped_first() -> None:
    active = torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 0]).view(8, 1, 1)
    convolution = nn.Conv2d(8, 3, 3, padding=1)
    convolution.weight.data *= torch.where(active == 1, 1, 100)
    by_weight, by_input = nn.Sequential(copy.deepcopy(convolution)), nn.Sequential(copy.deepcopy(convolution))
    prune_module(by_weight, method="magnitude")
    prune_module(by_input, [images(2, 8, 6, 6) * active])
    assert torch.equal(by_weight.get_parameter("0.weight"), convolution.weight * (1 - active))
    assert torch.equal(by_input.get_parameter("0.weight"), convolution.weight * active)


def test_batches_may_be_anything_that_forward_takes() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor, shift: float = 2.0) -> Tensor:
            result: Tensor = self.linear(input=x + shift)
            return result

    module, x = TwoInputs(), images(5, 8)

    def weight(batch: Any, **options: Any) -> Tensor:
        pruned = copy.deepcopy(module)
        prune_module(pruned, iter([batch]), method="wanda", **options)
        return pruned.linear.weight.detach()

    expected = weight(x)
    for batch in ((x,), [x, 2.0], {"x": x, "shift": 2.0}):
        assert torch.equal(weight(batch), expected)
    assert torch.equal(weight("five", forward=lambda module, batch: module(x if batch == "five" else None)), expected)
    assert not torch.equal(weight((x, torch.linspace(-9, 9, 8))), expected)


def test_layers_that_stay_dense_say_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.tied = nn.Linear(8, 10, bias=False)
            self.tied.weight = self.embedding.weight
            self.attention = nn.MultiheadAttention(8, 2)
            self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
            self.grouped = nn.Conv2d(8, 8, 3, groups=2)
            self.straddling = nn.Conv2d(6, 8, 2)  # 24 weights per row are a multiple of four, 6 channels are not
            self.odd = nn.Linear(10, 8)
            self.float64 = nn.Linear(8, 8, dtype=torch.float64)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.computed = nn.utils.spectral_norm(nn.Linear(8, 8))
            self.transposed = nn.ConvTranspose2d(8, 8, 3)
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 4)
            self.expanded = nn.Linear(8, 4)
            self.expanded.weight = nn.Parameter(torch.ones(1, 8).expand(4, 8), requires_grad=False)
            with torch.inference_mode():
                self.inferred = nn.Linear(8, 4)
            self.unused = nn.Linear(8, 4)
            self.used = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.attention(x, x, x)
            result: Tensor = self.head(x) + self.used(x)
            return result

    expected = {
        "embedding": "Embedding is not a Linear, Conv1d or Conv2d",
        "tied": "shares its weight with embedding",
        "attention": "MultiheadAttention is not a Linear, Conv1d or Conv2d",
        "depthwise": "it is a grouped convolution (groups = 8)",
        "grouped": "it is a grouped convolution (groups = 2)",
        "straddling": "in_channels = 6 is not a multiple of 4",
        "odd": "in_features = 10 is not a multiple of 4",
        "float64": "its dtype is torch.float64, not one of torch.bfloat16, torch.float16, torch.float32",
        "normed.parametrizations.weight": "ParametrizationList is not a Linear, Conv1d or Conv2d",
        "computed": "its weight is not a parameter but computed from others",
        "transposed": "ConvTranspose2d is not a Linear, Conv1d or Conv2d",
        "head": "matches ignore ^head",
        "expanded": "its weight is expanded: many of its elements are one in memory",
        "inferred": "its weight was made in torch.inference_mode(), and can be changed there only",
    }
    module = Model()
    before = copy.deepcopy(module.state_dict())
    report = prune_module(module, [images(3, 1, 8)], ignore="^head")
    unreached = dict.fromkeys(("attention.out_proj", "unused"), "no calibration batch went through it")
    assert report.dense == expected | unreached
    assert [layer.name for layer in report.layers] == ["used"]
    changed = [key for key, value in module.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["used.weight"]

    report = prune_module(module, ignore="^head")
    assert report.method == "swiftprune-data-free"
    assert report.dense == expected
    assert [layer.name for layer in report.layers] == ["attention.out_proj", "unused", "used"]


def test_a_module_that_runs_twice_is_pruned_for_both_its_inputs() -> None:
    linear = nn.Linear(8, 8)
    twice, alone = nn.Sequential(linear, nn.ReLU(), linear), nn.Sequential(copy.deepcopy(linear))
    x = images(6, 8)
    with torch.no_grad():
        both = torch.cat((x, linear(x).relu()))
    assert [layer.name for layer in prune_module(twice, [x], method="wanda").layers] == ["0"]
    prune_module(alone, [both], method="wanda")
    assert torch.equal(linear.weight, alone.get_parameter("0.weight"))


def test_a_transformer_encoder_with_padding_is_calibrated() -> None:
    """In eval mode torch would run it without calling its linears, or on nested tensors."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    padding = torch.tensor([[False, False, False], [False, True, True]])
    report = prune_module(encoder, [{"src": images(2, 3, 8), "src_key_padding_mask": padding}])
    assert [layer.name for layer in report.layers] == ["layers.0.linear1", "layers.0.linear2"]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_calibration_leaves_no_trace(fails: bool) -> None:
    module = convolutional().train()
    module.get_submodule("1").eval()
    before = copy.deepcopy(module.state_dict())
    seen: list[tuple[bool, bool]] = []

    def forward(module: nn.Module, batch: Tensor) -> None:
        seen.append((any(child.training for child in module.modules()), torch.is_grad_enabled()))
        module(batch)
        if fails:
            raise RuntimeError("out of images")

    if fails:
        with pytest.raises(RuntimeError, match="out of images"):
            prune_module(module, [images(2, 4, 8, 8)], forward=forward)
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    else:
        prune_module(module, [images(2, 4, 8, 8)], forward=forward)
    assert seen == [(False, False)]
    assert [child.training for child in module.children()] == [True, False, True, True, True, True, True]
    assert module.training
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    assert torch.equal(module.state_dict()["1.running_mean"], before["1.running_mean"])
    assert module.get_parameter("0.weight").requires_grad


def test_data_free_methods_do_not_run_the_batches() -> None:
    report = prune_module(nn.Sequential(nn.Linear(8, 4)), iter(["not an input"]), method="magnitude")
    assert report.method == "magnitude"


def test_zeros_are_positive() -> None:
    linear = nn.Linear(8, 4)
    linear.weight.data.fill_(-0.0)
    linear.weight.data[:, 0] = -1
    report = prune_module(nn.Sequential(linear))
    assert not linear.weight[:, 1:].signbit().any()
    assert linear.weight[:, 0].eq(-1).all()
    assert report.layers[0].sparsity == 7 / 8
    assert report.layers[0].kept_energy == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wander"}, "unknown method 'wander'"),
        ({"method": "sparsegpt", "batches": [images(1, 4, 8, 8)]}, "changes the kept weights.*use swiftprune, "),
        ({"method": "wanda"}, "'wanda' needs calibration data; give batches"),
        ({"ignore": "("}, "not a regular expression"),
        ({"ignore": ""}, r"nothing to prune.* \(0: matches ignore"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [None], "forward": lambda module, batch: None}, "none of them goes through a layer"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        prune_module(convolutional(), **options)


def test_a_module_without_matrices_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no suitable Linear, Conv1d or Conv2d$"):
        prune_module(nn.Sequential(nn.ReLU(), nn.LayerNorm(8)))


@pytest.mark.parametrize("batches", [None, [images(2, 4, 8, 8)]])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_change_nothing(batches: list[Tensor] | None, bad: float) -> None:
    module = convolutional()
    module.get_parameter("3.weight").data[5, 4, 2, 1] = bad
    before = copy.deepcopy(module.get_parameter("0.weight"))
    with pytest.raises(FormatError, match=rf"3\.weight: weight \(5, 4, 2, 1\) is {bad}"):
        prune_module(module, batches)
    assert torch.equal(module.get_parameter("0.weight"), before)


def test_inputs_that_are_not_finite_change_nothing() -> None:
    module, batch = convolutional(), images(2, 4, 8, 8)
    before = copy.deepcopy(module.state_dict())
    batch[1, 2, 7, 7] = float("nan")  # only the last kernel position meets this corner
    with pytest.raises(CheckpointError, match="input channel 2 of 0 is not finite"):
        prune_module(module, [batch])
    before["1.weight"][7] = float("inf")  # a norm, between the convolutions
    module.load_state_dict(before)
    with pytest.raises(CheckpointError, match="input channel 7 of 3 is not finite"):
        prune_module(module, [images(2, 4, 8, 8)])
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
