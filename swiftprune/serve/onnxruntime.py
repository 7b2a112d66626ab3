"""Packed ONNX models in ONNX Runtime, on our own kernels.

>>> import swiftprune.serve.onnxruntime
>>> session = swiftprune.serve.onnxruntime.session("my-model/model.onnx")  # doctest: +SKIP
>>> session.linears  # doctest: +SKIP
{'avx512': 210, 'dense': 1}
>>> session.run(None, {"input_ids": ids, "attention_mask": mask, **cache})  # doctest: +SKIP

The models are those of `swiftprune-export --target onnx` and `swiftprune-onnx pack`. Any ONNX Runtime reads them;
without the kernel library it unpacks the weights when it loads them and multiplies densely.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftprune.checkpoints.source import from_hub, read_json
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.formats.spec import QUANT_METHOD
from swiftprune.kernels import dispatch, native
from swiftprune.kernels.cpu import KERNELS
from swiftprune.kernels.dispatch import BACKEND_VARIABLE, REFERENCE

logger = logging.getLogger(__name__)

_PAST, _PRESENT = "past_key_values.", "present."
_QUANTIZED_HEAD = "MatMulNBits"  # ONNX Runtime's own, of dense weights
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def library() -> Path:
    """The library of the operator `swiftprune::MatMul24`, for `SessionOptions.register_custom_ops_library`.

    Raises SettingsError when swiftprune was installed without its native kernels.
    """
    if native.ONNXRUNTIME_LIBRARY is None:
        raise SettingsError(
            "swiftprune was installed without its native kernels (no C++ compiler at install time?); "
            "install a compiler and swiftprune again"
        )
    return native.ONNXRUNTIME_LIBRARY


def session(
    path: str | Path, options: Any = None, *, providers: Sequence[Any] = ("CPUExecutionProvider",), kernels: bool = True
) -> Any:
    """An `onnxruntime.InferenceSession` on the model at `path`, its packed linears on the kernels of this library.

    It has one attribute more, `linears`: how many linears run on which backend. `dense` are those that the model holds
    dense, `MatMulNBits` those that it holds dense in 8 bits. `reference` are packed ones that ONNX Runtime unpacks and
    multiplies densely: all of them with `kernels=False`, with SWIFTPRUNE_BACKEND=reference, or, with a warning, without
    the native kernels. `options` is an `onnxruntime.SessionOptions`; the library is registered with it.

    Raises CheckpointError when ONNX Runtime cannot load the model, SettingsError when ONNX Runtime is missing.
    """
    onnxruntime = _import("onnxruntime")
    path = Path(path)
    options = options or onnxruntime.SessionOptions()
    wanted = kernels and os.environ.get(BACKEND_VARIABLE) != REFERENCE
    if wanted:
        try:
            options.register_custom_ops_library(str(library()))
        except SettingsError as error:
            logger.warning("%s; packed weights are multiplied densely: same results, no faster", error)
    with count_linears(path) as linears:
        try:
            made = onnxruntime.InferenceSession(path, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's own, of a dozen types without a base
            raise CheckpointError(f"{path}: ONNX Runtime cannot load it: {_plain(error)}") from error
    made.linears = linears
    return made


def genai_model(folder: str | Path, *, threads: int | None = None, endless: bool = False) -> tuple[Any, dict[str, int]]:
    """An `onnxruntime_genai.Model` on an exported `folder`, or hub id, its packed linears on the library's kernels.

    Returns it and how many linears run on which backend, as in `session`. `folder` holds genai_config.json and
    model.onnx. With `endless` only the last token of the vocabulary ends an answer, for measurements. Raises
    CheckpointError when onnxruntime-genai cannot load it, SettingsError when it is missing.
    """
    genai = _import("onnxruntime_genai")
    folder = (Path(folder) if Path(folder).is_dir() else from_hub(str(folder), None, *_ONNX_FILES)).resolve()
    if not (folder / "genai_config.json").exists():
        if not (folder / "model.onnx").exists():
            raise CheckpointError(f"{folder}: holds no model.onnx; export the base model with --target onnx")
        raise CheckpointError(
            f"{folder}: has no genai_config.json: onnxruntime-genai does not run this architecture; "
            "use swiftprune.serve.onnxruntime.session"
        )
    operators = library().resolve()
    options: dict[str, Any] = {"custom_ops_library": str(operators)}
    if threads is not None:
        options["intra_op_num_threads"] = threads
    # It takes libraries only from the model's folder and from below the working folder.
    with count_linears(folder / "model.onnx") as linears, contextlib.chdir(operators.parent):
        try:
            config = genai.Config(str(folder))
            settings: dict[str, Any] = {"decoder": {"session_options": options}}
            if endless:
                settings["eos_token_id"] = read_json(folder / "genai_config.json")["model"]["vocab_size"] - 1
            config.overlay(json.dumps({"model": settings}))
            made = genai.Model(config)
        except Exception as error:
            raise CheckpointError(f"{folder}: onnxruntime-genai cannot load it: {_plain(error)}") from error
    return made, linears


_ONNX_FILES = ("*.onnx", "*.onnx.data")

# All that onnxruntime-genai would else take from genai_config.json, which has it from the model's own settings.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}


def generate(model: Any, prompt: str, tokens: int, *, chat: bool = False) -> Iterator[str]:
    """The greedy answer of an `onnxruntime_genai.Model` to `prompt`, piece by piece, of at most so many tokens.

    With `chat` the prompt is a user's message, set in the model's chat template; SettingsError where it has none.
    """
    genai = _import("onnxruntime_genai")
    tokenizer = genai.Tokenizer(model)
    stream = tokenizer.create_stream()
    if chat:
        message = json.dumps([{"role": "user", "content": prompt}])
        try:
            prompt = tokenizer.apply_chat_template(messages=message, add_generation_prompt=True)
        except RuntimeError as error:
            raise SettingsError(f"--chat: the model's chat template cannot be used: {_plain(error)}") from None
    asked = tokenizer.encode(prompt)
    generator = greedy_generator(model, len(asked) + tokens)
    generator.append_tokens(asked)
    while not generator.is_done():
        generator.generate_next_token()
        yield stream.decode(generator.get_next_tokens()[0])


def greedy_generator(model: Any, longest: int, sequences: int = 1, *, endless: bool = False) -> Any:
    """An `onnxruntime_genai.Generator` that takes the likeliest token, whatever the model's own settings say.

    `longest` counts the tokens of a sequence, prompt and answer, which all have with `endless`.
    """
    genai = _import("onnxruntime_genai")
    parameters = genai.GeneratorParams(model)
    options = _GREEDY | ({"min_length": longest} if endless else {})
    parameters.set_search_options(max_length=longest, batch_size=sequences, **options)
    return genai.Generator(model, parameters)


class Decoder:
    """Sequences decoded in step through the KV cache of an exported causal LM.

    The model has the inputs `input_ids` (B, T) and `attention_mask` (B, past + T), `position_ids` (B, T) where it wants
    them, and `past_key_values.I.key` and `.value` (B, heads, past, width); the outputs `logits` (B, T, V) and
    `present.I.key` and `.value`: what onnxruntime-genai's model builder, optimum and `swiftprune-export` write.
    """

    def __init__(self, session: Any, head_width: int | None = None) -> None:
        """`session` is what `session` returns; `head_width` that of the cache's heads, where the model leaves it open.

        Raises CheckpointError when it is of no decoder.
        """
        self._session = session
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._heads: dict[str, tuple[int, int]] = {}
        self._outputs = [value.name for value in session.get_outputs()]
        if missing := {"input_ids", "logits"} - {*self._inputs, *self._outputs}:
            raise CheckpointError(f"the ONNX model has no {' and no '.join(sorted(missing))}: not an exported decoder")
        for name, value in self._inputs.items():
            if not name.startswith(_PAST):
                continue
            width = value.shape[3] if isinstance(value.shape[3], int) else head_width
            if not isinstance(value.shape[1], int) or width is None:
                raise CheckpointError(f"the ONNX model leaves the heads or their width open in {name}: {value.shape}")
            self._heads[name] = value.shape[1], width
        self._cache: dict[str, Any] = {}
        self._seen = 0

    def reset(self) -> None:
        """Forgets all sequences."""
        self._cache, self._seen = {}, 0

    def step(self, tokens: NDArray[np.int64]) -> NDArray[Any]:
        """Adds `tokens` (B, T) to the sequences. Returns their logits (B, T, V), or (B, 1, V) of the last ones."""
        rows, length = tokens.shape
        if not self._seen:
            self._cache = {
                name: np.zeros((rows, heads, 0, width), _NUMPY_TYPES[self._inputs[name].type])
                for name, (heads, width) in self._heads.items()
            }
        positions = np.arange(self._seen, self._seen + length, dtype=np.int64)
        feeds = {
            "input_ids": np.ascontiguousarray(tokens, np.int64),
            "attention_mask": np.ones((rows, self._seen + length), np.int64),
            "position_ids": np.tile(positions, (rows, 1)),
        }
        feeds = {name: feed for name, feed in feeds.items() if name in self._inputs}
        found = dict(zip(self._outputs, self._session.run(None, feeds | self._cache), strict=True))
        self._cache = {name: found[name.replace(_PAST, _PRESENT)] for name in self._cache}
        self._seen += length
        logits: NDArray[Any] = found["logits"]
        return logits


@contextmanager
def count_linears(path: Path) -> Iterator[dict[str, int]]:
    """Fills the mapping it gives with the linears of the model at `path` by backend, once the `with` block is done.

    Counts the kernels that the library makes meanwhile, so only one model may be loaded at a time.
    """
    linears: dict[str, int] = {}
    graph = _graph(path)
    weights = {tensor.name for tensor in graph.initializer}
    weights |= {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights}
    packed = sum(node.domain == QUANT_METHOD for node in graph.node)
    dense = sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in weights for node in graph.node)
    before = _kernels_made()
    yield linears
    made = _kernels_made() - before
    linears.update(sorted(made.items()))
    if unpacked := packed - made.total():
        linears[REFERENCE] = unpacked
    if dense:
        linears[dispatch.DENSE] = dense
    if quantized := sum(node.op_type == _QUANTIZED_HEAD for node in graph.node):
        linears[_QUANTIZED_HEAD] = quantized


def _kernels_made() -> Counter[str]:
    """Kernels that the library has made in this process, by backend."""
    if native.ONNXRUNTIME_LIBRARY is None:
        return Counter()
    loaded = _load_library()
    return Counter({name: loaded.swiftprune_kernels_created(name.encode()) for name in KERNELS})


@functools.cache
def _load_library() -> Any:
    loaded = ctypes.CDLL(str(library()))
    loaded.swiftprune_kernels_created.argtypes = [ctypes.c_char_p]
    loaded.swiftprune_kernels_created.restype = ctypes.c_int64
    return loaded


def _graph(path: Path) -> Any:
    onnx = _import("onnx")
    try:
        return onnx.load(path, load_external_data=False).graph
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # protobuf's own
        raise CheckpointError(f"{path}: is not a readable ONNX model ({_plain(error)})") from error


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SettingsError("ONNX models need: pip install 'swiftprune[onnx]'") from None


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())
