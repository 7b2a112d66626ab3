"""The ONNX targets of `swiftprune-export`: from a pruned dense checkpoint to a decoder that ONNX engines run."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from exporters.onnx.check import check_weights
from exporters.onnx.decoder import build_decoder
from exporters.onnx.head import HeadName, quantize_head
from exporters.onnx.pack import pack_model
from exporters.onnx.packed_rows import PackedRows
from exporters.workspace import disk_errors
from swiftprune.checkpoints.source import INDEX_NAME, read_json
from swiftprune.config import DTYPES, DtypeName
from swiftprune.errors import FormatError
from swiftprune.formats import FORMATS
from swiftprune.formats.spec import Packed24
from swiftprune.kernels import packing
from swiftprune.models.load import load_whole_model, vocabulary_size
from swiftprune.progress import ProgressCallback, no_progress

CHECK_TOKENS = 16
_PROMPT_TOKENS = 24
# Of the largest logit, by the type that the graph computes in; no CPU kernels of ONNX Runtime take bfloat16.
_TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
# Where inputs are rounded layer after layer, by how the head is stored: enough to tell another model.
_ROUNDED_TOLERANCE: dict[HeadName, float] = {"keep": 0.2, "int8": 0.2, "int4": 0.6}


class DecoderReport(BaseModel):
    """What `write_decoder` wrote."""

    builder: str
    opset: int
    ir_version: int
    weight_bytes: int
    """Of the pruned linears."""
    file_bytes: int
    max_logit_difference: float | None
    """Against transformers in fp32, on random tokens and their answer; None where ONNX Runtime's CPU cannot run it."""
    equal_tokens: int | None
    """Greedy tokens equal to those of transformers, of CHECK_TOKENS; None like the difference."""
    head: HeadName = "keep"
    """How the output head and the embeddings are stored."""
    genai: bool = True
    """Whether onnxruntime-genai runs it."""


def write_decoder(
    checkpoint: Path,
    out: Path,
    *,
    packed: bool,
    dtype: DtypeName,
    pruned_weights: int,
    head: HeadName = "keep",
    progress: ProgressCallback = no_progress,
) -> DecoderReport:
    """Writes the pruned dense `checkpoint` to the new folder `out` as model.onnx and what its engines want beside it.

    `packed`: the values in `dtype`, computing in float32. Else standard operators only, all in `dtype`, zeros in place.
    `pruned_weights` is the number of weights, zeros counted, that must be 2:4 in the file. Quantized values of a packed
    `checkpoint` are written as they are. `head` is `int8` or `int4` for a head and embeddings in so many bits, where
    ONNX Runtime runs the file anyway.

    Raises FormatError when fewer are, or when the answers are not those of the checkpoint; CheckpointError when the
    architecture cannot be exported; SettingsError when a package is missing.
    """
    dense, unpacked = out.with_name("dense-onnx") if packed else out, out.with_name("unpacked")
    for folder in (dense, out, unpacked):
        shutil.rmtree(folder, ignore_errors=True)
    rows_of = None
    if "quantization_config" in read_json(checkpoint / "config.json"):
        rows_of = PackedRows(_unpacked(checkpoint, unpacked, progress))
        checkpoint = unpacked
    builder = build_decoder(
        checkpoint, dense, dtype="float32" if packed else dtype, standard_ops=not packed, progress=progress
    )
    tolerance = _TOLERANCE.get("float32" if packed else dtype)
    answers = _Answers(checkpoint)
    if rows_of and tolerance is not None:  # before anything is rounded but the weights themselves
        answers.compare(dense / "model.onnx", tolerance, progress)
    if packed:
        report = pack_model(
            dense / "model.onnx", out / "model.onnx", dtype=DTYPES[dtype], rows_of=rows_of, progress=progress
        )
        found, weight_bytes, left = (
            sum(n * k for n, k in report.packed.values()),
            report.weight_bytes_after,
            report.dense,
        )
        with disk_errors(out):
            for path in dense.iterdir():
                if not path.name.startswith("model.onnx"):
                    shutil.copyfile(path, out / path.name)
            shutil.rmtree(dense)
    else:
        checks = check_weights(out / "model.onnx", progress=progress)
        found = sum(torch.Size(weight.shape).numel() for weight in checks if weight.problem is None)
        weight_bytes = found * DTYPES[dtype].itemsize
        left = {weight.name: weight.problem for weight in checks if weight.problem}
    if found < pruned_weights:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:5])
        raise FormatError(
            f"{out}: {found:,} weights are 2:4 in the ONNX file, but {pruned_weights:,} were pruned; not 2:4: {listed}"
        )
    opset, ir_version = _versions(out / "model.onnx")
    compared: tuple[float | None, int | None] = (None, None)
    if tolerance is not None and rows_of is None:
        compared = answers.compare(out / "model.onnx", tolerance, progress)
    quantized_head = packed and head != "keep" and quantize_head(out / "model.onnx", head)
    if tolerance is not None and (rows_of or quantized_head):  # these round inputs
        compared = answers.compare(out / "model.onnx", _ROUNDED_TOLERANCE[head if quantized_head else "keep"], progress)
    shutil.rmtree(unpacked, ignore_errors=True)
    file_bytes = sum(path.stat().st_size for path in out.glob("model.onnx*"))
    return DecoderReport(
        builder=builder,
        opset=opset,
        ir_version=ir_version,
        weight_bytes=weight_bytes,
        file_bytes=file_bytes,
        max_logit_difference=compared[0],
        equal_tokens=compared[1],
        head=head if quantized_head else "keep",
        genai=(out / "genai_config.json").exists(),
    )


def _versions(path: Path) -> tuple[int, int]:
    import onnx

    model = onnx.load(path, load_external_data=False)
    return next(opset.version for opset in model.opset_import if opset.domain == ""), int(model.ir_version)


def _unpacked(checkpoint: Path, out: Path, progress: ProgressCallback) -> Iterator[Packed24]:
    """Writes the packed `checkpoint` to the folder `out` with dense weights in float32; yields the packed ones."""
    shards = sorted({str(shard) for shard in read_json(checkpoint / INDEX_NAME)["weight_map"].values()})
    placed: dict[str, str] = {}
    with disk_errors(out):
        out.mkdir()
        for path in checkpoint.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX_NAME, "config.json"):
                shutil.copyfile(path, out / path.name)
    for index, shard in enumerate(shards):
        progress("unpack", index, len(shards))
        tensors = load_file(checkpoint / shard)
        dense = dict(tensors)
        for name in tensors:
            if packed := FORMATS["packed"].decode(name, tensors):
                yield packed
                for part in FORMATS["packed"].names(name):
                    del dense[part]
                dense[name] = packing.unpack(packed, name)
        placed |= dict.fromkeys(dense, shard)
        with disk_errors(out):
            save_file(dense, out / shard, metadata={"format": "pt"})
    config = read_json(checkpoint / "config.json")
    del config["quantization_config"]
    with disk_errors(out):
        (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        (out / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    progress("unpack", len(shards), len(shards))


class _Answers:
    """Of the checkpoint in fp32, by transformers: what the file is held against."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint

    @functools.cached_property
    @torch.inference_mode()
    def _expected(self) -> tuple[torch.Tensor, list[int]]:
        """Logits (CHECK_TOKENS, V) of greedy steps, and the tokens: a random prompt and the answers."""
        model = load_whole_model(self._checkpoint, dtype=torch.float32)
        torch.manual_seed(0)
        tokens = torch.randint(0, vocabulary_size(model), (1, _PROMPT_TOKENS))
        for _ in range(CHECK_TOKENS - 1):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
        return model(tokens).logits[0, -CHECK_TOKENS:].float(), tokens[0].tolist()

    def compare(self, path: Path, tolerance: float, progress: ProgressCallback) -> tuple[float, int]:
        """The largest difference of the logits of the file at `path`, and how many greedy tokens are equal.

        Raises FormatError when logits differ by more than `tolerance` of the largest.
        """
        progress("check the answers", 0, 1)
        expected, tokens = self._expected
        found = _logits(path, tokens)
        progress("check the answers", 1, 1)
        difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= tolerance * largest:
            raise FormatError(
                f"{path.parent}: the ONNX file's logits differ from the checkpoint's by {difference:.3g} (the largest "
                f"is {largest:.3g}): it is not the same model; please report the architecture"
            )
        return difference, int((found.argmax(-1) == expected.argmax(-1)).sum())


def _logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """The same of the ONNX file: the prompt at once, then the given tokens one by one through the cache."""
    import swiftprune.serve.onnxruntime

    decoder = swiftprune.serve.onnxruntime.Decoder(swiftprune.serve.onnxruntime.session(path))
    row = np.asarray([tokens])
    steps = [decoder.step(row[:, :_PROMPT_TOKENS])]
    steps += [decoder.step(row[:, at : at + 1]) for at in range(_PROMPT_TOKENS, len(tokens))]
    return torch.stack([torch.from_numpy(logits[0, -1]).float() for logits in steps])
