"""Packed mixtures of experts in vLLM answer as the same weights stored dense do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import DeepseekV3Config, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from exporters import Target, export
from swiftprune.config import PruneSettings
from swiftprune.errors import FormatError
from tests import models
from tests.vllm.engine import PROMPTS, ROUNDED, TOKENS, TOLERANCE, ask, assert_same

_SIZE = models.SMALL | {"hidden_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_SIZE | {"intermediate_size": 128}, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(**_SIZE, **models.QWEN_EXPERTS, moe_intermediate_size=64, mlp_only_layers=[0]),
    "deepseek-v3": DeepseekV3Config(
        **_SIZE | {"num_key_value_heads": 4},
        **models.DEEPSEEK_EXPERTS,
        moe_intermediate_size=64,
        kv_lora_rank=512,  # the one size that vLLM's attention on CPUs has
        qk_rope_head_dim=64,
        v_head_dim=32,
        topk_method="noaux_tc",  # which the model's own config.json says, and vLLM reads
        scoring_func="sigmoid",
    ),
}
Exported = Callable[[str, Target, PruneSettings], Path]
NONE = PruneSettings(calibration="none")
INT8 = PruneSettings(calibration="none", values="int8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("experts")

    def get(name: str, target: Target, settings: PruneSettings = NONE) -> Path:
        source = root / name
        if not source.exists():
            models.write_model(source, CONFIGS[name])
        out = root / f"{name}-{target}-{settings.values}-{len(settings.ignore)}"
        if not out.exists():
            export(source, out, settings, target=target)
        return out

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_of_the_dense_model(name: str, exported: Exported, log: list[str]) -> None:
    dense = ask(exported(name, "dense", NONE), dtype="float32")
    packed = ask(exported(name, "packed", NONE), dtype="float32")
    assert assert_same(dense, packed, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS
    assert len(log) == 1


def test_compiled_and_on_two_devices_with_values_in_8_bits(exported: Exported) -> None:
    folder = exported("qwen3-moe", "packed", INT8)
    compiled = ask(folder, dtype="bfloat16", enforce_eager=False)
    shared = ask(folder, dtype="bfloat16", tensor_parallel_size=2)
    assert assert_same(compiled, shared, ROUNDED) >= len(PROMPTS) * TOKENS // 4


def test_experts_that_stay_dense(exported: Exported) -> None:
    some = NONE.model_copy(update={"ignore": r"lm_head|experts\.1\.w2"})
    with pytest.raises(FormatError, match=r"experts: vLLM runs all experts as one layer, but 1 of their 12 linears"):
        ask(exported("mixtral", "packed", some))
    none = NONE.model_copy(update={"ignore": r"lm_head|experts\."})
    packed = ask(exported("mixtral", "packed", none), dtype="float32")
    dense = ask(exported("mixtral", "dense", none), dtype="float32")
    assert assert_same(dense, packed, TOLERANCE["float32"]) == len(PROMPTS) * TOKENS
