"""llama.cpp, as a rival: greedy decoding of one sequence from a GGUF file, by the C interface of llama-cpp-python."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime_bench.engines import Options, Scores, scores
from swiftprune.errors import CheckpointError, SettingsError

_HELD: list[Any] = []  # what C calls back, which must not be collected


def library() -> Any:
    """The module llama_cpp, silent. Raises SettingsError when it is not installed."""
    try:
        llama = importlib.import_module("llama_cpp")
    except ImportError:
        raise SettingsError(
            "llama.cpp is not installed: pip install 'swiftprune[rivals]', which compiles it (minutes)"
        ) from None
    if not _HELD:
        _HELD.append(llama.llama_log_callback(lambda *_: None))
        llama.llama_log_set(_HELD[0], None)
    return llama


def load(path: Path, options: Options) -> LlamaCppModel:
    return LlamaCppModel(path, options)


class LlamaCppModel:
    """See `worker.Model`. `path` is a GGUF file; prompts come one at a time."""

    def __init__(self, path: Path, options: Options) -> None:
        self._llama = llama = library()
        self.engine_version = importlib.metadata.version("llama-cpp-python")
        self.linears: dict[str, int] = {}
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        if not self._model:
            raise CheckpointError(f"{path}: llama.cpp cannot load it")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = options.longest
        parameters.n_threads = parameters.n_threads_batch = options.threads
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise CheckpointError(f"{path}: llama.cpp cannot make a context of {options.longest} tokens")
        self._batch = llama.llama_batch_init(options.longest, 0, 1)

    def generate(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[], None]) -> list[list[int]]:
        if len(prompts) != 1:
            raise SettingsError(f"llama.cpp is measured with one sequence at a time, not {len(prompts)}")
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        step, seen, answer = prompts[0], 0, []
        for _ in range(new_tokens):
            self._decode(step, seen)
            seen += len(step)
            step = [int(self._logits(len(step) - 1).argmax())]
            answer += step
            arrived()
        return [answer]

    def score(self, tokens: list[int]) -> Scores:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._decode(tokens, 0, every=True)
        logits = np.stack([self._logits(index) for index in range(len(tokens) - 1)])
        return scores(torch.from_numpy(logits), tokens)

    def _decode(self, tokens: Sequence[int], seen: int, *, every: bool = False) -> None:
        """Runs `tokens` after `seen` others; logits are computed for the last one, or for `every` one."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = seen + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == len(tokens) - 1
        if code := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp cannot decode {len(tokens)} tokens after {seen} (code {code})")
        self._llama.llama_synchronize(self._context)

    def _logits(self, index: int) -> NDArray[np.float32]:
        """Of token `index` of what was decoded last, to be used before the next."""
        found = self._llama.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(found, shape=(self._vocabulary,))
