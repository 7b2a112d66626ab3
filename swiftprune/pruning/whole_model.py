"""A model loaded whole, as transformers does it, where running block by block will not do: sampling and evaluating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Up to this size models run in fp32, which is faster than bf16 on CPUs without bf16 matrix units.
FP32_PARAMETERS = 1_000_000_000


def load_whole_model(folder: Path, parameter_count: int, dtype: torch.dtype | None = None) -> Any:
    """The causal LM in `folder`, in eval mode.

    In `dtype`, or without one in fp32 when it has at most FP32_PARAMETERS, else in its own type.
    """
    chosen: Any = dtype or (torch.float32 if parameter_count <= FP32_PARAMETERS else "auto")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=chosen).eval()
