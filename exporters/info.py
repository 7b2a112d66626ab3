"""`swiftprune-export info FOLDER`: what a folder holds, how good it is, and what each engine will do with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from exporters.console import make_console
from exporters.workspace import MANIFEST
from swiftprune.checkpoints.source import Checkpoint, read_json
from swiftprune.config import DTYPES, PruneSettings
from swiftprune.errors import CheckpointError, FormatError
from swiftprune.formats import bitmask, cutlass, marlin24, spec
from swiftprune.formats.spec import METADATA_SUFFIX
from swiftprune.kernels import dispatch
from swiftprune.results import Check
from swiftprune.serve.stored import check_stored
from swiftprune.stages.compressed_tensors import declared_format

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


class FolderInfo(BaseModel):
    """What `info` says of a folder."""

    folder: str
    kind: str
    """How its weights are stored, in words."""
    source: str | None
    """The checkpoint that was pruned."""
    settings: PruneSettings | None
    """How it was pruned; None of a folder that no export of ours wrote."""
    check: Check | None
    packed_linears: int
    dense_linears: dict[str, str]
    """Linears that were left dense, with the reason."""
    bytes_by_type: dict[str, int]
    """Bytes of the tensors in safetensors files, by their type; of an ONNX folder, of all files."""
    engines: dict[str, str]
    """By engine, what it does with the folder."""


_NO = "no"
_PACKS = "packs it as it is (--method keep)"
_FROM_ONNX = "other ONNX runtimes"


def describe(folder: Path) -> FolderInfo:
    """Reads config.json, swiftprune.json and headers; no weights.

    Raises CheckpointError, and FormatError for what engines would refuse.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    target = manifest.get("target")
    sizes = Counter[str]()
    zeros: str | None = None
    if target in ("onnx", "onnx-dense"):
        for path in folder.iterdir():
            if path.is_file():
                sizes[path.suffix.lstrip(".") or path.name] += path.stat().st_size
        packed = len(manifest.get("layers", [])) if target == "onnx" else 0
    else:
        checkpoint = Checkpoint(folder)
        zeros = checkpoint.declared_pattern
        for entry in checkpoint.tensors.values():
            sizes[entry.dtype_name] += entry.nbytes
        endings = (METADATA_SUFFIX, bitmask.names("")[bitmask.MASK], f".{marlin24.METADATA}")
        packed = sum(name.endswith(endings) for name in checkpoint.tensors)
    kind, engines = _use(folder, config, target, zeros)
    return FolderInfo(
        folder=str(folder),
        kind=kind,
        source=(manifest.get("source") or {}).get("name"),
        settings=PruneSettings(**manifest["settings"]) if "settings" in manifest else None,
        check=Check(**manifest["check"]) if "check" in manifest else None,
        packed_linears=packed,
        dense_linears=manifest.get("dense", {}),
        bytes_by_type=sizes,
        engines=engines,
    )


def _use(folder: Path, config: dict[str, Any], target: str | None, zeros: str | None) -> tuple[str, dict[str, str]]:
    """How weights are stored, by what config.json and the manifest declare, and what engines make of that.

    `zeros` is the pattern that dense weights are declared to have.
    """
    declared = config.get("quantization_config") or {}
    method, stored = declared.get("quant_method"), declared.get("format")
    in_vllm = "sparse, with swiftprune[vllm] installed"
    if target == "onnx":
        return "ONNX decoder, packed 2:4 weights", {
            "ONNX Runtime (swiftprune-onnx generate)": "sparse",
            _FROM_ONNX: f"{_NO}: it has operators of ONNX Runtime's own beside ours"
            if (folder / "genai_config.json").exists()  # as the model builder makes it
            else "unpack the weights as they run: right, not faster",
        }
    if target == "onnx-dense":
        return "ONNX decoder, zeros in place", {_FROM_ONNX: "dense, or sparse where they look for 2:4 (TensorRT)"}
    if method == spec.QUANT_METHOD and stored == cutlass.FORMAT:
        return "CUTLASS layout of torch.sparse", {"torch on NVIDIA GPUs": "sparse, by exporters.torch_sparse.load"}
    if method == spec.QUANT_METHOD:
        values = declared.get("values")
        spec.check_declared(stored, declared.get("version"), "swiftprune", spec.VERSIONS, values, declared.get("head"))
        check_stored(Checkpoint(folder).tensors, values, quantized_head="head" in declared)
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        if name not in DTYPES:
            raise FormatError(f"{folder / 'config.json'}: dtype {name!r} is none of {', '.join(DTYPES)}")
        backend = dispatch.linear_backend(getattr(torch, name), quantized=spec.find_quantized(str(values)))
        parts = [f"{values} values"] if values else []
        parts += [f"{head} output head and embeddings"] if (head := declared.get("head")) else []
        return ", ".join(["packed 2:4 weights", *parts]), {
            "transformers": f"sparse, with swiftprune installed and imported: backend {backend} on this CPU",
            "vLLM": f"{in_vllm}: vllm serve {folder}",
            "ONNX Runtime": f"{_NO}: export the base model with --target onnx",
        }
    if (stored_as := declared_format(declared)) and (stored_as == marlin24.FORMAT or declared.get("config_groups")):
        return f"2:4 weights as {stored_as}, quantized", {"swiftprune-export": _PACKS}
    if stored == bitmask.FORMAT or (declared.get("sparsity_config") or {}).get("format") == bitmask.FORMAT:
        return "2:4 weights as sparse-24-bitmask", {
            "vLLM up to 0.18": "sparse, as it is",
            "vLLM": in_vllm,
            "transformers": _NO,
            "swiftprune-export": _PACKS,
        }
    if method:
        return f"quantized by {method}", {"swiftprune": f"{_NO}: prune the checkpoint before it was quantized"}
    if any(name.endswith(METADATA_SUFFIX) for name in Checkpoint(folder).tensors):
        raise FormatError(f"{folder / 'config.json'}: has no quantization_config, but weights are packed")
    kind = f"dense tensors with {zeros} zeros in place" if zeros else "a dense checkpoint"
    return kind, {
        "transformers, vLLM and others": "dense",
        "swiftprune-export": _PACKS if zeros else "prunes and packs it",
    }


@app.command("info")
def info_command(
    folder: Annotated[Path, typer.Argument(help="A model folder, of swiftprune-export or any other.")],
    json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
) -> None:
    """What a model folder holds: format, method, quality, sizes, and what each engine will do with it."""
    found = describe(folder)
    if json:
        print(found.model_dump_json())
        return
    table = Table(show_header=False, box=None)
    table.add_row("folder", escape(found.folder))
    table.add_row("holds", found.kind)
    if found.settings:
        s = found.settings
        table.add_row("made from", escape(found.source or "not recorded"))
        stages = [*(["permute"] if s.permute else []), *s.refine, *([f"{s.values} values"] if s.values else [])]
        table.add_row("pruned", f"{s.pattern} by {s.method}" + (f", then {', '.join(stages)}" if stages else ""))
        table.add_row("calibrated on", escape(s.calibration))
        table.add_row("quality", _quality(found.check))
    total = sum(found.bytes_by_type.values())
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in sorted(found.bytes_by_type.items()) if size >= 5e4)
    table.add_row("MB", f"{total / 1e6:,.1f}" + (f" ({parts})" if parts else ""))
    table.add_row("packed linears", str(found.packed_linears))
    reasons = Counter(found.dense_linears.values())
    for reason, count in reasons.items():
        table.add_row("left dense", f"{count}: {escape(reason)}")
    for engine, use in found.engines.items():
        table.add_row(escape(engine), escape(use))
    make_console().print(table)


def _quality(check: Check | None) -> str:
    if check is None:
        return "not measured"
    same = f", the same likeliest token in {check.agreement:.0%}" if check.agreement is not None else ""
    return f"perplexity {check.ratio:.2f} times dense on held-back calibration text{same}"
