"""Greedy decoding in onnxruntime-genai: our exports, packed linears on our kernels, and files of others."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from runtime_bench.engines import Options
from swiftprune.serve import onnxruntime as serve


def load(folder: Path, options: Options) -> GenaiModel:
    return GenaiModel(folder, options)


class GenaiModel:
    """See `worker.Model`."""

    def __init__(self, folder: Path, options: Options) -> None:
        self._model, self.linears = serve.genai_model(folder, threads=options.threads, endless=True)
        self.engine_version = importlib.metadata.version("onnxruntime-genai")

    def generate(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[], None]) -> list[list[int]]:
        generator = serve.greedy_generator(self._model, len(prompts[0]) + new_tokens, len(prompts), endless=True)
        generator.append_tokens(np.asarray(prompts, dtype=np.int32))
        answers = []
        for _ in range(new_tokens):
            generator.generate_next_token()
            answers.append(np.array(generator.get_next_tokens()))
            arrived()
        return [[int(token) for token in row] for row in np.stack(answers, axis=1)]
