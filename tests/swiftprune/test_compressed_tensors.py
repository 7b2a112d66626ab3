"""Checkpoints that compressed-tensors 0.14.0.1 itself wrote with 2:4 and quantized weights, read back and kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from exporters import export
from exporters.info import describe
from swiftprune import PruneSettings, unpack
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.kernels.linear import Linear24
from swiftprune.kernels.packing import keep_mask
from tests.models import SMALL, write_tokenizer

COMPRESSED_TENSORS = Path(sys.prefix) / "compressed-tensors-0.14"
pytestmark = pytest.mark.skipif(
    not COMPRESSED_TENSORS.exists(), reason="make test installs compressed-tensors 0.14.0.1"
)

# With two and three groups of 128 inputs, and as many rows as marlin-24 needs.
CONFIG = LlamaConfig(
    **SMALL | {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 384},
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
DENSE = "model.layers.0.self_attn.o_proj"  # not sparse
SHOWN = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True)
class Case:
    """What is written, and in which types."""

    format: str
    type: str
    bits: int
    strategy: str
    model: torch.dtype
    scale: torch.dtype
    inputs: str | None = None
    dense_too: bool = False
    """Whether the linear that is not sparse is quantized as well."""
    lowest: int | None = None
    """The smallest integer, where it is not the largest one negated."""

    @property
    def is_exact(self) -> bool:
        """Whether 8-bit values hold it."""
        per_row = self.strategy != "group" and self.type == "int"
        return per_row and self.scale == torch.bfloat16 and self.lowest is None

    @property
    def scheme(self) -> dict[str, Any]:
        """An entry of `config_groups`."""
        weights = {"num_bits": self.bits, "type": self.type, "symmetric": True, "strategy": self.strategy}
        if self.strategy == "group":
            weights["group_size"] = 128
        dynamic = {"num_bits": 8, "type": self.type, "symmetric": True, "strategy": self.inputs}
        given = {"input_activations": dynamic | {"dynamic": self.inputs == "token"}} if self.inputs else {}
        return {"targets": ["Linear"], "weights": weights} | given


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "marlin-4-channel": Case("marlin-24", "int", 4, "channel", BF16, BF16),
    "marlin-8-channel": Case("marlin-24", "int", 8, "channel", F16, BF16),
    "marlin-4-group": Case("marlin-24", "int", 4, "group", BF16, F16, lowest=-8),
    "marlin-8-group": Case("marlin-24", "int", 8, "group", F16, F16, lowest=-128),
    "marlin-8-lowest": Case("marlin-24", "int", 8, "channel", BF16, BF16, lowest=-128),
    "int8-channel": Case("sparse-24-bitmask", "int", 8, "channel", BF16, BF16, "token"),
    "int8-tensor": Case("sparse-24-bitmask", "int", 8, "tensor", BF16, BF16, "tensor"),
    "int8-fp16": Case("sparse-24-bitmask", "int", 8, "channel", F16, F16, "token"),
    "int8-fp32": Case("sparse-24-bitmask", "int", 8, "channel", BF16, F32, "token"),
    "fp8-channel": Case("sparse-24-bitmask", "float", 8, "channel", BF16, BF16, "token", dense_too=True),
    "fp8-tensor": Case("sparse-24-bitmask", "float", 8, "tensor", F16, F16, "tensor"),
}

WRITE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import compressed_tensors, torch
from compressed_tensors.compressors import ModelCompressor, map_module_to_scheme
from compressed_tensors.config import Sparse24BitMaskConfig
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

assert compressed_tensors.__version__.startswith("0.14.0")
for folder in sorted(Path(sys.argv[2]).iterdir()):
    case = json.loads((folder / "case.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = QuantizationConfig(config_groups={"group_0": case["scheme"]}, ignore=case["ignore"], format=case["format"])
    apply_quantization_config(model, config)
    for name, scale in load_file(folder / "scales.safetensors").items():
        module = model.get_submodule(name)
        module.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        module.quantization_status = QuantizationStatus.FROZEN
    sparse = case["format"] != "marlin-24"  # which has the zeros in it
    sparsity = Sparse24BitMaskConfig(targets=["Linear"], ignore=case["dense"], sparsity_structure="2:4")
    compressor = ModelCompressor(sparsity_config=sparsity if sparse else None, quantization_config=config)
    stored = compressor.compress(model)
    dtype = getattr(torch, case["dtype"])
    stored = {
        name: tensor.to(dtype) if tensor.dtype == torch.float32 and not name.endswith("weight_scale") else tensor
        for name, tensor in stored.items() if name != "lm_head.weight"
    }
    (folder / "written").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "written" / "model.safetensors")
    described = json.loads((folder / "config.json").read_text()) | {"dtype": case["dtype"]}
    (folder / "written" / "config.json").write_text(json.dumps(described))
    compressor.update_config(str(folder / "written"))
    if sparse:  # what it makes of its own file
        stored = load_file(folder / "written" / "model.safetensors")
        dense = compressor.sparsity_compressor.decompress_from_state_dict(stored)
        read = next(iter(compressor.quantization_compressor.values()))
        decompressed = read.decompress_from_state_dict(dict(dense), map_module_to_scheme(model))
        save_file({name: tensors["weight"] for name, tensors in decompressed}, folder / "decompressed.safetensors")
"""


@dataclass(frozen=True)
class Written:
    """What compressed-tensors wrote of a case."""

    case: Case
    folder: Path
    values: dict[str, Tensor]
    """By linear, before anything was stored: (N, K), integers or fp8 as float32."""
    scales: dict[str, Tensor]
    decompressed: dict[str, Tensor]
    """What it reads back itself, which it does of the bitmask only."""

    def weight(self, name: str) -> Tensor:
        """(N, K), as the rules have it: exact, or in the type of the scales, or for marlin-24 rounded once."""
        values, scales = self.values[name], self.scales[name]
        if self.case.strategy == "group":
            scales = scales.repeat_interleave(128, dim=1)
        if self.case.is_exact or self.case.format == "marlin-24":
            exact = values * scales.float()
            return exact if self.case.is_exact else exact.to(self.case.model)
        return (values.to(scales.dtype) * scales).to(self.case.model)


def make_source(folder: Path, name: str, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A float32 checkpoint whose 2:4 weights are products of values and scales, and these."""
    generator = torch.Generator().manual_seed(len(name))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    values, scales = {}, {}
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1).to(case.model).float()
    for linear, module in model.model.named_modules(prefix="model"):
        if not isinstance(module, torch.nn.Linear) or (linear == DENSE and not case.dense_too):
            continue
        rows, cols = module.weight.shape
        groups = {"tensor": (1,), "channel": (rows, 1), "group": (rows, cols // 128)}[case.strategy]
        scale = torch.rand(groups, generator=generator).mul(0.002).add(0.001).to(case.scale)
        if case.type == "int":
            largest = (1 << case.bits - 1) - 1
            lowest = case.lowest or -largest
            value = torch.randint(lowest, largest + 1, (rows, cols), generator=generator).float()
            value[0] = lowest
        else:
            value = torch.randn(rows, cols, generator=generator).mul(100).to(torch.float8_e4m3fn).float()
        if linear != DENSE:
            ranks = torch.rand(rows, cols // 4, 4, generator=generator).argsort(-1).argsort(-1)
            value *= (ranks < 2).view(rows, cols)
        of_each = scale.float().repeat_interleave(128, dim=1) if case.strategy == "group" else scale.float()
        module.weight.data = value * of_each
        values[linear], scales[linear] = value, scale
    model.save_pretrained(folder)
    save_file(scales, folder / "scales.safetensors")
    quantized = {"int": "int-quantized", "float": "float-quantized"}[case.type]
    (folder / "case.json").write_text(
        json.dumps(
            {
                "scheme": case.scheme,
                "ignore": ["lm_head"] if case.dense_too else ["lm_head", DENSE],
                "dense": ["lm_head", DENSE],
                "format": case.format if case.format == "marlin-24" else quantized,
                "dtype": str(case.model).removeprefix("torch."),
            }
        )
    )
    return values, scales


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    root = tmp_path_factory.mktemp("compressed-tensors")
    made = {name: make_source(root / name, name, case) for name, case in CASES.items()}
    command = [sys.executable, "-c", WRITE, str(COMPRESSED_TENSORS), str(root)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = {}
    for name, (values, scales) in made.items():
        read_back = root / name / "decompressed.safetensors"
        folder = root / name / "written"
        write_tokenizer(folder)
        decompressed = load_file(read_back) if read_back.exists() else {}
        found[name] = Written(CASES[name], folder, values, scales, decompressed)
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_it_wrote_is_kept(name: str, written: dict[str, Written], tmp_path: Path) -> None:
    source = written[name]
    said: list[str] = []
    report = export(source.folder, tmp_path / "out", PruneSettings(), notify=said.append)
    assert (report.settings.method, report.settings.calibration) == ("keep", "none")
    assert not report.source_loads
    assert report.settings.values == ("int8" if source.case.is_exact else None)
    assert any(source.case.format in text for text in said)
    assert any("activations is left out" in text for text in said) == bool(source.case.inputs)
    assert any("do not hold" in text and "--values int8" in text for text in said) != source.case.is_exact
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "swiftprune"
    assert report.dense_linears[DENSE] == "stored dense"

    assert ("model.layers.0.mlp.up_proj.input_scale" in load_file(source.folder / "model.safetensors")) == (
        source.case.inputs == "tensor"
    )
    stored = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    assert not [key for key in stored if key.rpartition(".")[2] not in ("weight", "weight_meta", "weight_scale")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == source.case.model
    packed = {key: module for key, module in model.named_modules() if isinstance(module, Linear24)}
    assert packed.keys() == source.values.keys() - {DENSE}
    for key, module in packed.items():
        assert torch.equal(unpack(module.packed), source.weight(key)), key
        assert stored[f"{key}.weight"].dtype == (torch.int8 if source.case.is_exact else source.case.model)
    original = AutoModelForCausalLM.from_pretrained(source.folder.parent, dtype=source.case.model)
    dense = dict(original.named_parameters())
    rest = {key: value for key, value in model.named_parameters() if key.rpartition(".")[0] not in packed}
    assert f"{DENSE}.weight" in rest
    for key, parameter in rest.items():
        decoded = key == f"{DENSE}.weight" and source.case.dense_too
        assert torch.equal(parameter, source.weight(DENSE) if decoded else dense[key]), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format == "sparse-24-bitmask"])
def test_decoded_weights_are_those_that_it_decompresses_to(
    name: str, written: dict[str, Written], tmp_path: Path
) -> None:
    source = written[name]
    export(source.folder, tmp_path / "out", PruneSettings(), target="dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert source.decompressed.keys() == source.values.keys()
    for key, weight in source.decompressed.items():
        assert weight.dtype == source.case.scale
        found = model.get_parameter(f"{key}.weight")
        assert torch.equal(found, weight.to(source.case.model)), key


def test_the_stored_mask_stays(written: dict[str, Written], tmp_path: Path) -> None:
    """Stored zeros too, which it stores where a group has fewer than two values."""
    source = written["int8-channel"]
    export(source.folder, tmp_path / "out", PruneSettings())
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tensors = load_file(source.folder / "model.safetensors")
    zeros = 0
    for key in source.values:
        bits = np.unpackbits(tensors[f"{key}.bitmask"].numpy(), axis=1, bitorder="little")
        packed = model.get_submodule(key).packed
        assert torch.equal(packed.values, tensors[f"{key}.compressed"])
        assert torch.equal(keep_mask(packed), torch.from_numpy(bits.astype(bool)))
        zeros += int((packed.values == 0).sum())
    assert zeros


def test_float32_holds_what_marlin_stands_for(written: dict[str, Written], tmp_path: Path) -> None:
    source = written["marlin-8-group"]
    export(source.folder, tmp_path / "out", PruneSettings(dtype="float32"))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for key, values in source.values.items():
        exact = values.double() * source.scales[key].double().repeat_interleave(128, dim=1)
        assert torch.equal(unpack(model.get_submodule(key).packed).double(), exact)


def test_a_bitmask_of_floats_is_kept_too(written: dict[str, Written], tmp_path: Path) -> None:
    """That of `--target sparse24-bitmask`, which compressed-tensors wrote of models that were pruned only."""
    source = written["marlin-4-group"]
    said: list[str] = []
    export(source.folder, tmp_path / "bitmask", PruneSettings(), target="sparse24-bitmask")
    report = export(tmp_path / "bitmask", tmp_path / "out", PruneSettings(), notify=said.append)
    assert (report.settings.method, report.settings.values) == ("keep", None)
    assert "1 of 7 linears stay dense" in said[1]
    assert not any("8 bits" in text or "8-bit" in text for text in said)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for key in source.values:
        assert torch.equal(unpack(model.get_submodule(key).packed), source.weight(key))


def test_values_that_do_not_fit_can_be_rounded(written: dict[str, Written], tmp_path: Path) -> None:
    source = written["marlin-4-group"]
    export(source.folder, tmp_path / "out", PruneSettings(values="int8"), head="keep")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key in source.values:
        weight, found = source.weight(key).float(), unpack(model.get_submodule(key).packed)
        assert 0 < float((found - weight).norm() / weight.norm()) < 0.02


def test_what_only_makes_sense_for_plain_weights_is_refused(written: dict[str, Written], tmp_path: Path) -> None:
    folder = written["marlin-4-group"].folder
    text = tmp_path / "text.txt"
    text.write_text("text")
    for settings, option in (
        (PruneSettings(method="wanda", calibration=str(text)), "--method wanda"),
        (PruneSettings(pattern="4:8"), "--format 4:8"),
        (PruneSettings(mask="masks.npz"), "--mask"),
        (PruneSettings(permute=True), "--permute"),
        (PruneSettings(refine=("weights",)), "--refine"),
        (PruneSettings(max_perplexity_ratio=1.5), "--sparsity auto"),
    ):
        with pytest.raises(SettingsError, match=f"{option}: .* are marlin-24 and can only be kept; export them with"):
            export(folder, tmp_path / "out", settings, target="dense")
    with pytest.raises(SettingsError, match="--evaluate: transformers cannot load"):
        export(folder, tmp_path / "out", evaluate=text)
    with pytest.raises(SettingsError, match=r"--strict: 1 of 7 linears are not, first .*o_proj: stored dense"):
        export(folder, tmp_path / "out", PruneSettings(method="keep", strict=True))
    report = export(
        folder,
        tmp_path / "preset",
        PruneSettings(
            refine=("distill",), minutes=1, method="admm", from_preset=frozenset({"refine", "minutes", "method"})
        ),
    )
    assert (report.settings.method, report.settings.refine) == ("keep", ())


def test_a_scheme_may_name_the_format(written: dict[str, Written], tmp_path: Path) -> None:
    """Where others have another one, config.json has `mixed-precision` for all."""
    folder = Path(shutil.copytree(written["marlin-4-group"].folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "mixed-precision"
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "marlin-24"
    (folder / "config.json").write_text(json.dumps(config))
    assert len(export(folder, tmp_path / "out").layers) == 6


def test_info_says_what_it_is(written: dict[str, Written]) -> None:
    for name in ("marlin-4-group", "fp8-tensor"):
        found = describe(written[name].folder)
        assert found.kind == f"2:4 weights as {CASES[name].format}, quantized"
        assert found.packed_linears == 6
        assert "--method keep" in found.engines["swiftprune-export"]


Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]


def put(part: str, tensor: Callable[[Tensors], Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{SHOWN}.{part}": tensor(tensors)})


def without(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{SHOWN}.{part}")


def filled(part: str, index: Any, value: float) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[f"{SHOWN}.{part}"][index] = value

    return change


def nan8(tensors: Tensors) -> None:
    tensors[f"{SHOWN}.compressed"].view(torch.uint8)[4, 6] = 0x7F


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("marlin-4-group", without("meta"), rf"holds {SHOWN}\.\S+ without {SHOWN}\.meta"),
        ("marlin-4-group", without("scale_packed"), rf"without {SHOWN}\.scale_packed; download"),
        ("marlin-4-group", put("meta", lambda t: t[f"{SHOWN}.meta"][1:].clone()), "do not belong together; of a"),
        ("marlin-4-group", put("meta", lambda t: t[f"{SHOWN}.meta"].int()), rf"{SHOWN}\.meta is I32, not I16"),
        ("marlin-4-group", filled("scale_packed", (1, 5), torch.inf), rf"{SHOWN}\.scale_packed holds inf at \[1, 5\]"),
        ("marlin-4-group", filled("meta", (0, 0), 0x4445 - (1 << 15)), r"metadata of row 0, group [0-3] is 0x[45c]"),
        ("marlin-4-group", put("weight_g_idx", lambda t: torch.zeros(384)), "weight_g_idx holds an order of inputs"),
        ("int8-channel", without("bitmask"), rf"without {SHOWN}\.bitmask"),
        ("int8-channel", without("shape"), rf"without {SHOWN}\.shape"),
        ("int8-channel", without("weight_scale"), rf"without {SHOWN}\.weight_scale"),
        ("int8-channel", filled("shape", 0, 512), r"shape \[512, 384\] do not belong together"),
        (
            "int8-channel",
            put("bitmask", lambda t: t[f"{SHOWN}.bitmask"][:, 1:].clone()),
            r"bitmask \(256, 47\) and shape",
        ),
        ("int8-channel", put("bitmask", lambda t: t[f"{SHOWN}.bitmask"].to(torch.int8)), "bitmask is I8, not U8"),
        ("int8-channel", put("compressed", lambda t: t[f"{SHOWN}.compressed"].int()), "compressed is I32, not F32 or"),
        ("int8-channel", filled("bitmask", (3, 2), 0b0111_0011), "row 3, columns 16 to 23 is 0b01110011"),
        ("int8-channel", filled("weight_scale", 7, torch.nan), rf"{SHOWN}\.weight_scale holds nan at \[7, 0\]"),
        ("int8-channel", put("weight_scale", lambda t: torch.ones(256, 3)), r"is \(256, 3\) beside a weight \(256, "),
        ("int8-channel", put("weight_scale", lambda t: torch.ones(256, 1).int()), "weight_scale is I32, not F32 or"),
        ("int8-channel", put("weight_zero_point", lambda t: torch.ones(1)), r"zero points \(asymmetric quantization\)"),
        ("fp8-channel", nan8, r"value \(4, 6\) is nan; it must be finite"),
    ],
)
def test_damaged_files_are_refused(
    name: str, change: Change, message: str, written: dict[str, Written], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written[name].folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        export(folder, tmp_path / "out")
    assert "model.safetensors: " in str(caught.value)
    assert SHOWN in str(caught.value)
    assert "prune the checkpoint that it was made from" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("marlin-4-group", {"num_bits": 2}, "has 2-bit int weights; of marlin-24 4-bit int or 8-bit int can be read"),
        ("marlin-4-group", {"num_bits": 8}, r"weight_packed is of 4 bits, which config.json declares none of"),
        ("marlin-4-group", {"type": "float"}, "has 4-bit float weights"),
        ("marlin-4-group", {"symmetric": False}, "has zero points"),
        ("marlin-4-group", {"actorder": "group"}, "has activation ordering"),
        ("marlin-4-group", {"group_size": 64}, "has groups of 64 inputs"),
        ("int8-channel", {"num_bits": 4}, "has 4-bit int weights; of sparse-24-bitmask 8-bit int or 8-bit float can"),
        ("int8-channel", {"strategy": "block"}, "has scales by block; of sparse-24-bitmask channel or tensor can"),
        ("int8-channel", "int8", "its config_groups is no object of schemes"),
    ],
)
def test_schemes_that_are_not_read_are_refused(
    name: str, weights: Any, message: str, written: dict[str, Written], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written[name].folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"] = group["weights"] | weights if isinstance(weights, dict) else weights
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        export(folder, tmp_path / "out")
    assert "config.json" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_config_without_its_weights_is_refused(written: dict[str, Written], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["marlin-4-group"].folder, tmp_path / "model"))
    shutil.copy(written["marlin-4-group"].folder.parent / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="declares marlin-24, but no weight is stored so"):
        export(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "pack-quantized"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="already quantized or packed by 'compressed-tensors'"):
        export(folder, tmp_path / "out")
