"""Prune a checkpoint and write the result as one that engines load: packed, dense with zeros, or torch's own layout."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from exporters import hub, model_card
from exporters.onnx import head as onnx_head
from exporters.onnx.export import DecoderReport, write_decoder
from exporters.onnx.head import HeadName
from exporters.onnx.trace import require_packages
from exporters.workspace import MANIFEST, Workspace
from swiftprune.calibration.text import chat_template, load_tokenizer, start_tokens, token_windows
from swiftprune.calibration.text_files import read_text, text_files
from swiftprune.checkpoints.shards import TensorEntry, shard_entries
from swiftprune.checkpoints.source import INDEX_NAME, Checkpoint
from swiftprune.config import DTYPES, DtypeName, PruneSettings
from swiftprune.errors import CheckpointError, SettingsError
from swiftprune.formats import FORMATS, CheckpointFormat, spec
from swiftprune.formats.spec import Packed24, WeightSpec
from swiftprune.kernels import dense8, dispatch, packing
from swiftprune.kernels.linear import Linear24
from swiftprune.models.architectures import fused_sets
from swiftprune.models.distance import Distance
from swiftprune.models.experts import all_experts
from swiftprune.models.load import context_length, load_whole_model, read_config, vocabulary_size
from swiftprune.models.perplexity import dense_perplexity, perplexity
from swiftprune.models.plan import Block, Linear, Targets
from swiftprune.progress import Notify, ProgressCallback, ignore_message, no_progress
from swiftprune.ranks import Ranks
from swiftprune.results import Check, LayerResult, PrunedBlock, PrunedWeight
from swiftprune.stages import memory
from swiftprune.stages.check import check as check_result
from swiftprune.stages.context import Run
from swiftprune.stages.distill import Validation
from swiftprune.stages.run import run_stages, tell_others
from swiftprune.stages.text import check_fits

Target = Literal["packed", "dense", "torch", "sparse24-bitmask", "onnx", "onnx-dense"]
_ONNX: tuple[Target, ...] = ("onnx", "onnx-dense")
_QUANTIZED: tuple[Target, ...] = ("packed", "onnx")  # that take --values and --head
ONNX_FOLDER = "onnx"  # within the workspace, until it takes the output's place
EVALUATION_SEQLEN = 2048
_COMPARED_WINDOWS = 4  # of an evaluation: what the dense model predicts of them is kept in memory
_OUTSIDE_SHARD_BYTES = 512 << 20
_COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".vocab", ".bpe", ".spm"}
_COPIED_NAMES = {"LICENSE", "NOTICE", "LICENSE.md", "USE_POLICY.md"}
# Of other weights than those that are written, or of what was done to them: loaders would be misled.
_NOT_COPIED = {
    "config.json",
    MANIFEST,
    "params.json",
    "adapter_config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "trainer_state.json",
    "training_args.json",
    "optimizer.json",
}
_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".ggml",
    ".onnx",
    ".h5",
    ".msgpack",
    ".ot",
    ".npz",
    ".tflite",
    ".mlmodel",
    ".pdparams",
    ".engine",
    ".data",
}


class ExportReport(BaseModel):
    """What an export did. Everything but seconds and perplexity is also in the output's swiftprune.json."""

    out: str
    source: str
    """The folder of the checkpoint that was pruned."""
    source_loads: bool
    """Whether engines load it, to be compared with: not what compressed-tensors wrote 2:4."""
    settings: PruneSettings
    target: Target
    layers: list[LayerResult]
    dense_linears: dict[str, str]
    """Linears left as they were, with the reason."""
    bytes_before: int
    bytes_after: int
    linear_bytes_before: int
    """Bytes of the pruned linears alone."""
    linear_bytes_after: int
    token_bytes_before: int
    """Bytes of weights that generating one token reads; their ratio is what decoding can gain where bytes bound it."""
    token_bytes_after: int | None
    """None of the ONNX targets."""
    onnx: DecoderReport | None = None
    """Of the ONNX targets."""
    seconds: dict[str, float]
    """By stage. After --resume, of the resumed run only."""
    layer_seconds: dict[str, float]
    """By layer kind: score, select and pack."""
    fitted_samples: int | None = None
    """Calibration sequences that were used, where a preset had to take fewer to keep to its minutes."""
    distillation: list[Validation] = []
    """Perplexity over minutes, on windows of the calibration text that were held back."""
    check: Check | None = None
    """On calibration text that was held back; None where none was, or the check was left out."""
    hub: str | None = None
    """Address of the repository that the output was pushed to."""
    evaluation: str | None = None
    """On what perplexity was measured: how many windows, of how many tokens, and what they begin with."""
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    divergence: float | None = None
    """Kullback-Leibler from the dense model, in nats a token, on the first `compared_windows` of that text; None where
    there was no memory for it."""
    agreement: float | None = None
    """The share of their tokens for which both models find the same one likeliest."""
    compared_windows: int = 0

    @property
    def perplexity_ratio(self) -> float | None:
        if self.perplexity_before is None or self.perplexity_after is None:
            return None
        return self.perplexity_after / self.perplexity_before


def export(
    model: str | Path,
    out: str | Path,
    settings: PruneSettings | None = None,
    *,
    target: Target = "packed",
    head: HeadName | None = None,
    resume: bool = False,
    overwrite: bool = False,
    evaluate: str | Path | None = None,
    check: bool = True,
    progress: ProgressCallback = no_progress,
    notify: Notify = ignore_message,
    revision: str | None = None,
    trust_remote_code: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    ranks: Ranks | None = None,
) -> ExportReport:
    """Prunes `model` (local folder or hub id) and writes the result to the folder `out`.

    Targets: `packed` (the 2:4 format of swiftprune.formats.spec), `dense` (zeros in place, loads anywhere), `torch`
    (see exporters.torch_sparse), `sparse24-bitmask` (see swiftprune.formats.bitmask), `onnx` and `onnx-dense` (see
    exporters.onnx.export). The output is built in `OUT.partial` and renamed at the end; after an interruption
    `resume=True` continues it and gives the same bytes. `evaluate` names a text on which perplexity is measured before
    and after, by transformers; `check` measures it in any case, on a little calibration text that was held back.
    `head` is how --target onnx stores the output head and the embeddings: `int8`, by default with quantized values
    only, `int4` or `keep`. `notify` is told what the run will cost once a block is done. `push_to_hub` is a hub id
    (`owner/name`) that the output becomes as well. `ranks` are processes that share calibration and solving, of which
    this is the first; the others `follow` (swiftprune.stages.run). Raises the errors of swiftprune.errors.
    """
    settings = settings or PruneSettings()
    _check_target(settings.resolved(), target)
    asked_head, head = head, _head(head, settings, target)
    if push_to_hub:
        hub.check_repository(push_to_hub, overwrite=overwrite)
    checkpoint = Checkpoint.open(model, revision=revision, trust_remote_code=trust_remote_code)
    workspace = Workspace(Path(out), checkpoint.folder, resume=resume, overwrite=overwrite, notify=notify)
    with workspace:
        run = Run(
            checkpoint, settings, progress=progress, notify=notify, keeps_values=target in _QUANTIZED, ranks=ranks
        )
        settings = run.settings
        if evaluate and run.stored_weights:
            raise SettingsError(
                f"--evaluate: transformers cannot load {checkpoint.folder}, to compare with; leave the option out"
            )
        if evaluate and not run.targets.head:
            raise CheckpointError(f"{checkpoint.folder}: holds no output head, which --evaluate needs")
        _check_parts(run, target)
        _check_stored(run, target)
        if head != "keep" and (reason := _dense_head(run, target)):
            if asked_head:
                raise SettingsError(f"--head {head}: the output head stays as it is: {reason}; leave the option out")
            notify(f"The output head and the embeddings stay as they are: {reason}.")
            head = "keep"
        if target in ("packed", "sparse24-bitmask", "onnx"):
            _check_fused(run.targets)
        windows = _evaluation_windows(checkpoint, Path(evaluate), settings.text_column) if evaluate else None
        with run.clock("hash source"):
            state = _state(checkpoint, settings, target, progress) | {"head": head}
        workspace.begin(state)
        workspace.check_space(_estimate(run, target))

        run.data, run.orders = workspace.data(), workspace.orders()
        run.dense_linears, run.fitted_samples = workspace.dense_linears(), workspace.fitted_samples()
        writer = _ShardWriter(run, target, workspace, quantized_head=target == "packed" and head != "keep")
        tell_others(run)
        run_stages(run, writer)
        found = check_result(run, writer) if check else None
        with run.clock("write"):
            writer.write_outside()
            report = writer.complete(state, found, push_to_hub)
        if target in _ONNX:
            with run.clock("onnx"):
                report = writer.write_onnx(report, head, push_to_hub, progress)
        if windows is not None:
            with run.clock("evaluate"):
                found_by_evaluation = _evaluate(run, checkpoint, workspace.folder, target, windows)
            report = report.model_copy(update=found_by_evaluation)
        workspace.finish(ONNX_FOLDER if target in _ONNX else None)
        if push_to_hub:
            with run.clock("push"):
                address = hub.push(Path(out), push_to_hub, private=private)
            report = report.model_copy(update={"hub": address})
    return report.model_copy(update={"seconds": dict(run.clock.seconds), "distillation": run.validations})


def _check_target(settings: PruneSettings, target: Target) -> None:
    if target not in get_args(Target):
        raise SettingsError(f"target {target!r}: give one of {', '.join(get_args(Target))}")
    if target != "dense" and settings.pattern != spec.FORMAT:
        raise SettingsError(
            f"--target {target} stores {spec.FORMAT} only; for --format {settings.pattern} use --target dense"
        )
    if settings.values and target not in _QUANTIZED:
        raise SettingsError(f"--values {settings.values} is for --target {' and '.join(_QUANTIZED)}, not for {target}")
    if target in _ONNX:
        require_packages()


def _head(asked: HeadName | None, settings: PruneSettings, target: Target) -> HeadName:
    if asked not in (None, "keep") and target not in _QUANTIZED:
        raise SettingsError(f"--head {asked} is for --target {' and '.join(_QUANTIZED)}, not for {target}")
    if asked == "int4" and target != "onnx":
        raise SettingsError(f"--head int4 is for --target onnx, not for {target}, which has int8")
    return asked or ("int8" if target in _QUANTIZED and settings.values else "keep")


def _dense_head(run: Run, target: Target) -> str | None:
    """Why the output head and the embeddings cannot be quantized, or None where they can."""
    if target == "onnx":
        return onnx_head.unsupported_reason(run.checkpoint.folder)
    return run.targets.dense_ends if run.targets.head else "the checkpoint holds no output head"


def _check_parts(run: Run, target: Target) -> None:
    """Raises SettingsError where engines would not find weights that are stored in another way than linears'."""
    if target in _ONNX and any(all_experts(run.model)):
        raise SettingsError(f"--target {target}: no ONNX file of experts is made here; use --target packed")
    if run.checkpoint.is_split and target != "packed":
        raise SettingsError(
            f"--target {target}: the checkpoint stacks experts into one tensor, or stores weights as (in, out), and "
            "engines look for them so; use --target packed"
        )


def _check_stored(run: Run, target: Target) -> None:
    """Raises SettingsError where a target would store every linear dense."""
    linears = [linear for block in run.targets.blocks for linear in block.linears]
    reasons = [_unsupported_reason(run, linear, FORMATS.get(target)) for linear in linears]
    if all(reasons):
        hint = "; add --dtype bfloat16" if run.stored_dtype(linears[0]) == torch.float32 else ""
        raise SettingsError(f"--target {target} would store every linear dense: {reasons[0]}{hint}")


def _unsupported_reason(run: Run, linear: Linear, format: CheckpointFormat | None) -> str | None:
    """Why `format` cannot store the pruned `linear`, or None where it can; dense tensors take any."""
    rows, cols = run.checkpoint.tensors[linear.tensor].shape
    return format.unsupported_reason((rows, cols), run.stored_dtype(linear)) if format else None


def _check_fused(targets: Targets) -> None:
    packed = [linear.name for block in targets.blocks for linear in block.linears]
    for together in fused_sets([*targets.dense, *packed]):
        name, others = together[0], [other for other in together if other not in targets.dense]
        if name in targets.dense and others:
            raise SettingsError(
                f"{name} stays dense ({targets.dense[name]}), but {', '.join(sorted(others))} would be packed, and "
                "engines run them as one layer; change --ignore to name all of them or none, or use --target dense"
            )


def _state(
    checkpoint: Checkpoint, settings: PruneSettings, target: Target, progress: ProgressCallback
) -> dict[str, Any]:
    packages = ("swiftprune", "torch", "transformers", "safetensors")
    return {
        "settings": settings.model_dump(),
        "target": target,
        "inputs_sha256": {name: _sha256(path) for name, path in _inputs(checkpoint, settings).items()},
        "source": {"name": checkpoint.name, "sha256": checkpoint.fingerprint(progress)},
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _inputs(checkpoint: Checkpoint, settings: PruneSettings) -> dict[str, Path]:
    """Files other than weights that the output depends on: config.json, tokenizer, code, masks, calibration text."""
    own = [path for path in sorted(checkpoint.folder.iterdir()) if path.suffix in _COPIED_SUFFIXES]
    given = [] if settings.calibration in ("none", "self") else text_files(Path(settings.calibration))
    if settings.mask:
        given.append(Path(settings.mask))
    named = {path.name: path for path in own} | {str(path): path for path in given}
    return {name: path for name, path in named.items() if path.is_file()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _estimate(run: Run, target: Target) -> int:
    """Bytes of the output, closely enough to refuse a disk that is too small."""
    sizes = run.checkpoint.tensors
    total = run.checkpoint.nbytes
    if target in _ONNX:  # the dense ONNX file comes on top, in float32 before it is packed
        total += run.checkpoint.parameter_count * (4 + (4 if run.settings.values else 2))
    else:
        for block in run.targets.blocks:
            for linear in block.linears:
                rows, cols = sizes[linear.tensor].shape
                dtype = run.stored_dtype(linear)
                packed = WeightSpec((rows, cols), dtype, run.settings.values).nbytes
                total += (rows * cols * dtype.itemsize if target == "dense" else packed) - sizes[linear.tensor].nbytes
    if "distill" in run.settings.refine:  # weights, two moments and the best weights, kept twice while written
        total += 2 * 4 * 4 * run.pruned_count()
    return total


class _ShardWriter:
    """Turns pruned blocks into shards: one per block, then the tensors outside of blocks in shards of bounded size.

    It is the BlockStore of an export.
    """

    def __init__(self, run: Run, target: Target, workspace: Workspace, *, quantized_head: bool) -> None:
        self._quantized_head = quantized_head
        self.load_training, self.save_training = workspace.load_training, workspace.save_training
        self.keep_data = workspace.keep_data
        self.keep_orders = workspace.keep_orders
        self.keep_dense_linears = workspace.keep_dense_linears
        self.keep_fitted_samples = workspace.keep_fitted_samples
        self._run = run
        self._target = target
        # ONNX files are made from zeros in place, which 16-bit types do not hold of quantized values.
        self._format = FORMATS.get("packed" if target == "onnx" and run.settings.values else target)
        """None where zeros stay in place."""
        self._workspace = workspace
        self._blocks = run.targets.blocks
        self._outside = self._split_outside()
        self._layer_seconds: dict[str, float] = defaultdict(float)

    @property
    def _checkpoint(self) -> Checkpoint:
        return self._run.checkpoint  # another one once it is permuted

    @property
    def _dense(self) -> dict[str, str]:
        """The linears that are not packed, with the reason."""
        ratio = self._run.settings.max_perplexity_ratio
        kept = dict.fromkeys(self._run.dense_linears or (), f"kept dense for --max-perplexity-ratio {ratio}")
        return self._run.targets.dense | self._unsupported() | kept

    def _unsupported(self) -> dict[str, str]:
        """Linears that are pruned, but that the target cannot store packed."""
        linears = (linear for block in self._blocks for linear in block.linears)
        found = {linear.name: _unsupported_reason(self._run, linear, self._format) for linear in linears}
        return {name: f"pruned, stored dense: {reason}" for name, reason in found.items() if reason}

    def _split_outside(self) -> list[list[str]]:
        groups: list[list[str]] = []
        room = 0
        for name in self._run.targets.outside:
            nbytes = self._checkpoint.tensors[name].nbytes
            if not groups or nbytes > room:
                groups.append([])
                room = _OUTSIDE_SHARD_BYTES
            groups[-1].append(name)
            room -= nbytes
        return groups

    def _shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self._blocks) + len(self._outside):05d}.safetensors"

    def _block_shard(self, block: Block) -> str:
        return self._shard_name(self._blocks.index(block))

    def finished(self, block: Block) -> bool:
        return self._results(self._block_shard(block)) is not None

    def _results(self, shard: str) -> list[LayerResult] | None:
        """Of a finished shard; None when it is not finished, or was damaged since."""
        stored = self._workspace.done(shard)
        try:
            return None if stored is None else [LayerResult(**result) for result in stored]
        except (TypeError, ValidationError):
            return None

    def load(self, block: Block) -> dict[str, PrunedWeight]:
        tensors = self._workspace.read_shard(self._block_shard(block))
        return {name: self._restore(tensors, name) for name in block.tensors}

    def _restore(self, tensors: dict[str, Tensor], name: str) -> PrunedWeight:
        packed = self._format.decode(name, tensors) if self._format else None
        return tensors[name] if packed is None else packed

    def save(self, done: PrunedBlock) -> None:
        names = [name for name in done.block.tensors if name not in done.weights]
        tensors = self._unpruned(names)
        for name, weight in done.weights.items():
            tensors.update(self._store(name, weight))
        for result in done.results:
            self._layer_seconds[result.kind] += result.mask_seconds
        self._workspace.write_shard(
            self._block_shard(done.block), tensors, [result.model_dump() for result in done.results]
        )

    def _store(self, name: str, weight: PrunedWeight) -> dict[str, Tensor]:
        format = self._format
        if isinstance(weight, Packed24) and format and not format.unsupported_reason(weight.shape, weight.spec.dtype):
            return format.encode(name, weight)
        return {name: packing.unpack(weight, name)}

    def _unpruned(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors of the source, in the type that is written. Raises SettingsError where that cannot hold them."""
        tensors = self._checkpoint.read(names)
        if dtype := self._run.settings.dtype:
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    check_fits(tensor, dtype, name)
                    tensors[name] = tensor.to(DTYPES[dtype])
        return tensors

    def write_outside(self) -> None:
        for index, names in enumerate(self._outside, start=len(self._blocks)):
            shard = self._shard_name(index)
            if self._results(shard) is None:
                tensors = self._unpruned(names)
                ends = {self._run.targets.embedding, self._run.targets.head} if self._quantized_head else set()
                for name in ends & tensors.keys():
                    tensors[name], tensors[name + spec.SCALE_SUFFIX] = dense8.quantize_rows(tensors[name], name)
                self._workspace.write_shard(shard, tensors, [])

    def complete(self, state: dict[str, Any], check: Check | None, repository: str | None) -> ExportReport:
        """Makes the workspace a whole checkpoint: writes index, config and manifest, copies the tokenizer."""
        workspace, checkpoint = self._workspace, self._checkpoint
        shards = [self._shard_name(index) for index in range(len(self._blocks) + len(self._outside))]
        layers = [result for shard in shards for result in self._results(shard) or []]
        stored: dict[str, TensorEntry] = {}
        for shard in shards:
            stored.update(shard_entries(workspace.folder / shard))
        total = sum(entry.nbytes for entry in stored.values())
        weight_map = {name: entry.shard for name, entry in stored.items()}
        workspace.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
        config = self._config()
        workspace.write_json("config.json", config)
        for name in self._copied():
            workspace.copy(self._checkpoint.folder / name, name)
        workspace.write_json(
            MANIFEST,
            state
            | {
                "format_version": config.get("quantization_config", {}).get("version", spec.VERSION),
                **({"fitted_samples": fitted} if (fitted := self._run.fitted_samples) else {}),
                **({"check": check.model_dump()} if check else {}),
                "layers": [layer.model_dump() for layer in layers],
                "dense": self._dense,
            },
        )
        pruned = self._pruned()
        workspace.write_text(model_card.NAME, self._card(check, total, repository))
        linear_before = sum(checkpoint.tensors[linear.tensor].nbytes for linear in pruned)
        linear_after = sum(
            stored[name].nbytes
            for linear in pruned
            for name in {linear.tensor, *(self._format.names(linear.tensor) if self._format else ())}
            if name in stored
        )
        return ExportReport(
            out=str(workspace.out),
            source=str(checkpoint.folder),
            source_loads=self._run.stored_weights is None,
            settings=self._run.settings,
            target=self._target,
            layers=layers,
            dense_linears=self._dense,
            bytes_before=checkpoint.nbytes,
            bytes_after=total,
            linear_bytes_before=linear_before,
            linear_bytes_after=linear_after,
            token_bytes_before=self._token_bytes(checkpoint.tensors),
            token_bytes_after=self._token_bytes(stored),
            seconds={},
            layer_seconds=dict(self._layer_seconds),
            fitted_samples=self._run.fitted_samples,
            check=check,
        )

    def _card(self, check: Check | None, bytes_after: int, repository: str | None, target: str | None = None) -> str:
        return model_card.model_card(
            self._checkpoint,
            self._run.settings,
            target or self._target,
            check,
            pruned=len(self._pruned()),
            dense=self._dense,
            bytes_before=self._checkpoint.nbytes,
            bytes_after=bytes_after,
            repository=repository,
        )

    def _pruned(self) -> list[Linear]:
        kept = self._run.dense_linears or ()
        return [linear for block in self._blocks for linear in block.linears if linear.name not in kept]

    def _token_bytes(self, stored: Mapping[str, TensorEntry]) -> int:
        """Bytes of weights that generating a token reads: no towers, and embeddings only if they are the head too."""
        targets = self._run.targets
        unread = ({targets.embedding} - {targets.head}) | set(targets.towers)
        unread |= {name + spec.SCALE_SUFFIX for name in unread}
        return sum(entry.nbytes for name, entry in stored.items() if name not in unread)

    def _copied(self) -> list[str]:
        """Files of the source that come along as they are: tokenizer, generation settings, code, license.

        Those of a sub-folder do, unless it holds weights of its own.
        """
        folder = self._checkpoint.folder
        inner = [
            path
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith((".", "__")) and not _holds_weights(path)
        ]
        files = [*sorted(folder.iterdir()), *(file for path in inner for file in sorted(path.rglob("*")))]
        return [
            path.relative_to(folder).as_posix()
            for path in files
            if (path.suffix in _COPIED_SUFFIXES or path.name in _COPIED_NAMES)
            and path.is_file()
            and not path.name.endswith(".index.json")
            and (path.parent != folder or path.name not in _NOT_COPIED)
        ]

    def write_onnx(
        self, report: ExportReport, head: HeadName, repository: str | None, progress: ProgressCallback
    ) -> ExportReport:
        """Turns the whole checkpoint in the workspace into the folder ONNX_FOLDER within it."""
        workspace = self._workspace
        linears = [self._checkpoint.tensors[linear.tensor] for linear in self._pruned()]
        stored: DtypeName = next(name for name in DTYPES if DTYPES[name] == linears[0].dtype)
        out = workspace.folder / ONNX_FOLDER
        made = write_decoder(
            workspace.folder,
            out,
            packed=self._target == "onnx",
            dtype=self._run.settings.dtype or stored,
            pruned_weights=sum(torch.Size(linear.shape).numel() for linear in linears),
            head=head,
            progress=progress,
        )
        if head != made.head:
            self._run.notify("The output head stays in float32: it is no plain product with a matrix in the ONNX file.")
        config = self._config()
        if self._target == "onnx":
            declared = spec.declaration(spec.FORMAT, list(self._dense), self._run.settings.values)
            config["quantization_config"] = declared | ({"head": made.head} if made.head != "keep" else {})
        workspace.write_json(f"{ONNX_FOLDER}/config.json", config)
        by_session = self._target == "onnx" and not made.genai
        served = model_card.BY_SESSION if by_session else self._target
        workspace.write_text(
            f"{ONNX_FOLDER}/{model_card.NAME}", self._card(report.check, made.file_bytes, repository, served)
        )
        for name in (MANIFEST, *self._copied()):
            if not (out / name).exists():  # the builder copies some
                workspace.copy(workspace.folder / name, f"{ONNX_FOLDER}/{name}")
        return report.model_copy(
            update={
                "onnx": made,
                "token_bytes_after": None,
                "linear_bytes_after": made.weight_bytes,
                "bytes_after": made.file_bytes,
            }
        )

    def _config(self) -> dict[str, Any]:
        config = copy.deepcopy(self._checkpoint.config)
        config.pop("quantization_config", None)  # what only said that weights are sparse, and of which tool
        if dtype := self._run.settings.dtype:
            config["dtype"] = dtype
            _set_dtype(config, dtype)
        if self._format:
            tensor_of = self._run.targets.tensor_of  # engines know linears by the checkpoint's names
            dense = [tensor_of.get(f"{name}.weight", name).removesuffix(".weight") for name in self._dense]
            config["quantization_config"] = self._format.quantization_config(dense, self._run.settings.values)
        if self._quantized_head:
            config["quantization_config"] |= {"version": spec.HEAD_VERSION, "head": spec.QUANTIZED_HEAD}
        return config


def _holds_weights(folder: Path) -> bool:
    return any(path.suffix in _WEIGHT_SUFFIXES for path in folder.rglob("*"))


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Wherever `config`, or the one of a part of the model within it, names a type, it is `dtype`."""
    if "torch_dtype" in config or "dtype" in config:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    for part in config.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype)


def _evaluation_windows(checkpoint: Checkpoint, path: Path, column: str) -> Tensor:
    tokenizer = load_tokenizer(checkpoint)
    text = read_text(path, column=column, render=chat_template(tokenizer))
    config = read_config(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    seqlen = min(EVALUATION_SEQLEN, context_length(config) or EVALUATION_SEQLEN)
    return token_windows(text, tokenizer, seqlen, str(path))


def _evaluation_of(checkpoint: Checkpoint, windows: Tensor) -> str:
    tokenizer = load_tokenizer(checkpoint)
    start = tokenizer.decode(start_tokens(tokenizer))
    count, seqlen = windows.shape
    return f"{count} windows of {seqlen} tokens, each beginning with {start or 'text, no start token'}"


def _evaluate(run: Run, checkpoint: Checkpoint, out: Path, target: Target, windows: Tensor) -> dict[str, Any]:
    """Fields of the report: the source `checkpoint` and the one in `out`, each loaded as a user would load it.

    On a GPU packed weights are unpacked for every call: what is measured is the model, not a kernel.
    """

    def load(folder: Path) -> Any:
        model = load_whole_model(folder, checkpoint.parameter_count, trust_remote_code=checkpoint.trust_remote_code)
        for module in model.modules():
            if isinstance(module, Linear24) and not run.compute.on_cpu:
                module.use_backend(dispatch.REFERENCE)
        return model.to(run.compute.device)

    progress = run.progress
    model = load(checkpoint.folder)
    kept = Distance.nbytes(_COMPARED_WINDOWS, windows.shape[1], vocabulary_size(model))
    distance = Distance(_COMPARED_WINDOWS if kept <= memory.available_bytes(run.compute) else 0)
    before = dense_perplexity(model, windows, stage="evaluate dense", progress=progress, watch=distance.add_dense)
    found: dict[str, Any] = {"evaluation": _evaluation_of(checkpoint, windows), "perplexity_before": before}
    if target in ("torch", "sparse24-bitmask"):
        return found  # transformers loads neither here
    del model
    after = perplexity(load(out), windows, stage="evaluate pruned", progress=progress, watch=distance.add_pruned)
    found["perplexity_after"] = after
    if distance.windows:
        found |= {
            "divergence": distance.divergence,
            "agreement": distance.agreement,
            "compared_windows": distance.windows,
        }
    return found
