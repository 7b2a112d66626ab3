"""Hugging Face transformers: `generate`, greedy, with its own cache."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from runtime_bench import onednn
from runtime_bench.engines import Options, Scores, scores
from swiftprune.kernels.dispatch import DENSE
from swiftprune.models.load import load_whole_model


def load(folder: Path, options: Options) -> TransformersModel:
    return TransformersModel(folder, options)


class TransformersModel:
    """See `worker.Model`."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.engine_version = importlib.metadata.version("transformers")
        dtype: torch.dtype = getattr(torch, options.dtype)
        self._model = load_whole_model(folder, dtype=dtype).to(options.device)
        self._model.generation_config.eos_token_id = None  # every answer is as long as asked for
        linears = [module for module in self._model.modules() if isinstance(module, nn.Linear)]
        self.linears = dict(Counter(getattr(module, "backend", DENSE) for module in linears))
        if options.dense_linears == "onednn":
            for name, module in list(self._model.named_modules()):
                if type(module) is nn.Linear:
                    self._model.set_submodule(name, _Prepacked(module))

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int, arrived: Callable[[], None]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self._model.device)
        answer = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=_Clock(arrived),
        )
        rows: list[list[int]] = answer[:, ids.shape[1] :].tolist()
        return rows

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> Scores:
        ids = torch.tensor([tokens], device=self._model.device)
        return scores(self._model(input_ids=ids, use_cache=False).logits[0].cpu(), tokens)


class _Prepacked(nn.Module):
    """A dense linear in oneDNN's own layout for one token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = onednn.prepack(linear.weight, tokens=1)
        self.bias = linear.bias
        self.in_features = linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.weight, self.bias)


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Calls back for each token but the prompt, which generate puts first."""

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived = arrived
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._arrived()
        self._prompt_seen = True

    def end(self) -> None:
        pass
