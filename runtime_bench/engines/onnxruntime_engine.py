"""ONNX Runtime on a decoder exported with its cache: greedy decoding with IO binding left to the runtime.

The file has inputs `input_ids` and `attention_mask` (int64, (B, T) and (B, past + T)), `position_ids` (B, T) where it
wants them, `past_key_values.I.key` and `.value` (B, heads, past, width), and outputs `logits` (B, T or 1, V),
`present.I.key` and `.value`: what onnxruntime-genai's model builder and optimum write.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime_bench.engines import Options
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.sparse24 import dispatch
from swiftprune.sparse24.format import QUANT_METHOD

_PAST, _PRESENT = "past_key_values.", "present."


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
        self.linears = _linears(path)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        self._session: Any = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        if missing := {"input_ids", "logits"} - {*self._inputs, *self._outputs}:
            raise CheckpointError(f"{path}: no {' and no '.join(sorted(missing))}: not an exported decoder")

    def generate(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[], None]) -> list[list[int]]:
        step = np.asarray(prompts, dtype=np.int64)
        cache = {
            name: np.zeros(
                [len(prompts), value.shape[1], 0, value.shape[3]], np.float16 if "16" in value.type else np.float32
            )
            for name, value in self._inputs.items()
            if name.startswith(_PAST)
        }
        answers, seen = [], 0
        for _ in range(new_tokens):
            rows, length = step.shape
            feeds = {
                "input_ids": step,
                "attention_mask": np.ones((rows, seen + length), np.int64),
                "position_ids": np.broadcast_to(np.arange(seen, seen + length), (rows, length)).astype(np.int64),
            }
            found = dict(
                zip(
                    self._outputs,
                    self._session.run(None, {k: v for k, v in feeds.items() if k in self._inputs} | cache),
                    strict=True,
                )
            )
            cache = {name: found[name.replace(_PAST, _PRESENT)] for name in cache}
            seen += length
            step = found["logits"][:, -1].argmax(axis=-1)[:, None].astype(np.int64)
            answers.append(step[:, 0])
            arrived()
        return [[int(token) for token in row] for row in np.stack(answers, axis=1)]


def _linears(path: Path) -> dict[str, int]:
    """By backend. Packed weights run on their function body unless a library with kernels is registered."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    packed = sum(node.domain == QUANT_METHOD for node in nodes)
    dense = sum(node.op_type in ("MatMul", "Gemm") for node in nodes)
    return {name: count for name, count in ((dispatch.REFERENCE, packed), ("dense", dense)) if count}
