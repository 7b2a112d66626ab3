"""A model as people run it on CPUs today, beside the same model at 2:4: `swiftprune-bench rivals`.

Dense in transformers, in llama.cpp (16, 8 and 4 bits) and in onnxruntime-genai (4 bits), all made from one checkpoint,
and our exports of it. First each is checked and reads the same text, for its perplexity. Then all stay loaded, each in
a process of its own, and in every round each decodes the same prompt once, in an order drawn afresh, so that a slow
spell of the machine hits all alike. One sequence at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import AutoConfig

from exporters import export
from exporters.onnx.decoder import run_builder
from exporters.onnx.head import HeadName
from runtime_bench import demo_data, gguf_files, known_models, onednn, quality, results, roofline
from runtime_bench.conditions import judged, watch
from runtime_bench.engines import Job, Options, Scores, llamacpp_engine
from runtime_bench.engines.worker import Worker
from runtime_bench.machine import PACKAGES, this_machine
from runtime_bench.run import disk_bytes
from runtime_bench.statistics import spread
from runtime_bench.stored import Stored, in_table
from swiftprune.config import PruneSettings
from swiftprune.errors import SettingsError, SwiftpruneError, first_line
from swiftprune.formats.spec import Quantized
from swiftprune.models.load import context_length, read_config
from swiftprune.models.perplexity import of_loss
from swiftprune.progress import ProgressCallback, no_progress

LOSSLESS = "BF16"
FILE_TYPES = (LOSSLESS, *gguf_files.QUANTIZED)
SEQLEN = 512
WINDOWS = 8  # of each text
CHECK_TOKENS = 16
TOLERANCE = 0.5
"""In log probability: how much less likely than the likeliest a greedy token may be, when the answer is read again."""
# As good as onnxruntime-genai's builder makes it: the head is multiplied by for the last token of a prompt only.
_BUILDER = ("int4_block_size=32", "int4_accuracy_level=4", "prune_lm_head=true")
# Operators that read a row or two of a table for a token: embeddings, and positions.
_LOOKING_UP = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")


class Contestant(Stored):
    """One way to run the model."""

    name: str
    engine: str
    engine_version: str = ""
    ours: bool
    file_bytes: int = 0
    """Of what holds weights."""
    token_bytes: int = 0
    """Of the weights that a decoded token reads: all but embeddings that are not the head as well."""
    peak_memory_mb: float = 0
    """Of its process: loaded, prompt read, answered."""
    ttft_ms: list[float] = Field(default_factory=list)
    """Of every round: from the prompt to the first token."""
    tpot_ms: list[float] = Field(default_factory=list)
    """Of every round: a further token."""
    perplexity: dict[str, float] = Field(default_factory=dict)
    """By text."""
    void: str | None = None
    """Why it was not measured; None when all is well."""

    @property
    def token_ms(self) -> float:
        return statistics.median(self.tpot_ms)

    @property
    def prompt_ms(self) -> float:
        return statistics.median(self.ttft_ms)


class RivalsResult(results.Result):
    """`swiftprune-bench rivals`."""

    kind: Literal["rivals"] = "rivals"
    model: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    read_gb_per_s: list[float]
    """What this machine read from memory in every round, in turn with the contestants."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """That each contestant read for its perplexity, by text."""
    contestants: list[Contestant]

    @property
    def measured(self) -> list[Contestant]:
        """By time per token."""
        return sorted((each for each in self.contestants if each.tpot_ms), key=lambda each: each.token_ms)

    def overhead_ms(self, contestant: Contestant) -> float:
        """A token's time less the time that this machine takes to read its bytes."""
        return contestant.token_ms - contestant.token_bytes / statistics.median(self.read_gb_per_s) / 1e6

    def front(self, text: str) -> list[Contestant]:
        """Those that no faster one matches in perplexity."""
        best, chosen = math.inf, []
        for each in self.measured:
            if each.perplexity.get(text, math.inf) < best:
                best = each.perplexity[text]
                chosen.append(each)
        return chosen


@dataclass(frozen=True)
class _Entry:
    """What a contestant is made of."""

    contestant: Contestant
    path: Path
    scorer: str
    """The engine that reads a text at once."""
    options: Options


@dataclass(frozen=True)
class RivalsSettings:
    prompt_tokens: int = 512
    new_tokens: int = 32
    rounds: int = 7
    threads: int = field(default_factory=torch.get_num_threads)
    windows: int = WINDOWS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise SettingsError("--new-tokens must be 2 or more: the time between tokens is what is measured")

    def options(self, dense_linears: Literal["torch", "onednn"] = "torch") -> Options:
        longest = max(SEQLEN, self.prompt_tokens + self.new_tokens)
        return Options("bfloat16", self.threads, dense_linears, longest)


def measure(
    model: str,
    ours: Sequence[Path],
    texts: Sequence[Path],
    folder: Path,
    settings: RivalsSettings,
    *,
    progress: ProgressCallback = no_progress,
) -> RivalsResult:
    """Measures `model` (a folder, or one of `known_models.NAMES`) and the exports `ours` of it.

    Files of rivals are made under `folder` on first use; so are our exports where there are none: `--target onnx` with
    16-, 8- and 4-bit values. A contestant that cannot be made or gives wrong answers is void, with the reason.

    Raises SettingsError when one of `ours` is no export's folder.
    """
    for path in (*texts, *ours):
        if not path.exists():
            raise SettingsError(f"{path}: there is no such file or folder")
    source = Path(model) if Path(model).is_dir() else known_models.fetch(model, folder, progress)
    longest = context_length(read_config(source)) or SEQLEN
    if (needed := settings.prompt_tokens + settings.new_tokens) > longest:
        raise SettingsError(f"--prompt-tokens and --new-tokens: {needed} in all, but the model takes {longest}")
    seqlen = min(SEQLEN, longest)
    made = [*_rivals(source, folder, settings, progress), *_our_entries(source, ours, folder, settings, progress)]
    windows = {path.name: quality.windows_of(path, source, seqlen, settings.windows) for path in texts}
    _check_and_read(made, windows, settings, progress)
    read: list[float] = []
    with watch() as seen:
        _time(made, settings, read, progress)
    assert seen.result
    found = [entry.contestant for entry in made]
    noise = {f"{each.name} tpot": spread(each.tpot_ms) for each in found if each.tpot_ms}
    return RivalsResult(
        machine=this_machine((*PACKAGES, "onnxruntime", "onnxruntime-genai", "llama-cpp-python")).model_copy(
            update={"threads": settings.threads}
        ),
        conditions=judged(seen.result, noise),
        model=source.resolve().name,
        threads=settings.threads,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        read_gb_per_s=read,
        tokens={name: taken.numel() for name, taken in windows.items()},
        contestants=found,
    )


def _rivals(source: Path, folder: Path, settings: RivalsSettings, progress: ProgressCallback) -> list[_Entry]:
    """The dense ones, made from `source`."""
    name = _file_name(source)
    prepacked = onednn.takes(torch.bfloat16)
    entries = [
        _transformers_entry(
            f"transformers, dense bf16{', oneDNN' if prepacked else ''}",
            source,
            settings.options("onednn" if prepacked else "torch"),
            ours=False,
        )
    ]
    for index, file_type in enumerate(FILE_TYPES):
        progress("make llama.cpp's files", index, len(FILE_TYPES))
        entry = _Entry(
            Contestant(name=_llama_name(file_type), engine="llamacpp", ours=False),
            folder / f"{name}-{file_type}.gguf",
            "llamacpp",
            settings.options(),
        )
        try:
            llamacpp_engine.library()
            if not entry.path.exists() and file_type == LOSSLESS:
                gguf_files.write(source, entry.path)
            elif not entry.path.exists():
                gguf_files.quantize(folder / f"{name}-{LOSSLESS}.gguf", entry.path, file_type, settings.threads)
            entry.contestant.file_bytes = entry.path.stat().st_size
            entry.contestant.token_bytes = gguf_files.token_bytes(entry.path)
        except (SwiftpruneError, RuntimeError, OSError) as error:
            entry.contestant.void = str(error)
        entries.append(entry)
    progress("make llama.cpp's files", len(FILE_TYPES), len(FILE_TYPES))
    entry = _onnx_entry("onnxruntime-genai int4", folder / f"{name}-genai-int4", settings.options(), ours=False)
    try:
        if not entry.path.exists():
            aside = entry.path.with_name(f"{entry.path.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            run_builder(source, aside, "int4", *_BUILDER, progress=progress)
            aside.rename(entry.path)
        _measure_onnx(entry)
    except SwiftpruneError as error:
        entry.contestant.void = str(error)
    return [*entries, entry]


def _llama_name(file_type: str) -> str:
    return f"llama.cpp {file_type}"


_LOSSLESS_NAME = _llama_name(LOSSLESS)


def _file_name(source: Path) -> str:
    """The model's, and what tells it from others of that name."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.glob("*.safetensors"))
    told = hashlib.sha256(repr((str(source.resolve()), files)).encode()).hexdigest()
    return f"{source.resolve().name}-{told[:8]}"


def _our_entries(
    source: Path, ours: Sequence[Path], folder: Path, settings: RivalsSettings, progress: ProgressCallback
) -> list[_Entry]:
    named = [(f"ours, {path.resolve().name}", path) for path in ours] or _exports(source, folder, progress)
    entries = []
    for name, path in named:
        if not (path / "config.json").exists():
            raise SettingsError(f"--ours {path}: no config.json: not an export's folder")
        if (path / "model.onnx").exists():
            entries.append(_onnx_entry(name, path, settings.options(), ours=True))
            _measure_onnx(entries[-1])
        else:
            entries.append(_transformers_entry(name, path, settings.options(), ours=True))
    return entries


def _exports(source: Path, folder: Path, progress: ProgressCallback) -> list[tuple[str, Path]]:
    """Our exports, named, for onnxruntime-genai, calibrated where there is a text of the demo's."""
    pruning: dict[str, Any] = {"method": "swiftprune-data-free", "calibration": "none"}
    if source.name == demo_data.MODEL_NAME:
        pruning = {"method": "admm", "calibration": str(demo_data.fetch(folder, progress).calibration)}
    made = []
    kinds: tuple[tuple[Quantized | None, HeadName | None], ...] = (
        (None, None),
        ("int8", None),
        ("int4", None),
        ("int4", "int4"),
    )
    for values, head in kinds:
        stored = f"{values or 'bf16'}{' and head' if head else ''}"
        out = folder / f"{_file_name(source)}-2of4-{stored.replace(' ', '-')}-onnx"
        if not out.exists():
            settings = PruneSettings.model_validate(pruning | {"values": values} if values else pruning)
            export(source, out, settings, target="onnx", head=head, overwrite=True, progress=progress)
        made.append((f"ours, {stored} in onnxruntime-genai", out))
    return made


def _transformers_entry(name: str, folder: Path, options: Options, *, ours: bool) -> _Entry:
    matrices = roofline.Matrices.of(folder, torch.bfloat16)
    contestant = Contestant(
        name=name,
        engine="transformers",
        ours=ours,
        file_bytes=disk_bytes(folder),
        token_bytes=matrices.nbytes,
    )
    return _Entry(contestant, folder, "transformers", options)


def _onnx_entry(name: str, folder: Path, options: Options, *, ours: bool) -> _Entry:
    return _Entry(Contestant(name=name, engine="genai", ours=ours), folder, "onnxruntime", options)


def _measure_onnx(entry: _Entry) -> None:
    entry.contestant.file_bytes = disk_bytes(entry.path)
    entry.contestant.token_bytes = _onnx_token_bytes(entry.path / "model.onnx")


def _onnx_token_bytes(path: Path) -> int:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    read_whole = {name for node in graph.node if node.op_type not in _LOOKING_UP for name in node.input}
    return sum(_stored_bytes(tensor) for tensor in graph.initializer if tensor.name in read_whole)


def _stored_bytes(tensor: Any) -> int:
    import onnx

    bits = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        bits = 4
    return int(math.prod(tensor.dims)) * bits // 8


def _check_and_read(
    entries: Sequence[_Entry],
    windows: dict[str, torch.Tensor],
    settings: RivalsSettings,
    progress: ProgressCallback,
) -> None:
    """Greedy answers of each, read again at once; then its perplexity. Notes what is wrong as `void`.

    What llama.cpp answers from 16-bit weights is also read by transformers: a file of ours in the wrong order would
    make a rival look bad.
    """
    dense, *others = entries
    prompt = _prompt(_vocabulary(dense), min(64, settings.prompt_tokens), random.Random(settings.seed))
    answers: dict[str, list[int]] = {}
    for index, entry in enumerate((*others, dense)):
        each = entry.contestant
        progress("check and perplexity", index, len(entries))
        if each.void:
            continue
        try:
            with Worker(each.engine, entry.path, entry.options) as decoding:
                each.engine_version = decoding.loaded.engine_version
                answer = answers[each.name] = decoding.tokens([prompt], CHECK_TOKENS)[0]
            with Worker(entry.scorer, entry.path, entry.options) as scoring:
                each.void = _wrong(scoring.score(prompt + answer), "its own reading of the answer")
                for other in others if entry is dense else ():
                    if other.contestant.name == _LOSSLESS_NAME and not other.contestant.void:
                        found = scoring.score(prompt + answers[_LOSSLESS_NAME])
                        other.contestant.void = _wrong(found, "transformers")
                for text, taken in windows.items():
                    losses = itertools.chain.from_iterable(scoring.score(row.tolist()).loss for row in taken)
                    each.perplexity[text] = of_loss(statistics.fmean(losses))
        except (SwiftpruneError, RuntimeError) as error:
            each.void = first_line(error)
    progress("check and perplexity", len(entries), len(entries))


def _wrong(found: Scores, by: str) -> str | None:
    gap = max(found.gap[-CHECK_TOKENS:])
    return None if gap <= TOLERANCE else f"wrong answers: by {by} a token is {gap:.3g} less likely than the likeliest"


def _time(entries: Sequence[_Entry], settings: RivalsSettings, read: list[float], progress: ProgressCallback) -> None:
    """Loads all that are not void, and times them in turn. Fills `read` with the memory's rate in every round."""
    draw = random.Random(settings.seed)
    job = Job("batch", 1, settings.prompt_tokens, settings.new_tokens)
    memory = torch.empty(roofline.READ_BYTES, dtype=torch.uint8).random_()
    running = [entry for entry in entries if not entry.contestant.void]
    vocabulary = _vocabulary(entries[0])
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for index, entry in enumerate(running):
            progress("load", index, len(running))
            worker = stack.enter_context(Worker(entry.contestant.engine, entry.path, entry.options))
            worker.run(Job("batch", 1, settings.prompt_tokens, 3), [_prompt(vocabulary, job.prompt_tokens, draw)])
            workers[entry.contestant.name] = worker
        progress("load", len(running), len(running))
        for index in range(settings.rounds):
            progress("rounds", index, settings.rounds)
            prompt = _prompt(vocabulary, job.prompt_tokens, draw)
            for entry in draw.sample(running, len(running)):
                figures = workers[entry.contestant.name].run(job, [prompt]).figures
                entry.contestant.ttft_ms.append(figures["ttft"])
                entry.contestant.tpot_ms.append(figures["tpot"])
            read.append(roofline.read_gb_per_s(memory))
        progress("rounds", settings.rounds, settings.rounds)
        for entry in running:
            entry.contestant.peak_memory_mb = workers[entry.contestant.name].peak_memory_bytes() / 1e6


def _vocabulary(entry: _Entry) -> int:
    return int(AutoConfig.from_pretrained(entry.path).get_text_config().vocab_size)


def _prompt(vocabulary: int, length: int, draw: random.Random) -> list[int]:
    """Random tokens: speed does not depend on them."""
    return [draw.randrange(vocabulary) for _ in range(length)]


def markdown(result: RivalsResult) -> str:
    """All of them by time per token, how they were measured, and what they come down to."""
    texts = list(result.tokens)
    columns = [
        "a token, ms",
        "of which overhead",
        f"prompt of {result.prompt_tokens}, ms",
        "reads a token, MB",
        "file, MB",
        "peak memory, MB",
        *(f"perplexity, {in_table(text)}" for text in texts),
    ]
    lines = [f"| {in_table(result.model)} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for each in result.measured:
        row = [
            f"{each.token_ms:.2f} ({min(each.tpot_ms):.2f}-{max(each.tpot_ms):.2f})",
            f"{result.overhead_ms(each):.2f}",
            f"{each.prompt_ms:.0f}",
            f"{each.token_bytes / 1e6:.0f}",
            f"{each.file_bytes / 1e6:.0f}",
            f"{each.peak_memory_mb:.0f}",
            *(f"{each.perplexity[text]:.4g}" for text in texts),
        ]
        lines.append(f"| {in_table(each.name)} | {' | '.join(row)} |")
    rates = result.read_gb_per_s
    lines += [
        "",
        f"{result.threads} threads, one sequence at a time, medians (ranges) of {len(rates)} rounds in turn. Memory "
        f"was read at {statistics.median(rates):.0f} GB/s ({min(rates):.0f}-{max(rates):.0f}); overhead is a token's "
        "time less what reading its bytes takes at that rate.",
        "",
        *verdicts(result),
    ]
    void = {each.name: each.void for each in result.contestants if each.void}
    return "\n".join([*lines, *(f"- {in_table(name)} was not measured: {in_table(why)}" for name, why in void.items())])


def verdicts(result: RivalsResult) -> list[str]:
    """Our fastest against the fastest rival, and what is worth choosing on each text."""
    ours = [each for each in result.measured if each.ours]
    others = [each for each in result.measured if not each.ours]
    if not ours or not others:
        return []
    best, rival = ours[0], others[0]
    prompt = min(others, key=lambda each: each.prompt_ms)
    said = [
        f"A token of {in_table(best.name)} takes {best.token_ms / rival.token_ms:.2f} of the time of {rival.name}, "
        f"the fastest rival; a prompt {best.prompt_ms / prompt.prompt_ms:.2f} of that of {prompt.name}."
    ]
    for text in result.tokens:
        names = "; ".join(in_table(each.name) for each in result.front(text))
        said.append(f"Neither slower nor worse than another on {in_table(text)}: {names}.")
    return said
