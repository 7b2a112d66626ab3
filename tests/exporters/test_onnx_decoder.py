"""ONNX decoders against transformers: both ways of building them, by architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from exporters.onnx import decoder
from exporters.onnx.decoder import build_decoder
from exporters.onnx.trace import STANDARD_OPSET
from swiftprune.config import DtypeName
from swiftprune.errors import CheckpointError, SettingsError
from tests import models

BUILDER, TORCH = "onnxruntime-genai", "torch.onnx"
TOLERANCE = 5e-5  # of logits up to 6; 1e-5 is seen
PROMPT, NEW_TOKENS, WINDOW = 20, 12, 8
ROOT = Path(__file__).parents[2]

_COMMON: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_SMALL = _COMMON | {"num_hidden_layers": 1}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        **_GROUPED,
        tie_word_embeddings=True,
        head_dim=32,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=models.LLAMA3_ROPE,
    ),
    "llama-plain": LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "llama-linear": LlamaConfig(**_GROUPED, rope_parameters=_LINEAR),
    "llama-head-20": LlamaConfig(**_GROUPED, head_dim=20),
    "llama-gelu": LlamaConfig(**_GROUPED, hidden_act="gelu"),
    "qwen2": Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": MistralConfig(**_GROUPED, sliding_window=None),
    "mistral-sliding": MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "gpt-neox": GPTNeoXConfig(**_COMMON),
    "gpt-neox-small": GPTNeoXConfig(**_SMALL),
    "mixtral": MixtralConfig(**_SMALL, num_key_value_heads=4, num_local_experts=4),
    "mamba": MambaConfig(vocab_size=models.VOCABULARY, hidden_size=64, num_hidden_layers=1),
}


@dataclass
class Built:
    """A checkpoint and the decoder made of it."""

    checkpoint: Path
    out: Path
    builder: str

    @property
    def path(self) -> Path:
        return self.out / "model.onnx"

    def graph(self) -> Any:
        return onnx.load(self.path).graph

    def reference(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()


class Session:
    """Runs a decoder step by step."""

    def __init__(self, path: Path) -> None:
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self.cache: dict[str, Any] = {}

    def step(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of `tokens` (B, T) after those before; `mask` (B, past + T) is 0 where a row is padded."""
        rows, length = tokens.shape
        past = {name: value for name, value in self.inputs.items() if name.startswith("past_key_values.")}
        if not self.cache:
            self.cache = {
                name: np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float16 if "16" in value.type else "f4")
                for name, value in past.items()
            }
        if mask is None:
            mask = torch.ones(rows, next(iter(self.cache.values())).shape[2] + length, dtype=torch.int64)
        feeds = {
            "input_ids": tokens.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -length:].numpy(),
        }
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        found = dict(zip(self.outputs, self._session.run(None, feeds | self.cache), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in past}
        return torch.from_numpy(found["logits"]).float()


def _write_checkpoint(folder: Path, config: PretrainedConfig) -> Path:
    """All weights random, those of norms and biases too, so that one that is lost or swapped shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    models.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of that name on first use; tests must not write to it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda name: root / name if (root / name).exists() else _write_checkpoint(root / name, CONFIGS[name])


@pytest.fixture(scope="module")
def built(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Builds a decoder on first use."""
    done: dict[tuple[str, bool], Built] = {}

    def get(name: str, standard_ops: bool = False) -> Built:
        if (name, standard_ops) not in done:
            out = tmp_path_factory.mktemp("decoders") / name
            by = build_decoder(checkpoint(name), out, standard_ops=standard_ops)
            done[name, standard_ops] = Built(checkpoint(name), out, by)
        return done[name, standard_ops]

    return get


def _prompt(rows: int = 2, length: int = PROMPT) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(2, models.VOCABULARY, (rows, length))


@torch.inference_mode()
def _assert_same_answers(reference: Any, session: Session, tolerance: float) -> None:
    """A prompt at once, then greedy tokens one by one."""
    tokens = step = _prompt()
    for _ in range(NEW_TOKENS):
        found = session.step(step)
        expected = reference(tokens).logits[:, -found.shape[1] :]
        assert (found - expected).abs().max() < tolerance
        step = expected[:, -1:].argmax(-1)
        assert torch.equal(found[:, -1:].argmax(-1), step)
        tokens = torch.cat((tokens, step), dim=1)
    assert len(set(tokens[:, PROMPT:].flatten().tolist())) > NEW_TOKENS // 3  # the models do not just repeat themselves


CASES = [
    ("llama", False, BUILDER),
    ("qwen2", False, BUILDER),
    ("qwen3", False, BUILDER),
    ("mistral", False, BUILDER),
    ("mistral-sliding", False, TORCH),
    ("gpt-neox", False, TORCH),
    ("llama", True, TORCH),
]


@pytest.mark.parametrize(("name", "standard_ops", "by"), CASES)
def test_answers_are_those_of_transformers(built: Callable[..., Built], name: str, standard_ops: bool, by: str) -> None:
    made = built(name, standard_ops)
    assert made.builder.startswith(f"{by} ")
    _assert_same_answers(made.reference(), Session(made.path), TOLERANCE)


@pytest.mark.parametrize(("name", "standard_ops", "by"), CASES)
def test_files(built: Callable[..., Built], name: str, standard_ops: bool, by: str) -> None:
    made = built(name, standard_ops)
    config = CONFIGS[name]
    onnx.checker.check_model(made.path, full_check=True)
    model = onnx.load(made.path, load_external_data=False)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    own = {"com.microsoft": 1} if by == BUILDER else {}
    assert opsets == {"": STANDARD_OPSET if standard_ops else decoder.FUSED_OPSET} | own
    assert {node.domain for node in model.graph.node} == set(opsets)

    tokenizer = {"genai_config.json", "tokenizer.json", "tokenizer_config.json"} if by == BUILDER else set()
    assert {path.name for path in made.out.iterdir()} == {"model.onnx", "model.onnx.data"} | tokenizer
    assert [path.name for path in made.out.parent.iterdir()] == [name]
    assert str(ROOT).encode() not in made.path.read_bytes()

    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    step, total = ["batch_size", "sequence_length"], "total_sequence_length"
    assert _shapes(model.graph.input) == (
        {"input_ids": step, "attention_mask": ["batch_size", total]}
        | ({} if by == BUILDER else {"position_ids": step})
        | {f"past_key_values.{name}": ["batch_size", heads, "past_sequence_length", width] for name in cache}
    )
    logits = step if standard_ops else ["batch_size", 1]  # of the last token
    assert _shapes(model.graph.output) == {"logits": [*logits, models.VOCABULARY]} | {
        f"present.{name}": ["batch_size", heads, total, width] for name in cache
    }


def _shapes(values: Any) -> dict[str, list[str | int]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize(("name", "standard_ops"), [(name, standard) for name, standard, by in CASES if by == TORCH])
@torch.inference_mode()
def test_traced_decoders_take_padding_and_chunks(built: Callable[..., Built], name: str, standard_ops: bool) -> None:
    made = built(name, standard_ops)
    reference, session, tokens = made.reference(), Session(made.path), _prompt()
    whole = reference(tokens).logits
    for part in torch.tensor_split(torch.arange(PROMPT), (1, 7)):
        found = session.step(tokens[:, part])
        assert (found - whole[:, part][:, -found.shape[1] :]).abs().max() < TOLERANCE

    padded, session = 5, Session(made.path)
    mask = torch.ones_like(tokens)
    mask[1, :padded] = 0
    alone = reference(tokens[1:, padded:]).logits
    found = session.step(tokens[:, :-1], mask[:, :-1])[1:, -(PROMPT - 1 - padded) :]
    assert (found - alone[:, :-1][:, -found.shape[1] :]).abs().max() < TOLERANCE
    assert (session.step(tokens[:, -1:], mask)[1:] - alone[:, -1:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
@torch.inference_mode()
def test_logits_are_of_the_last_token_that_the_mask_has(built: Callable[..., Built], name: str) -> None:
    """Rows of different lengths, padded at the end: each row's own last token."""
    made = built(name, False)
    tokens, lengths = _prompt(3), (PROMPT, 4, 11)
    mask = torch.stack([(torch.arange(PROMPT) < length).long() for length in lengths])
    found = Session(made.path).step(tokens, mask)
    assert found.shape == (3, 1, models.VOCABULARY)
    for row, length in enumerate(lengths):
        expected = made.reference()(tokens[row : row + 1, :length]).logits[0, -1]
        assert (found[row, 0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(("name", "standard_ops"), [("gpt-neox", False), ("llama", True)])
def test_traced_weights_keep_their_names_and_appear_once(
    built: Callable[..., Built], name: str, standard_ops: bool
) -> None:
    made = built(name, standard_ops)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph().initializer}
    reference = made.reference()
    head = reference.get_output_embeddings()
    linears = {key: module for key, module in reference.named_modules() if isinstance(module, torch.nn.Linear)}
    for key, module in linears.items():
        tied = CONFIGS[name].tie_word_embeddings and module is head  # as it is, read by the embedding too
        expected = module.weight.detach() if tied else module.weight.detach().T
        assert np.array_equal(stored[f"{key}.weight"], expected.numpy()), key
        if module.bias is not None:
            assert np.array_equal(stored[f"{key}.bias"], module.bias.detach().numpy()), key
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(array.size for array in stored.values()) < 1.01 * parameters


def test_built_weights(built: Callable[..., Built]) -> None:
    made = built("llama")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph().initializer}
    weights = made.reference().state_dict()
    for layer in range(2):
        theirs, ours = f"model.layers.{layer}.", f"model.layers.{layer}."
        joined = torch.cat([weights[f"{theirs}self_attn.{kind}_proj.weight"] for kind in "qkv"])
        assert np.array_equal(stored[f"{ours}attn.qkv_proj.MatMul.weight"], joined.T.numpy())
        down = weights[f"{theirs}mlp.down_proj.weight"]
        assert np.array_equal(stored[f"{ours}mlp.down_proj.MatMul.weight"], down.T.numpy())


@pytest.mark.parametrize(
    ("dtype", "stored", "standard_ops"),
    [("float16", TensorProto.FLOAT16, False), ("bfloat16", TensorProto.BFLOAT16, True)],
)
def test_dtypes_and_silence(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    dtype: DtypeName,
    stored: int,
    standard_ops: bool,
) -> None:
    stages = []
    built_by = build_decoder(
        checkpoint("gpt-neox-small"),
        tmp_path / "out",
        dtype=dtype,
        standard_ops=standard_ops,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert (built_by.split()[0], list(capfd.readouterr()), list(recwarn)) == (TORCH, ["", ""], [])
    assert stages == [("build decoder", done, 3) for done in range(4)]
    made = Built(checkpoint("gpt-neox-small"), tmp_path / "out", built_by)
    onnx.checker.check_model(made.path, full_check=True)
    graph = made.graph()
    assert {tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1} == {stored}
    assert graph.output[0].type.tensor_type.elem_type == stored
    if dtype == "float16":  # ONNX Runtime's CPU kernels take no bfloat16
        with torch.inference_mode():
            expected = made.reference()(_prompt()).logits[:, -1:]
        assert (Session(made.path).step(_prompt()) - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("name", "settings", "missing", "by"),
    [
        ("llama", {}, "", BUILDER),
        ("llama", {"standard_ops": True}, "", TORCH),
        ("llama", {"dtype": "float16"}, "", TORCH),
        ("llama", {}, "onnxruntime_genai", TORCH),
        ("llama", {}, "tokenizer", TORCH),
        ("llama-linear", {}, "", TORCH),  # the builder takes it for plain RoPE
        ("llama-gelu", {}, "", TORCH),
        ("llama-head-20", {}, "", TORCH),  # ONNX Runtime runs the builder's attention in eights only
        ("mistral", {}, "", BUILDER),
        ("mistral-sliding", {}, "", TORCH),  # the builder leaves out the window
        ("gpt-neox", {}, "", TORCH),
    ],
)
def test_which_way(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    settings: dict[str, Any],
    missing: str,
    by: str,
) -> None:
    monkeypatch.setattr(decoder, "run_builder", lambda *arguments, **options: None)
    monkeypatch.setattr(decoder, "_finish_built", lambda *arguments: "0")
    monkeypatch.setattr(decoder, "_trace_model", lambda *arguments: TORCH)
    monkeypatch.setattr(decoder, "find_spec", lambda package: None if package == missing else package)
    ignored = shutil.ignore_patterns("tokenizer*") if missing == "tokenizer" else None
    folder = shutil.copytree(checkpoint(name), tmp_path / "model", ignore=ignored)
    assert build_decoder(folder, tmp_path / "out", **settings).split()[0] == by


def test_the_builder_fails(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps({"model": "torn"}))
    with pytest.raises(CheckpointError, match=r"model: .*model builder failed \(exit code 1\):\n(.*\n)*.*Error: \S"):
        build_decoder(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "out"}


def test_what_cannot_be_exported(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckpointError, match=r"MixtralForCausalLM: torch\.onnx cannot export .*: .*grouped_mm"):
        build_decoder(checkpoint("mixtral"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"MambaForCausalLM: .* without a cache of keys and values: .*past_key"):
        build_decoder(checkpoint("mamba"), tmp_path / "out")

    folder = shutil.copytree(checkpoint("gpt-neox-small"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "ignore_message-of"}))
    with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot read it: .*ignore_message-of"):
        build_decoder(folder, tmp_path / "out")

    monkeypatch.setattr("exporters.onnx.trace.find_spec", lambda package: None if package == "onnxscript" else package)
    with pytest.raises(SettingsError, match=r"onnxscript: pip install 'swiftprune\[onnx\]'"):
        build_decoder(checkpoint("gpt-neox-small"), tmp_path / "out")
