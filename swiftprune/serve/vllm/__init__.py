"""Packed checkpoints in vLLM: an out-of-tree plugin, found through the entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes. Nothing of vLLM is imported before that.
"""

from __future__ import annotations


def register() -> None:
    """Makes the quantization method `swiftprune` known to vLLM; calling it again changes nothing."""
    from swiftprune.serve.vllm import quantization  # noqa: F401 - registers itself
