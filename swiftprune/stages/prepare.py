"""What is refused, left out or said before any work: settings against the model, the machine and the weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swiftprune.calibration.sampling import conversation_start
from swiftprune.calibration.text import has_conversations
from swiftprune.calibration.text_files import COMPRESSED, ROWS
from swiftprune.checkpoints.source import Checkpoint
from swiftprune.config import DTYPES, PruneSettings
from swiftprune.errors import CheckpointError, SettingsError, TextError
from swiftprune.formats import spec
from swiftprune.methods.mask import first_violation
from swiftprune.methods.scores import KEEP, Method
from swiftprune.methods.statistics import Needs
from swiftprune.models.architectures import fused_sets
from swiftprune.models.load import context_length
from swiftprune.models.plan import Targets
from swiftprune.progress import Notify
from swiftprune.stages import distill, memory, permute
from swiftprune.stages.compressed_tensors import StoredWeights
from swiftprune.stages.keep import violations

if TYPE_CHECKING:
    from swiftprune.stages.context import Run


def with_keep(
    checkpoint: Checkpoint, settings: PruneSettings, notify: Notify, stored: StoredWeights | None
) -> PruneSettings:
    """Weights that have the pattern already are kept: those that are said to where no method was asked for.

    Those that are `stored` so, and in another form than an engine's, are never pruned anew.
    """
    if stored:
        return _only_kept(checkpoint, settings, notify, stored)
    chosen = settings.method and "method" not in settings.from_preset
    if chosen or settings.mask or checkpoint.declared_pattern != settings.pattern:
        return settings
    notify(
        f"The checkpoint says that its weights are {settings.pattern} already, so --method {KEEP} leaves them as "
        "they are; to prune them anew, name another method."
    )
    return settings.model_copy(update={"method": KEEP, "permute": False})


def _only_kept(checkpoint: Checkpoint, settings: PruneSettings, notify: Notify, stored: StoredWeights) -> PruneSettings:
    """Raises SettingsError for what changes weights, or leaves it out where a preset asks for it."""
    for option, field, asked in (
        (f"--method {settings.method}", "method", settings.method not in ("", KEEP)),
        (f"--format {settings.pattern}", "pattern", settings.pattern != spec.FORMAT),
        ("--mask", "mask", settings.mask),
        ("--permute", "permute", settings.permute),
        ("--refine", "refine", settings.refine),
        ("--sparsity auto", "max_perplexity_ratio", settings.max_perplexity_ratio),
    ):
        if asked and field not in settings.from_preset:
            raise SettingsError(
                f"{option}: the weights of {checkpoint.folder} are {stored.format} and can only be kept; export them "
                "with --target dense, and prune what that writes"
            )
    dropped = " The quantization of activations is left out." if stored.quantizes_activations else ""
    notify(f"The weights of the checkpoint are {stored.format}: --method {KEEP} takes them with their masks.{dropped}")
    left_out = _without_distill(settings) if settings.refine else {}
    return settings.model_copy(update={"method": KEEP, "permute": False} | left_out)


def decide_values(run: Run, stored: StoredWeights) -> None:
    """Sets `values` where those of the checkpoint can be kept in 8 bits, and says why they cannot."""
    if not run.keeps_values:
        return
    linears = [linear for block in run.targets.blocks for linear in block.linears]
    reason = None
    for index, linear in enumerate(linears):
        run.progress("check values", index, len(linears))
        if reason := stored.reason_against_8_bits(linear.tensor):
            break
    run.progress("check values", len(linears), len(linears))
    run.keeps_values = reason is None
    if run.keeps_values:
        run.settings = run.settings.model_copy(update={"values": "int8"})
        run.notify("Values and scales stay as they are, in 8 bits.")
    elif run.settings.values is None:
        dtype = str(run.stored_dtype(linear)).removeprefix("torch.")
        run.notify(
            f"Weights are written in {dtype}: 8-bit values with one bfloat16 scale a row do not hold {linear.name} "
            f"exactly, since {reason}. --values int8 rounds them."
        )


def with_what_can_be_had(model: nn.Module, settings: PruneSettings, notify: Notify) -> PruneSettings:
    """Settings without those stages of a preset that the architecture does not allow; others are refused."""
    changes: dict[str, Any] = {}
    if settings.permute:
        try:
            permute.check_supported(model)
        except SettingsError as error:
            _leave_out("permute", settings, error, notify)
            changes["permute"] = False
    if "distill" in settings.refine:
        try:
            distill.check_supported(model)
        except SettingsError as error:
            _leave_out("refine", settings, error, notify)
            changes |= _without_distill(settings)
    return settings.model_copy(update=changes)


def with_conversations(run: Run) -> PruneSettings:
    """Settings with the number of conversations decided: where none was given, a quarter as many as there is text."""
    s, checkpoint = run.settings, run.checkpoint
    if s.conversations is not None:
        return s if _can_be_sampled(checkpoint, s, run.notify) else s.model_copy(update={"conversations": 0})
    count = 0
    if s.calibration not in ("none", "self") and run.targets.head and s.samples >= 4 and has_conversations(checkpoint):
        count = _that_can_be_had(s.samples // 4, run)
    return s.model_copy(update={"conversations": count})


def _can_be_sampled(checkpoint: Checkpoint, settings: PruneSettings, notify: Notify) -> bool:
    """Whether the conversations that were asked for can be had; those of a preset are left out where they cannot."""
    if not settings.conversations:
        return True
    if not has_conversations(checkpoint):
        notify("The model has no chat template, so no conversations are sampled.")
        return False
    try:
        conversation_start(checkpoint, settings.seqlen)
    except SettingsError as error:
        _leave_out("conversations", settings, error, notify)
        return False
    return True


def _that_can_be_had(count: int, run: Run) -> int:
    """`count`, or 0, and why is said, where the template or the memory does not allow conversations."""
    try:
        conversation_start(run.checkpoint, run.settings.seqlen)
    except SettingsError as error:
        run.notify(f"No conversations are sampled: {error}.")
        return 0
    needed, free = 4 * run.checkpoint.parameter_count, memory.available_bytes(run.compute)
    if needed > free:
        run.notify(
            f"No conversations are sampled: that needs the whole model, {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free, so a chat model may forget its format."
        )
        return 0
    run.notify(
        f"The model has a chat template: it samples {count} conversations to calibrate on beside the text, so "
        "that it can still hold them (--conversations 0 leaves them out)."
    )
    return count


def _leave_out(field: str, settings: PruneSettings, error: SettingsError, notify: Notify) -> None:
    if field not in settings.from_preset:
        raise error
    notify(f"Left out of --quality: {error}.")


def check_head(run: Run) -> None:
    """A checkpoint may have no output head, and then nothing that predicts tokens can be had."""
    if run.targets.head:
        return
    s = run.settings
    for needed, what in (
        (s.calibration == "self", "--calibration self"),
        (s.conversations, "--conversations"),
        ("distill" in s.refine, "--refine distill"),
        (s.max_perplexity_ratio, "--sparsity auto"),
    ):
        if needed:
            raise CheckpointError(f"{run.checkpoint.folder}: holds no output head, which {what} needs")
    run.notify("The checkpoint holds no output head; its body is pruned, and the output has none either.")


def check_dtype(run: Run) -> None:
    """The type in config.json is the one that engines multiply in, unless another is asked for."""
    config = run.checkpoint.config
    dtype = config.get("dtype", config.get("torch_dtype"))
    known = dtype is None or str(dtype).removeprefix("torch.") in ("auto", *DTYPES)
    if run.settings.dtype is None and not known:
        raise CheckpointError(
            f"{run.checkpoint.folder / 'config.json'}: its dtype is {dtype}, in which no packed weight multiplies; "
            f"choose one with --dtype: {', '.join(DTYPES)}"
        )


def check_text(run: Run) -> None:
    """Raises TextError for a calibration file that is not there, before it is looked for among data sets."""
    source = run.settings.calibration
    path = Path(source)
    looks_like_one = path.suffix.lower() in (".txt", ".md", *ROWS, *COMPRESSED) or source.startswith((".", "/", "~"))
    if source not in ("none", "self") and looks_like_one and not path.exists():
        raise TextError(
            f"--calibration {source}: no such file; give a text file or a folder of them, the id of a data set, or self"
        )


def check_length(run: Run) -> None:
    """Sequences that are longer than the model was made for would calibrate it on noise, or fail."""
    longest, s = context_length(run.model.config), run.settings
    if s.calibration != "none" and longest is not None and s.seqlen > longest:
        raise SettingsError(f"--seqlen {s.seqlen}: by its config.json the model takes {longest} tokens")


def check_ranks(run: Run) -> None:
    """Raises SettingsError for what several processes do not share out."""
    s, count = run.settings, run.ranks.count
    if count == 1:
        return
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count)), torch.cuda.device_count()
    if not run.compute.on_cpu and here > gpus:
        raise SettingsError(f"{here} processes were started here for {gpus} GPUs: start as many as there are")
    alone = {
        "--refine blocks": "blocks" in s.refine,
        "--sparsity auto": s.max_perplexity_ratio is not None,
        f"--method {KEEP}": s.method == KEEP,
    }
    for option, asked in alone.items():
        if asked:
            raise SettingsError(f"{option} runs in one process, and torchrun started {count}: leave one of them out")
    if s.calibration != "none" and s.samples < count:
        raise SettingsError(f"--samples {s.samples}: each of {count} processes needs a calibration sequence")


def note_few_tokens(run: Run) -> None:
    """Weights are solved for with (K, K) sums over tokens, which fewer than K tokens leave undetermined.

    Experts are left out: each gets its own share of tokens, and the run says where that was too little.
    """
    if run.needs not in ("gram", "drift"):
        return
    tokens = run.settings.samples * run.settings.seqlen  # conversations are among them
    linears = (linear for block in run.targets.blocks for linear in block.linears if ".experts." not in linear.name)
    widest = max(linears, key=lambda linear: run.checkpoint.tensors[linear.tensor].shape[1], default=None)
    if widest and tokens < (inputs := run.checkpoint.tensors[widest.tensor].shape[1]):
        run.notify(
            f"{tokens:,} calibration tokens are fewer than the {inputs:,} inputs of {widest.name}: what is solved for "
            "fits these tokens and little else; give more --samples or a longer --seqlen."
        )


def check_memory(run: Run) -> None:
    """Stages that need the whole model say what they need before any work, and stop where that is not there."""
    s, count = run.settings, run.checkpoint.parameter_count
    needs: dict[str, int] = {}
    if "distill" in s.refine:
        needs["--refine distill"] = distill.memory_bytes(
            count, run.pruned_count(), run.compute.dtype, quantized=run.settings.values is not None
        )
    if s.max_perplexity_ratio is not None:
        needs["--sparsity auto"] = 4 * (count + 2 * run.pruned_count())
    if not run.compute.on_cpu and s.calibration != "none":
        needs["Pruning block by block"] = block_bytes(run)
    free = memory.available_bytes(run.compute)
    if not run.ranks.is_first:
        return  # the first one has decided for all
    if run.compute.on_cpu and run.ranks.count > 1:  # they share the memory of a machine
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if run.compute.on_cpu and s.calibration != "none" and (block := block_bytes(run)) > free:
        run.notify(
            f"The largest decoder block takes about {block / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: "
            "the machine may swap, or end the run."
        )
    if not needs:
        return
    what, needed = max(needs.items(), key=lambda item: item[1])
    where = "memory" if run.compute.on_cpu else f"memory of {run.compute.device}"
    run.notify(f"{what} needs about {needed / 1e9:.1f} GB of {where}, of which {free / 1e9:.1f} GB are free.")
    if needed <= free:
        return
    error = SettingsError(
        f"{what} needs about {needed / 1e9:.1f} GB of {where}, and {free / 1e9:.1f} GB are free; "
        "leave it out, or use a machine with more"
    )
    if what == "--refine distill":
        _leave_out("refine", s, error, run.notify)
        run.settings = s.model_copy(update=_without_distill(s))
        return
    raise error


def block_bytes(run: Run) -> int:
    """About what pruning takes of a device's memory, hidden states aside: the largest of all decoder blocks.

    Its weights in float32; of every linear what calibration sums up, the Gram matrix (K, K) and, where drift is made up
    for, two more matrices; and what solving for the largest linear takes at once.
    """
    sizes = run.checkpoint.tensors
    largest = 0
    for block in run.targets.blocks:
        weights = sum(torch.Size(sizes[tensor].shape).numel() for tensor in block.tensors)
        shapes = [sizes[linear.tensor].shape for linear in block.linears]
        inputs = {(linear.name.rpartition(".")[0], sizes[linear.tensor].shape[1]) for linear in block.linears}
        statistics = solving = 0
        if run.needs in ("gram", "drift"):
            statistics = sum(cols * cols * (2 if run.needs == "drift" else 1) for _, cols in inputs)
            statistics += sum(rows * cols for rows, cols in shapes) if run.needs == "drift" else 0
            solving = max(3 * cols * cols + 6 * rows * cols for rows, cols in shapes)
        largest = max(largest, 4 * (weights + statistics + solving))
    return largest


def without_violations(run: Run) -> Targets:
    """For `keep`: linears that do not fit the pattern stay dense, with those that engines run as one with them."""
    linears = [linear for block in run.targets.blocks for linear in block.linears]
    if run.masks:
        run.masks.check(linear.tensor for linear in linears)
    if run.stored_weights:
        found = {linear.name: "stored dense" for linear in linears if not run.stored_weights.is_sparse(linear.tensor)}
    else:
        found = dict(violations(run.checkpoint, linears, run.pattern, run.masks, run.progress))
    if found and run.settings.strict:
        name, reason = next(iter(found.items()))
        raise SettingsError(f"--strict: {len(found)} of {len(linears)} linears are not, first {name}: {reason}")
    for together in fused_sets(linear.name for linear in linears):
        if bad := [name for name in together if name in found]:
            found |= {name: f"engines run it as one with {bad[0]}" for name in together if name not in found}
    if len(found) == len(linears):
        raise SettingsError(f"--method {KEEP}: no linear of the decoder can stay as it is: {_first_of(found)}")
    if found:
        run.notify(f"{len(found)} of {len(linears)} linears stay dense, first {_first_of(found)}.")
    blocks = [
        dataclasses.replace(block, linears=[linear for linear in block.linears if linear.name not in found])
        for block in run.targets.blocks
    ]
    return dataclasses.replace(run.targets, blocks=blocks, dense=run.targets.dense | found)


def note_sparse_weights(run: Run) -> None:
    """To prune what is sparse already is allowed, but hardly ever what is wanted."""
    if not run.pattern.structured:
        return
    first = next(linear for block in run.targets.blocks for linear in block.linears)
    weight = run.checkpoint.read([first.tensor])[first.tensor]
    if weight.any() and first_violation(weight, run.pattern.kept, run.pattern.group) is None:
        run.notify(
            f"{first.name} is {run.pattern.name} already: if all are, --method {KEEP} packs them as they are, "
            "without calibration."
        )


def needs(settings: PruneSettings, method: Method) -> Needs:
    """What calibration must collect, for the method and for refining."""
    collected: Needs = "drift" if "weights" in settings.refine else method.needs
    if settings.values and settings.calibration != "none" and collected != "drift":
        collected = "gram"
    # In one pass inputs are those of the dense model, so there is no drift.
    return "gram" if collected == "drift" and settings.one_pass else collected


def _without_distill(settings: PruneSettings) -> dict[str, Any]:
    """The fields of `settings` that leaving distillation out changes."""
    rest = tuple(stage for stage in settings.refine if stage != "distill")
    return {"refine": rest, "minutes": None, "steps": None}


def _first_of(reasons: Mapping[str, str]) -> str:
    return next(f"{name}: {reason}" for name, reason in reasons.items())
