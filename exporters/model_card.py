"""The README.md of an export: what the model is, how it was pruned, what that cost, and how to load and serve it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import PruneSettings, output_name
from swiftprune.errors import and_more
from swiftprune.models.load import auto_class, read_config
from swiftprune.results import Check

NAME = "README.md"
BY_SESSION = "onnx, by session"
"""The target `onnx` where onnxruntime-genai does not run the architecture."""

SERVED_BY = {
    "packed": "vllm serve {folder}",
    "onnx": 'swiftprune-onnx generate {folder} --prompt "The capital of France is"',
    BY_SESSION: 'swiftprune.serve.onnxruntime.session("{folder}/model.onnx")',
}
"""By target, what a user does with the output."""

_TRANSFORMERS = """In transformers, with swiftprune installed:

```python
import swiftprune  # registers the format
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{folder}")
```
"""
_SERVE = f"""
```console
{SERVED_BY["packed"]}
```
"""
_USE = {
    "packed": _TRANSFORMERS
    + "\nIn vLLM, with swiftprune[vllm] installed:\n"
    + _SERVE
    + "\nWithout swiftprune installed both stop with an error: they never run on wrong weights.\n",
    "dense": "Loads anywhere as the base model does. Its zeros are in place, so nothing is smaller or faster yet.\n",
    "torch": """For NVIDIA GPUs from Ampere on, in the CUTLASS layout of `torch.sparse`, with swiftprune installed:

```python
from exporters.torch_sparse import load

tensors = load("{folder}")  # dense ones, and SparseSemiStructuredTensorCUTLASS
```
""",
    "sparse24-bitmask": "For vLLM up to 0.18 as it is, and for later ones with swiftprune[vllm] installed:\n" + _SERVE,
    "onnx": f"""In ONNX Runtime, with swiftprune[onnx] installed:

```console
{SERVED_BY["onnx"]}
```
""",
    BY_SESSION: f"""In ONNX Runtime, with swiftprune[onnx] installed; any other runtime runs the file too, unpacked:

```python
import swiftprune.serve.onnxruntime

session = {SERVED_BY[BY_SESSION]}
```
""",
    "onnx-dense": "An ONNX decoder with zeros in place, for TensorRT and other ONNX runtimes.\n",
}


def model_card(
    checkpoint: Checkpoint,
    settings: PruneSettings,
    target: str,
    check: Check | None,
    *,
    pruned: int,
    dense: Mapping[str, str],
    bytes_before: int,
    bytes_after: int,
    repository: str | None = None,
) -> str:
    """The text of the card. `pruned` and `dense` are the linears that were pruned, and those left dense by reason.

    `repository` is the hub id that loaders find it under.
    """
    base = _metadata(checkpoint.folder)
    loader = auto_class(read_config(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)).__name__
    # Not where this export goes, so that its bytes do not depend on that.
    folder = repository or f"./{output_name(Path(checkpoint.name).name, settings.pattern)}"
    data = ModelCardData(
        base_model=checkpoint.name,
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        language=base.get("language"),
        library_name="onnx" if target.startswith("onnx") else "transformers",
        pipeline_tag=base.get("pipeline_tag", "text-generation"),
        tags=["swiftprune", "sparse", settings.pattern],
        base_model_relation="quantized" if target == "packed" else None,
    )
    kept = f" Left dense: {next(iter(dense))}{and_more(list(dense))}." if dense else ""
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {checkpoint.name}, {settings.pattern} sparse\n",
        (
            f"[{checkpoint.name}](https://huggingface.co/{checkpoint.name})"
            if "/" in checkpoint.name
            else checkpoint.name
        )
        + f" with {pruned} linears of its decoder pruned to {settings.pattern} by swiftprune.{kept}\n",
        "| | |\n| --- | --- |",
        f"| method | `{settings.method}`{_stages(settings)} |",
        f"| calibration | {_calibration(settings)} |",
        f"| size | {bytes_before / 1e6:,.1f} -> {bytes_after / 1e6:,.1f} MB |",
        f"| perplexity on calibration text that was held back | {_quality(check)} |",
        f"| the same likeliest next token there | {_agreement(check)} |",
        *_continuations(check),
        "\n## Use\n",
        _USE[target].replace("{folder}", folder).replace("{auto_class}", loader),
        "swiftprune is installed from its repository; a package of that name on an index may be another.",
        "`swiftprune.json` holds all settings and what pruning did to each linear.",
    ]
    return "\n".join(lines) + "\n"


def _metadata(folder: Path) -> dict[str, Any]:
    """What the base model's own card says about itself at its top; nothing where there is none that can be read."""
    try:
        found: dict[str, Any] = metadata_load(folder / NAME) or {}
    except (OSError, ValueError):
        return {}
    return found


def _stages(settings: PruneSettings) -> str:
    stages = (["permute"] if settings.permute else []) + [f"refine {stage}" for stage in settings.refine]
    stages += [f"{settings.values} values"] if settings.values else []
    return f", {', '.join(stages)}" if stages else ""


def _calibration(settings: PruneSettings) -> str:
    source = {"self": "text that the model sampled itself", "none": "none"}.get(settings.calibration)
    if settings.calibration == "none":
        return "none"
    amount = f"{settings.samples} sequences of {settings.seqlen} tokens"
    return f"{source or f'`{Path(settings.calibration).name}`'}, {amount}"


def _quality(check: Check | None) -> str:
    if check is None:
        return "not measured"
    return f"{check.ratio:.2f} times dense ({check.dense:.2f} -> {check.pruned:.2f})"


def _continuations(check: Check | None) -> list[str]:
    """What both models write, as paragraphs."""
    if check is None or not check.continuations:
        return []
    lines = ["\n## What it writes\n", "After the beginnings of texts held back, the likeliest token each time.\n"]
    for found in check.continuations:
        lines.append(f"- text: {_plain(found.text)}")
        lines += [f"  - dense: {_plain(found.dense)}", f"  - pruned: {_plain(found.pruned)}"]
    return lines


def _plain(text: str) -> str:
    """On one line, with nothing that markdown would read."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$])", r"\\\1", " ".join(text.split()))


def _agreement(check: Check | None) -> str:
    if check is None:
        return "not measured"
    return f"{check.agreement:.0%}; divergence {check.divergence:.2f} nats a token"
