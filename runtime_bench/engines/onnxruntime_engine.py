"""Greedy decoding in ONNX Runtime, the packed linears of an exported decoder on our kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import swiftprune.serve.onnxruntime
from runtime_bench.engines import Options, Scores, scores
from swiftprune.checkpoints.source import read_json
from swiftprune.errors import CheckpointError, SettingsError


def load(folder: Path, options: Options) -> OnnxModel:
    return OnnxModel(folder, options)


class OnnxModel:
    """See `worker.Model`."""

    def __init__(self, folder: Path, options: Options) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise SettingsError("--engine onnxruntime needs: pip install 'swiftprune[onnx]'") from None
        path = folder / "model.onnx"
        if not path.exists():
            raise CheckpointError(f"{path} is missing: --engine onnxruntime runs checkpoints exported to ONNX")
        self.engine_version = str(onnxruntime.__version__)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        session = swiftprune.serve.onnxruntime.session(path, settings)
        self.linears: dict[str, int] = session.linears
        genai = folder / "genai_config.json"  # of others' files, which leave the width of heads open
        width = read_json(genai)["model"]["decoder"]["head_size"] if genai.exists() else None
        self._decoder = swiftprune.serve.onnxruntime.Decoder(session, width)

    def generate(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[], None]) -> list[list[int]]:
        self._decoder.reset()
        step = np.asarray(prompts, dtype=np.int64)
        answers = []
        for _ in range(new_tokens):
            step = self._decoder.step(step)[:, -1:].argmax(axis=-1)
            answers.append(step[:, 0])
            arrived()
        return [[int(token) for token in row] for row in np.stack(answers, axis=1)]

    def score(self, tokens: list[int]) -> Scores:
        """Reads token by token: decoders give the logits of the last one only."""
        self._decoder.reset()
        row = np.asarray([tokens], dtype=np.int64)
        logits = np.concatenate([self._decoder.step(row[:, at : at + 1])[0] for at in range(len(tokens))])
        return scores(torch.from_numpy(logits), tokens)
