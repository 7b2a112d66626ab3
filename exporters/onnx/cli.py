"""`swiftprune-onnx`: check any ONNX model for 2:4 weights, pack one, and generate text with one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from exporters.cli import DtypeChoice
from exporters.console import ProgressBars, make_console, run
from exporters.onnx.check import WeightCheck, check_weights
from exporters.onnx.pack import pack_model
from exporters.onnx.tensorrt import trtexec_command
from swiftprune.config import DTYPES
from swiftprune.errors import FormatError
from swiftprune.models.ignore import DEFAULT_IGNORE, compile_ignore

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="ONNX models with 2:4 weights. To prune and export a language model: [b]swiftprune-export --target onnx[/].",
)
Model = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Any ONNX model; its external data beside it.")]
Ignore = Annotated[str, typer.Option(metavar="REGEX", help="Weights whose name contains a match are left out.")]


@app.command("check", no_args_is_help=True)
def check_command(
    model: Model,
    require: Annotated[
        bool,
        typer.Option(
            "--require", help="End with 6 unless every weight that --ignore leaves, and that can be, is 2:4. For CI."
        ),
    ] = False,
    ignore: Ignore = DEFAULT_IGNORE,
) -> None:
    """List which MatMul, Gemm and Conv weights are 2:4 along the axis that is summed over.

    That is what TensorRT's structured-sparsity kernels ask for. Ends with the `trtexec` command that lets it try them.
    """
    ignored = compile_ignore(ignore)
    with ProgressBars() as progress:
        checks = check_weights(model, progress=progress)
    if ignore != DEFAULT_IGNORE:
        ignored.check(weight.name for weight in checks)
    table = Table(title=str(model), title_justify="left")
    for heading in ("weight", "node", "shape", "summed axis", "zeros", "2:4"):
        table.add_column(heading, justify="right" if heading in ("shape", "summed axis", "zeros") else "left")
    for weight in checks:
        table.add_row(
            escape(weight.name),
            weight.op,
            "x".join(map(str, weight.shape)),
            str(weight.axis) if weight.shape else "",
            f"{weight.sparsity:.1%}" if weight.shape else "",
            "[green]yes[/]"
            if weight.problem is None
            else escape(f"{'cannot be' if weight.impossible else 'no'}: {weight.problem}"),
        )
    console = make_console()
    console.print(table)
    good = sum(weight.problem is None for weight in checks)
    impossible = sum(weight.impossible for weight in checks)
    cannot = f"; {impossible} cannot be, for their input channels" if impossible else ""
    console.print(f"{good} of {len(checks)} weights are 2:4{cannot}", highlight=False)
    if good:
        console.print(escape(trtexec_command(model)), highlight=False, soft_wrap=True)
    if require:
        _require(model, [weight for weight in checks if not ignored.search(weight.name)], found=len(checks))


def _require(model: Path, checks: list[WeightCheck], found: int) -> None:
    """Raises FormatError unless all of `checks` are 2:4 that can be, and there is one, if not all were left out."""
    if bad := [weight for weight in checks if weight.problem and not weight.impossible]:
        raise FormatError(f"{model}: {len(bad)} weights are not 2:4, first {bad[0].name}: {bad[0].problem}")
    if not found:
        raise FormatError(f"{model}: no weight was found that a MatMul, Gemm or Conv multiplies by: nothing is 2:4")
    if checks and all(weight.impossible for weight in checks):
        raise FormatError(f"{model}: no weight can be 2:4, first {checks[0].name}: {checks[0].problem}")


@app.command("pack", no_args_is_help=True)
def pack_command(
    model: Model,
    out: Annotated[
        Path, typer.Option(metavar="PACKED.onnx", help="Where to write; big tensors go to PACKED.onnx.data.")
    ],
    dtype: Annotated[
        DtypeChoice | None,
        typer.Option(help="Type of the packed values; must hold every weight exactly.", show_default="the weights'"),
    ] = None,
    ignore: Ignore = DEFAULT_IGNORE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --out.")] = False,
) -> None:
    """Pack the 2:4 weights of a dense ONNX model.

    Each MatMul or Gemm by one becomes the model-local function swiftprune::MatMul24. Any runtime runs the file; with
    swiftprune.serve.onnxruntime.session, ONNX Runtime runs it on the packed weights.
    """
    compile_ignore(ignore)
    with ProgressBars() as progress:
        report = pack_model(
            model,
            out,
            dtype=DTYPES[dtype.value] if dtype else None,
            ignore=ignore,
            overwrite=overwrite,
            progress=progress,
        )
    console = make_console()
    before, after = report.weight_bytes_before, report.weight_bytes_after
    console.print(
        f"packed {len(report.packed)} weights: {before / 1e6:,.1f} -> {after / 1e6:,.1f} MB "
        f"({before / after:.2f}x smaller)",
        highlight=False,
    )
    for name, reason in report.dense.items():
        console.print(f"  left dense: {escape(name)}: {escape(reason)}", highlight=False)
    console.print(
        f"written to {escape(str(out))} (opset {report.opset}, IR version {report.ir_version})", highlight=False
    )


@app.command("generate", no_args_is_help=True)
def generate_command(
    folder: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="What `swiftprune-export --target onnx` wrote, or a hub id of such."),
    ],
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "The capital of France is",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user's message, in the model's chat template.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, show_default="onnxruntime's")] = None,
) -> None:
    """Continue a prompt greedily in onnxruntime-genai, on the packed kernels."""
    import swiftprune.serve.onnxruntime

    model, linears = swiftprune.serve.onnxruntime.genai_model(folder, threads=threads)
    print("linears by backend: " + ", ".join(f"{count} {name}" for name, count in linears.items()), file=sys.stderr)
    for piece in swiftprune.serve.onnxruntime.generate(model, prompt, tokens, chat=chat):
        print(piece, end="", flush=True)
    print()


def main() -> None:
    run(app)
