"""vLLM in this process: what a checkpoint answers, and how two answers are compared."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.lora.request import LoRARequest

TOKENS = 16
# Differences of log probabilities: of sums in another order, and of activations rounded to eight bits in every layer.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
ROUNDED = 0.6  # of random weights whose kernels round every linear's inputs to 8 bits
# Prompts of different lengths, more than run at once, longer than what is prefilled at once, two with a common start.
PROMPTS = [[*range(5, 5 + length)] for length in (1, 3, 17, 40)] + [[*range(5, 45), 7, 9], [250, 3, 250, 3]]
LIMITS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
}


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[dict[int, float]]
    """For each token, those of the two likeliest."""


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[LLM]:
    # An engine that was refused while it started leaves its groups behind, and none of experts if it had none.
    destroy_model_parallel()
    destroy_distributed_environment()
    llm = LLM(str(folder), **({"enforce_eager": True} | LIMITS | options))
    try:
        yield llm
    finally:
        del llm
        gc.collect()  # vLLM's process groups must be gone before the next engine makes its own


def answers(
    llm: LLM, prompts: Sequence[list[int]] = PROMPTS, tokens: int = TOKENS, adapter: Path | None = None
) -> list[Answer]:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=2, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling,
        use_tqdm=False,
        lora_request=LoRARequest(adapter.name, 1, str(adapter)) if adapter else None,
    )
    return [
        Answer(
            list(output.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def ask(folder: Path, **options: Any) -> list[Answer]:
    with engine(folder, **options) as llm:
        return answers(llm)


def assert_same(dense: Sequence[Answer], packed: Sequence[Answer], tolerance: float) -> int:
    """Tokens are equal and log probabilities within `tolerance`, up to where the two likeliest are closer than that.

    Returns how many tokens were compared.
    """
    compared = 0
    assert len(dense) == len(packed)
    for want, got in zip(dense, packed, strict=True):
        for step, token in enumerate(want.tokens):
            likeliest = sorted(want.logprobs[step].values(), reverse=True)
            if got.tokens[step] != token:
                assert likeliest[0] - likeliest[1] < tolerance, f"{token} != {got.tokens[step]} at step {step}"
                break
            assert abs(want.logprobs[step][token] - got.logprobs[step][token]) < tolerance
            compared += 1
    return compared
