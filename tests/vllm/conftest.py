"""vLLM runs in an environment of its own (make test-vllm); elsewhere these tests are not collected."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

from exporters import Target, export
from swiftprune import unpack
from swiftprune.config import PruneSettings
from swiftprune.formats.spec import Packed24, Quantized
from tests import models

if TYPE_CHECKING:
    from tests.vllm.engine import Answer

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# In this process, on all cores, without the network. vLLM reads them when it is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

# vLLM's attention for CPUs takes heads from 32 on; two key-value heads can be shared out to two devices.
_SIZE = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 64}

Checkpoints = Callable[[str, Target], Path]
Answers = Callable[[str, str], "list[Answer]"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes the pruned checkpoint of that architecture and target on first use; tests must not write to it."""
    root = tmp_path_factory.mktemp("vllm")

    def get(name: str, target: Target) -> Path:
        source, out = root / name, root / f"{name}-{target}"
        if not source.exists():
            config = models.SUPPORTED[name]
            models.write_model(source, type(config)(**config.to_dict() | _SIZE))
        if not out.exists():
            export(source, out, PruneSettings(calibration="none"), target=target)
        return out

    return get


@pytest.fixture(scope="session")
def quantized(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Quantized], Path]:
    """The checkpoint packed with quantized values; beside it, under `dense`, the same weights stored dense."""
    root = tmp_path_factory.mktemp("quantized")

    @functools.cache
    def get(values: Quantized) -> Path:
        source = checkpoints("llama-gqa-tied", "dense").parent / "llama-gqa-tied"
        out, dense = root / values, root / values / "dense"
        export(source, out, PruneSettings(calibration="none", values=values))
        dense.mkdir()
        stored = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
        weights = {name.removesuffix("_meta") for name in stored if name.endswith("_meta")}
        tensors = {
            name: unpack(Packed24(tensor, stored[f"{name}_meta"], stored[f"{name}_scale"]))
            if name in weights
            else tensor.float() * stored[f"{name}_scale"].float()
            if f"{name}_scale" in stored  # the embeddings, which are the head too
            else tensor
            for name, tensor in stored.items()
            if not name.endswith(("_meta", "_scale"))
        }
        save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        del config["quantization_config"]
        (dense / "config.json").write_text(json.dumps(config))
        for file in source.glob("tokenizer*"):
            shutil.copy(file, dense)
        return out

    return get


@pytest.fixture
def hub_id(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The id of a packed checkpoint that is in the cache of the hub, as if it had been downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--tiny-2of4"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoints("llama-gqa-tied", "packed"), repository / "snapshots" / ("0" * 40))
    return Path("owner/tiny-2of4")


@pytest.fixture(scope="session")
def dense_answers(checkpoints: Checkpoints) -> Answers:
    """What vLLM answers with the pruned weights of that architecture stored dense, in a dtype: asked once."""
    from tests.vllm.engine import ask

    @functools.cache
    def get(name: str, dtype: str) -> list[Answer]:
        # Both first: vLLM changes transformers' own classes when it runs GPT-NeoX through them.
        dense, _ = checkpoints(name, "dense"), checkpoints(name, "packed")
        return ask(dense, dtype=dtype)

    return get


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the plugin logs. A filter hears it, as vLLM takes all handlers away when it sets up logging."""
    lines: list[str] = []

    def listen(record: logging.LogRecord) -> bool:
        lines.append(f"{record.levelname} {record.getMessage()}")
        return True

    logger = logging.getLogger("vllm.swiftprune")
    logger.addFilter(listen)
    yield lines
    logger.removeFilter(listen)
