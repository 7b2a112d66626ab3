"""`swiftprune-export`: prune a checkpoint and write it in a form that engines load."""

from __future__ import annotations

import enum
import sys
from collections import defaultdict
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporters import start
from exporters.console import ProgressBars, make_console, run, signals_as_keyboard_interrupt
from swiftprune.calibration.text_files import DEFAULT_COLUMN
from swiftprune.config import QUALITIES, PruneSettings, make_settings, output_name
from swiftprune.errors import InterruptedByUserError, SettingsError, and_more
from swiftprune.methods.scores import METHODS
from swiftprune.models.ignore import DEFAULT_IGNORE

if TYPE_CHECKING:
    from exporters.checkpoint import ExportReport

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


class TargetChoice(enum.StrEnum):
    PACKED = "packed"
    DENSE = "dense"
    TORCH = "torch"
    SPARSE24_BITMASK = "sparse24-bitmask"
    ONNX = "onnx"
    ONNX_DENSE = "onnx-dense"


class ValuesChoice(enum.StrEnum):
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"


class HeadChoice(enum.StrEnum):
    INT8 = "int8"
    INT4 = "int4"
    KEEP = "keep"


class DtypeChoice(enum.StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class QualityChoice(enum.StrEnum):
    FAST = "fast"
    BALANCED = "balanced"
    BEST = "best"


class SparsityChoice(enum.StrEnum):
    FULL = "full"
    AUTO = "auto"


class ComputeChoice(enum.StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


DEFAULT_RATIO = 1.5
_DEFAULTS = PruneSettings()
_QUALITY_HELP = "; ".join(f"[b]{name}[/]: {quality.summary}" for name, quality in QUALITIES.items())
_QUALITY_HELP += "."
_METHOD_HELP, _ABLATION_HELP = (
    "\n\n".join(f"[b]{name}[/]: {method.summary}" for name, method in METHODS.items() if method.ablation is ablation)
    for ablation in (False, True)
)
_METHOD_HELP += f"\n\nAblations of the paper's metric:\n\n{_ABLATION_HELP}"
# Groups of options in --help, behind those that most runs need.
_MASKS = "Which weights go"
_DATA = "Calibration"
_REFINING = "Stages around the mask (--quality sets them)"
_FILES = "Source and output"

_EPILOG = """
[b]Examples[/]

  swiftprune-export ./my-model --out ./my-model-2of4 [dim]# prune to 2:4 on text the model samples itself, and pack[/]

  swiftprune-export ./my-model --calibration train.txt --evaluate test.txt [dim]# on your own text, and measured[/]

  swiftprune-export ./my-model --calibration train.txt --quality balanced [dim]# also trained, in ten minutes[/]

  swiftprune-export ./my-model --calibration train.txt --sparsity auto --max-perplexity-ratio 1.3

  swiftprune-export ./my-model --target onnx --out ./my-model-onnx [dim]# then swiftprune-onnx generate[/]

  swiftprune-export ./my-2of4-model --method keep [dim]# pack what another tool made 2:4, as it is[/]

  swiftprune-export info ./my-model-2of4 [dim]# what a folder holds, and what engines do with it[/]

[b]Exit codes[/]  0 done, 2 wrong settings, 3 unusable checkpoint, 4 unusable text, 5 output cannot be written,
6 weights break the format (NaN, say), 130 interrupted, 1 a bug.
"""


@app.command(epilog=_EPILOG, no_args_is_help=True)
def export_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder with config.json and *.safetensors, or a hub id (owner/name)."),
    ],
    format: Annotated[
        str,
        typer.Option(
            metavar="N:M", help="What stays. Others than 2:4, and unstructured:SPARSITY, are for --target dense only."
        ),
    ] = "2:4",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to write.", show_default="./MODEL-2of4"),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="A file of plain text, .jsonl, .json or .parquet, also compressed, or a folder of them; a data set "
            "(id:config:split); [b]self[/]: text the model samples itself; or [b]none[/].",
        ),
    ] = "self",
    quality: Annotated[
        QualityChoice | None,
        typer.Option(metavar="NAME", help=_QUALITY_HELP, show_default="three minutes for a small model"),
    ] = None,
    target: Annotated[
        TargetChoice,
        typer.Option(
            metavar="NAME",
            help="[b]packed[/]: 9/16 of the bytes, for transformers and vLLM; [b]onnx[/]: the same as an ONNX file; "
            "[b]dense[/]: zeros in place, loads anywhere; [b]onnx-dense[/]: for TensorRT; [b]torch[/]: CUTLASS layout "
            "of torch.sparse; [b]sparse24-bitmask[/]: for vLLM up to 0.18.",
        ),
    ] = TargetChoice.PACKED,
    values: Annotated[
        ValuesChoice | None,
        typer.Option(
            metavar="TYPE",
            help="Of the kept weights. [b]int8[/]: 5 bits a weight in all, at next to no loss; [b]int4[/]: 3.1 bits. "
            "Both for --target packed and onnx, on CPUs. [b]bfloat16[/] is --dtype bfloat16.",
            show_default="that of --dtype",
        ),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to measure perplexity on, before and after.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted export into the same --out.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out, or an unfinished export.")] = False,
    method: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MASKS,
            help=_METHOD_HELP,
            show_default="admm; swiftprune-data-free with --calibration none; keep where MODEL says it is sparse",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_MASKS,
            metavar="FILE",
            help="Masks made elsewhere, .npz or .safetensors: for each weight a bool array, or its packed bits, as "
            "MaskLLM publishes them. Sets --method keep.",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            rich_help_panel=_MASKS,
            help="With --method keep: end with an error at a linear that is not sparse yet.",
        ),
    ] = False,
    ignore: Annotated[
        str,
        typer.Option(
            rich_help_panel=_MASKS,
            metavar="REGEX",
            help="Linears whose full name contains a match stay dense. Several with commas; after [b]re:[/] a match "
            "must begin at the start of the name, as in llm-compressor.",
        ),
    ] = DEFAULT_IGNORE,
    sparsity: Annotated[
        SparsityChoice,
        typer.Option(
            rich_help_panel=_MASKS,
            help="[b]full[/]: all linears of the decoder; [b]auto[/]: leave those dense, in the order of what they "
            "gain per byte, that it takes to stay within --max-perplexity-ratio.",
        ),
    ] = SparsityChoice.FULL,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_MASKS,
            help="With --sparsity auto: the most that perplexity on calibration text may be, over the dense model's.",
            show_default=f"{DEFAULT_RATIO}",
        ),
    ] = None,
    text_column: Annotated[
        str,
        typer.Option(
            rich_help_panel=_DATA,
            help="Where rows of JSON, Parquet and data sets have their text. Rows with `messages` instead of `text` go "
            "through the chat template.",
        ),
    ] = DEFAULT_COLUMN,
    samples: Annotated[
        int | None,
        typer.Option(rich_help_panel=_DATA, min=1, help="Calibration sequences.", show_default=f"{_DEFAULTS.samples}"),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(rich_help_panel=_DATA, min=2, help="Tokens in each of them.", show_default=f"{_DEFAULTS.seqlen}"),
    ] = None,
    conversations: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_DATA,
            min=0,
            help="Sequences more that a model with a chat template samples as conversations: a quarter of what is "
            "calibrated and trained on, so that it can still hold them.",
            show_default="a quarter of --samples beside --calibration FILE",
        ),
    ] = None,
    one_pass: Annotated[
        bool | None,
        typer.Option(
            "--one-pass/--in-turn",
            rich_help_panel=_DATA,
            help="Calibrate on the dense model, in half the time, or on the blocks pruned so far.",
            show_default="--in-turn",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            rich_help_panel=_DATA,
            help="Where calibration, solving, training and measuring compute: [b]cpu[/], [b]cuda[/], [b]cuda:N[/]. "
            "[b]auto[/]: a GPU where there is one.",
        ),
    ] = "auto",
    devices: Annotated[
        int,
        typer.Option(
            rich_help_panel=_DATA,
            min=1,
            help="So many GPUs of this machine, or processes on its CPU, share calibration, solving and distillation; "
            "of several machines torchrun starts them.",
        ),
    ] = 1,
    compute: Annotated[
        ComputeChoice,
        typer.Option(
            rich_help_panel=_DATA,
            help="Type in which calibration and training multiply. [b]auto[/]: the faster one here.",
        ),
    ] = ComputeChoice.AUTO,
    seed: Annotated[
        int, typer.Option(rich_help_panel=_DATA, min=0, help="Picks (or samples) the calibration sequences.")
    ] = 0,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            rich_help_panel=_DATA,
            help="Measure perplexity before and after on a few windows of calibration text that nothing was calibrated "
            "on: seconds.",
        ),
    ] = True,
    permute: Annotated[
        bool | None,
        typer.Option(
            "--permute/--no-permute",
            rich_help_panel=_REFINING,
            help="First reorder input channels so that important weights do not share a group of four; the model "
            "stays the same, and costs the same.",
            show_default="--no-permute",
        ),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_REFINING,
            metavar="STAGES",
            help="After the mask, any of, with commas: [b]weights[/]: least squares for the kept weights; "
            "[b]blocks[/]: train each block to give what the dense one gives; "
            "[b]distill[/]: train them to predict what the dense model does, on the calibration text.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_REFINING, help="With distill: how long the whole run may take, evaluation aside."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_REFINING, min=1, help="With distill: steps instead of minutes, which is reproducible."
        ),
    ] = None,
    head: Annotated[
        HeadChoice | None,
        typer.Option(
            rich_help_panel=_FILES,
            help="The output head and embeddings, of --target packed and onnx: [b]int8[/]: in 8 bits; [b]int4[/]: in "
            "4, at some loss (onnx only); [b]keep[/]: as they are.",
            show_default="int8 with --values, else keep",
        ),
    ] = None,
    dtype: Annotated[
        DtypeChoice | None,
        typer.Option(rich_help_panel=_FILES, help="Type of the written weights.", show_default="MODEL's"),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(rich_help_panel=_FILES, help="Branch, tag or commit of a hub id.", show_default="the newest"),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            rich_help_panel=_FILES,
            help="Let transformers run the Python code that MODEL brings along.",
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_FILES,
            metavar="OWNER/NAME",
            help="Also make the output a repository on the Hugging Face hub, with the token of `hf auth login`.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", rich_help_panel=_FILES, help="With --push-to-hub: only you can see it.")
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel=_FILES, help="Print the report as JSON on stdout, all else on stderr."),
    ] = False,
) -> None:
    """Prune a language model's checkpoint to 2:4 sparsity and write it for serving.

    Every decoder block is pruned on the outputs of the pruned blocks before it, one block in memory at a time.
    """
    if sparsity is SparsityChoice.AUTO:
        max_perplexity_ratio = DEFAULT_RATIO if max_perplexity_ratio is None else max_perplexity_ratio
    elif max_perplexity_ratio is not None:
        raise SettingsError("--max-perplexity-ratio is for --sparsity auto")
    if private and not push_to_hub:
        raise SettingsError("--private is for --push-to-hub")
    given = {
        "max_perplexity_ratio": max_perplexity_ratio,
        "method": method,
        "samples": samples,
        "seqlen": seqlen,
        "one_pass": one_pass,
        "permute": permute,
        "conversations": conversations,
        "minutes": minutes,
        "steps": steps,
        "values": values.value if values and values is not ValuesChoice.BFLOAT16 else None,
        "dtype": dtype.value if dtype else "bfloat16" if values is ValuesChoice.BFLOAT16 else None,
        "refine": tuple(filter(None, refine.split(","))) if refine is not None else None,
    }
    settings = make_settings(
        quality.value if quality else None,
        {
            "pattern": format,
            "calibration": calibration,
            "text_column": text_column,
            "seed": seed,
            "compute": compute.value,
            "device": device,
            "ignore": ignore,
            "mask": str(mask) if mask else "",
            "strict": strict,
        }
        | {name: value for name, value in given.items() if value is not None},
    )
    if devices > 1 and not start.is_one_of_several():
        start.start_several(devices)
    destination = out or Path(output_name(Path(model).resolve().name, format))
    # With transformers, which takes seconds: not for --help or a typo.
    from exporters.checkpoint import export
    from swiftprune.checkpoints.source import Checkpoint
    from swiftprune.ranks import joined
    from swiftprune.stages.run import follow

    console = make_console(stderr=json)
    try:
        alone = not start.is_one_of_several()
        with signals_as_keyboard_interrupt(alone=alone), joined() as ranks, ProgressBars() as progress:
            if not ranks.is_first:
                follow(Checkpoint.open(model, revision=revision, trust_remote_code=trust_remote_code), ranks)
                return
            if used := start.others_percent():
                progress.notify(f"Other processes use {used:.0f}% of this machine's processors: all takes longer.")
            report = export(
                model,
                destination,
                settings,
                target=target.value,
                head=head.value if head else None,
                resume=resume,
                overwrite=overwrite,
                evaluate=evaluate,
                check=check,
                progress=progress,
                notify=progress.notify,
                revision=revision,
                trust_remote_code=trust_remote_code,
                push_to_hub=push_to_hub,
                private=private,
                ranks=ranks,
            )
    except KeyboardInterrupt:
        raise InterruptedByUserError(
            "stopped; finished blocks are kept, run the same command with --resume to continue"
        ) from None
    print_report(report, console)
    if json:
        print(report.model_dump_json())


def print_report(report: ExportReport, console: Console) -> None:
    """The final tables: per kind of layer, then the whole model."""
    from exporters import model_card
    from exporters.onnx.export import CHECK_TOKENS

    kinds = defaultdict(list)
    for layer in report.layers:
        kinds[layer.kind].append(layer)
    table = Table(
        title=f"{report.settings.pattern} by {report.settings.method}",
        title_justify="left",
        caption="energy: squared weights, of dense, above 100% where kept ones make up for others; error: of outputs",
        caption_justify="left",
    )
    for heading in ("layer", "count", "shape", "zeros", "kept energy", "output error", "mask s"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for kind, layers in kinds.items():
        errors = [layer.output_error for layer in layers if layer.output_error is not None]
        table.add_row(
            kind,
            str(len(layers)),
            "x".join(map(str, layers[0].shape)),
            f"{_mean([layer.sparsity for layer in layers]):.1%}",
            f"{_mean([layer.kept_energy for layer in layers]):.1%}",
            f"{_mean(errors):.3f}" if errors else "-",
            f"{report.layer_seconds.get(kind, 0):.2f}",
        )
    console.print(table)

    whole = Table(show_header=False, box=None)
    ratio = report.linear_bytes_before / report.linear_bytes_after
    whole.add_row(
        "pruned linears",
        f"{_megabytes(report.linear_bytes_before)} -> {_megabytes(report.linear_bytes_after)} ({ratio:.2f}x smaller)",
    )
    whole.add_row("all tensors", f"{_megabytes(report.bytes_before)} -> {_megabytes(report.bytes_after)}")
    if after := report.token_bytes_after:
        ratio = report.token_bytes_before / after
        whole.add_row(
            "weights a token reads",
            f"{_megabytes(report.token_bytes_before)} -> {_megabytes(after)} ({ratio:.2f}x fewer bytes)",
        )
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in report.seconds.items() if value >= 0.05)
    whole.add_row("seconds", f"{seconds}; total {sum(report.seconds.values()):.1f}")
    if made := report.onnx:
        head = f", head and embeddings in {made.head}" if made.head != "keep" else ""
        whole.add_row("ONNX", f"opset {made.opset}, IR version {made.ir_version}, built by {made.builder}{head}")
        whole.add_row(
            "against transformers",
            f"{made.equal_tokens} of {CHECK_TOKENS} greedy tokens equal, logits within {made.max_logit_difference:.2g}"
            + (" (inputs are rounded to 8 bits, so a few may differ)" if report.settings.values else "")
            if made.max_logit_difference is not None
            else "not compared: ONNX Runtime runs no bfloat16 on CPUs",
        )
    if report.distillation:
        written = [point for point in report.distillation if point.rounded] or report.distillation
        first, last = report.distillation[0], min(written, key=lambda point: point.divergence)
        whole.add_row(
            "distilled",
            f"perplexity on held-back calibration text {first.perplexity:.2f} -> {last.perplexity:.2f} in "
            f"{report.distillation[-1].minutes:.1f} minutes, {report.distillation[-1].step} steps",
        )
    if found := report.check:
        whole.add_row(
            "on held-back text",
            f"perplexity {found.ratio:.2f} times dense ({found.dense:.2f} -> {found.pruned:.2f}), "
            f"the same likeliest token in {found.agreement:.0%} ({found.windows} windows of {found.seqlen} tokens)",
        )
    if report.perplexity_before is not None:
        value = (
            f"{worse:.2f} times dense ({report.perplexity_before:.2f} -> {report.perplexity_after:.2f}"
            if (worse := report.perplexity_ratio) is not None
            else f"dense {report.perplexity_before:.2f} (transformers does not load --target {report.target}"
        )
        whole.add_row("on the text given", f"perplexity {value}; {report.evaluation})")
        if report.agreement is not None:
            whole.add_row(
                "against dense",
                f"the same likeliest token in {report.agreement:.0%}, divergence {report.divergence:.3f} nats a token "
                f"(the first {report.compared_windows} windows)",
            )
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in report.dense_linears.items():
        reasons[reason].append(name)
    for reason, names in reasons.items():
        whole.add_row("left dense", escape(f"{names[0]}{and_more(names)}: {reason}"))
    whole.add_row("written to", escape(report.out))
    by_session = report.target == "onnx" and report.onnx is not None and not report.onnx.genai
    if command := model_card.SERVED_BY.get(model_card.BY_SESSION if by_session else report.target):
        needs = "" if find_spec("vllm") or "vllm" not in command else "   (pip install 'swiftprune[vllm]' first)"
        whole.add_row("next", escape(command.format(folder=report.out) + needs))
    if report.target == "packed" and report.source_loads:
        whole.add_row("how fast it is", escape(f"swiftprune-bench run {report.out} --baseline {report.source}"))
    if report.hub:
        whole.add_row("pushed to", escape(report.hub))
    console.print(whole)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def main() -> None:
    if sys.argv[1:2] == ["info"]:
        from exporters import info

        del sys.argv[1]
        run(info.app)
    else:
        run(_app)


def _app() -> None:
    """The app, with a word on what is almost `info`: to click that is a model, and the folder after it one too many."""
    if len(sys.argv) == 3 and get_close_matches(sys.argv[1], ["info"]) and not Path(sys.argv[1]).exists():
        raise SettingsError(f"{sys.argv[1]}: no such folder; did you mean swiftprune-export info {sys.argv[2]}?")
    app()
