"""`swiftprune-bench`: measurements, each printed as a markdown table and written as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markdown import Markdown

from exporters.cli import ProgressBars, run
from runtime_bench import (
    decode,
    demo,
    demo_data,
    known_models,
    layers,
    methods,
    plots,
    pruning,
    synthetic,
    vllm_serving,
)
from swiftprune.errors import SettingsError
from swiftprune.pruning.score import METHODS, find_method

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Folder = Annotated[
    Path, typer.Option(help="Where the demo model and texts are kept; made when missing (93 MB download).")
]
Result = Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")]
DEMO_FOLDER = Path("build/demo")
_T = TypeVar("_T")


@app.callback()
def bench() -> None:
    """Measure what pruning costs and what it gains, on this machine."""


@app.command("demo")
def demo_command(folder: Folder = DEMO_FOLDER, method: str = "swiftprune") -> None:
    """Prune and pack SmolLM2-135M-Instruct, and show what was gained and what was lost."""
    find_method(method)
    with ProgressBars(Console(stderr=True)) as progress:
        result = demo.run(folder, method, progress)
    demo.show(result, Console())


@app.command("demo-data")
def demo_data_command(folder: Folder = DEMO_FOLDER) -> None:
    """Fetch the demo model and texts only."""
    with ProgressBars(Console(stderr=True)) as progress:
        data = demo_data.fetch(folder, progress)
    print(data.model, data.calibration, data.held_out, sep="\n")


@app.command("synthetic")
def synthetic_command(
    shape: Annotated[str, typer.Argument(help=f"One of: {', '.join(synthetic.SHAPES)}.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
) -> None:
    """Write a sharded bf16 checkpoint of a real shape with random weights."""
    print(synthetic.write(shape, out))


@app.command("prune")
def prune_command(
    folder: Folder = DEMO_FOLDER,
    kernels_only: Annotated[bool, typer.Option("--kernels-only", help="Leave out the whole-model comparison.")] = False,
    out: Result = None,
) -> None:
    """Mask time: native kernels against memcpy, topk, sort, and SparseGPT's on a whole model."""
    with ProgressBars(Console(stderr=True)) as progress:
        data = None if kernels_only else demo_data.fetch(folder, progress)
        result = pruning.measure_all(data, progress)
    _finish(result, pruning.markdown(result), out)


@app.command("methods")
def methods_command(
    folder: Folder = DEMO_FOLDER,
    method: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Calibration seeds 0..N-1 for each method.")] = 1,
    samples: int = 32,
    seqlen: int = 512,
    pattern: Annotated[str, typer.Option(help="2:4, or unstructured:0.5, say.")] = "2:4",
    out: Result = None,
) -> None:
    """Quality: held-out perplexity and seconds of each pruning method on the demo model."""
    names = method or list(METHODS)
    for name in names:
        find_method(name)
    with ProgressBars(Console(stderr=True)) as progress:
        data = demo_data.fetch(folder, progress)
        result = methods.compare(
            data, names, list(range(seeds)), samples=samples, seqlen=seqlen, pattern=pattern, progress=progress
        )
    _finish(result, methods.markdown(result), out)


@app.command("layers")
def layers_command(
    models: Annotated[list[str] | None, typer.Argument(help=f"Of: {', '.join(layers.SHAPES)}. Default: all.")] = None,
    m: Annotated[str, typer.Option("--m", help="Numbers of tokens.")] = ",".join(map(str, layers.TOKENS)),
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    dtype: Annotated[str, typer.Option(help=f"Of: {', '.join(layers.DTYPES)}.")] = "bf16",
    backend: Annotated[str | None, typer.Option(help="A backend of Linear24. Default: the fastest here.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="What each combination may take, about.")] = (
        layers.SECONDS_PER_CELL
    ),
    out: Result = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the speedups into this PNG (needs matplotlib).")] = None,
) -> None:
    """Single layers: 2:4 kernels against the better of torch's and oneDNN's dense ones, on real shapes.

    For example: swiftprune-bench layers llama-3-8b --m 1,8,512 --plot speedup.png
    """
    shapes = list(dict.fromkeys(shape for name in models or layers.SHAPES for shape in _known(name, layers.SHAPES)))
    dtypes = dtype.split(",")
    for name in dtypes:
        _known(name, layers.DTYPES)
    with ProgressBars(Console(stderr=True)) as progress:
        result = layers.measure(
            shapes, tokens=_numbers(m, "--m"), threads=_numbers(threads, "--threads"), dtypes=dtypes,
            backend=backend, seconds=seconds, progress=progress,
        )  # fmt: skip
    _finish(result, layers.markdown(result), out)
    if plot:
        plots.layers(result, plot)


@app.command("decode")
def decode_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A packed checkpoint's folder, or one of these, made first: " + ", ".join(known_models.NAMES)
        ),
    ],
    folder: Folder = DEMO_FOLDER,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    new_tokens: Annotated[int, typer.Option(min=3)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side, after one to warm up.")] = 5,
    out: Result = None,
) -> None:
    """Tokens per second in transformers: a packed model beside the same one with dense weights."""
    with ProgressBars(Console(stderr=True)) as progress:
        packed = decode.find(model, folder, progress)
        result = decode.measure(packed, threads=threads, new_tokens=new_tokens, rounds=rounds, progress=progress)
    _finish(result, decode.markdown(result), out)


@app.command("vllm")
def vllm_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's folder, not pruned, or one of these, made first: " + ", ".join(known_models.NAMES)
        ),
    ],
    folder: Folder = DEMO_FOLDER,
    command: Annotated[
        list[str] | None, typer.Option(help=f"Of vLLM's: {', '.join(vllm_serving.COMMANDS)}. Repeat for several.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Numbers of requests at a time.")] = "1,8",
    input_len: Annotated[int, typer.Option(min=1)] = 64,
    output_len: Annotated[int, typer.Option(min=2)] = 48,
    pairs: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 5,
    out: Result = None,
) -> None:
    """vLLM: a packed model beside the same weights stored dense, measured by vLLM's own bench commands.

    The model is pruned by magnitude for this: speed does not depend on which weights are kept.
    """
    commands = [
        _known(name, {name: name for name in vllm_serving.COMMANDS}) for name in command or vllm_serving.COMMANDS
    ]
    with ProgressBars(Console(stderr=True)) as progress:
        result = vllm_serving.measure(
            vllm_serving.find(model, folder, progress), folder / "vllm-logs", commands=commands,
            concurrency=_numbers(concurrency, "--concurrency"), input_len=input_len, output_len=output_len, pairs=pairs,
            progress=progress,
        )  # fmt: skip
    _finish(result, vllm_serving.markdown(result), out)


def _known(name: str, table: dict[str, _T]) -> _T:
    if name not in table:
        raise SettingsError(f"unknown: {name!r}; known: {', '.join(table)}")
    return table[name]


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise SettingsError(f"{option} takes positive numbers with commas between them, 1,8,512 say, not {text!r}")
    return numbers


def _finish(result: BaseModel, table: str, out: Path | None) -> None:
    console = Console()
    if console.is_terminal:
        console.print(Markdown(table))
    else:
        print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(result.model_dump_json(indent=1) + "\n")


def main() -> None:
    run(app)
