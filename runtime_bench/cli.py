"""`swiftprune-bench`: measurements, each printed as a markdown table and written as JSON."""

from __future__ import annotations

import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import typer
from pydantic import BaseModel
from rich.markdown import Markdown

from exporters.console import ProgressBars, make_console
from exporters.console import run as run_app
from runtime_bench import (
    answers,
    demo,
    demo_data,
    gate,
    gpu,
    gpu_tables,
    known_models,
    layers,
    plots,
    pruning,
    quality,
    report,
    result_files,
    results,
    rivals,
    roofline,
    synthetic,
    trade_off,
)
from runtime_bench import run as end_to_end
from runtime_bench.engines import ONNX_ENGINES, VLLM_WORKLOADS, Engine, Workload
from runtime_bench.rivals import RivalsSettings
from runtime_bench.run import RunSettings
from swiftprune.errors import SettingsError, SwiftpruneError
from swiftprune.kernels.plan import TABLE_VARIABLE
from swiftprune.kernels.triton_linear import CONFIGS_VARIABLE
from swiftprune.methods.scores import find_method

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
def demo_command(
    folder: Folder = DEMO_FOLDER,
    method: Annotated[
        str, typer.Option(help="As of swiftprune-export: admm takes minutes, swiftprune seconds.")
    ] = "admm",
) -> None:
    """Prune and pack SmolLM2-135M-Instruct, and show what was gained and what was lost."""
    find_method(method)
    with ProgressBars() as progress:
        result = demo.run(folder, method, progress)
    demo.show(result, make_console())


@app.command("demo-data")
def demo_data_command(folder: Folder = DEMO_FOLDER) -> None:
    """Fetch the demo model and texts only."""
    with ProgressBars() as progress:
        data = demo_data.fetch(folder, progress)
    print(data.model, data.calibration, data.held_out, data.news, sep="\n")


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
    with ProgressBars() as progress:
        data = None if kernels_only else demo_data.fetch(folder, progress)
        result = pruning.measure_all(data, progress)
    _finish(result, pruning.markdown(result), out)


@app.command("trade-off")
def trade_off_command(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Of: {'; '.join(trade_off.RECIPES)}; or a method, or `methods` for all of them. "
            "Default: all but methods."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Calibration seeds 0..N-1 for each recipe.")] = 1,
    folder: Folder = DEMO_FOLDER,
    out: Annotated[Path, typer.Option(help="JSON file; recipes that it holds already are not run again.")] = Path(
        "trade-off.json"
    ),
    plot: Annotated[Path | None, typer.Option(help="Also draw perplexity over minutes into this PNG.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder to leave the pruned models in, each under its name.")
    ] = None,
) -> None:
    """Quality against time: perplexity of the demo model after each recipe of pruning stages, on two held-out texts."""
    names = recipe or list(trade_off.RECIPES)
    if "methods" in names:
        names = [*(name for name in names if name != "methods"), *trade_off.PRUNING_METHODS]
    with ProgressBars() as progress:
        data = demo_data.fetch(folder, progress)
        result = trade_off.measure(data, names, out, seeds=seeds, keep=keep, progress=progress)
    if plot:
        plots.trade_off(result, plot)
    _finish(result, report.markdown([result]), out)


@app.command("answers", no_args_is_help=True)
def answers_command(
    dense: Annotated[Path, typer.Argument(help="The model before pruning.")],
    sparse: Annotated[Path, typer.Argument(help="The model after, packed or not.")],
    questions: Annotated[Path | None, typer.Option(help="Text file, a question a line. Default: ten of ours.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer, at most.")] = answers.NEW_TOKENS,
) -> None:
    """Text: greedy answers of two models to plain questions, side by side."""
    asked = answers.read_questions(questions) if questions else answers.QUESTIONS
    with ProgressBars() as progress:
        given = answers.compare({"dense": dense, "sparse": sparse}, asked, new_tokens=new_tokens, progress=progress)
    _show(answers.markdown(given))


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
    with ProgressBars() as progress:
        result = layers.measure(
            shapes,
            tokens=_numbers(m, "--m"),
            threads=_numbers(threads, "--threads"),
            dtypes=dtypes,
            backend=backend,
            seconds=seconds,
            progress=progress,
        )
    _finish(result, layers.markdown(result), out)
    if plot:
        plots.layers(result, plot)


@app.command("run", no_args_is_help=True)
def run_command(
    model: Annotated[
        str,
        typer.Argument(
            help="The sparse checkpoint's folder, or one of these, made with its dense twin first: "
            + ", ".join(known_models.NAMES)
        ),
    ],
    baseline: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The dense checkpoint; not for a model made here.")
    ] = None,
    engine: Annotated[
        Literal[Engine, "torch"],
        typer.Option(help="`torch` measures the model's linears one by one, as `layers` does."),
    ] = "transformers",
    workload: Annotated[
        Workload | None,
        typer.Option(
            help="`batch`: sequences decoded together, the only one outside vLLM. For vLLM its own bench commands: "
            "`serve` (the default there), `latency`, `throughput`."
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Sequences at once: batch sizes, or requests open at a time.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts.")] = "64",
    new_tokens: Annotated[str, typer.Option(help="Lengths of answers.")] = "32",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each case on each side, in turns.")] = 10,
    starts: Annotated[int, typer.Option(min=1, help="Times that both sides are loaded anew for them.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, show_default="all cores")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Of: {', '.join(end_to_end.DTYPES)}. For ONNX Runtime, which computes in float32, the type "
            "of the packed values in a model made here."
        ),
    ] = "bfloat16",
    dense_linears: Annotated[
        Literal["torch", "onednn"],
        typer.Option(help="What runs dense linears in transformers, on both sides: F.linear or oneDNN's own layout."),
    ] = "torch",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also measure perplexity on this text, for both sides.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of 2,048 tokens of that text.", show_default="all")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Also run this task of lm-evaluation-harness. Repeat for several.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The sparse weights as transformers loads them, to check answers against."),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="What transformers runs on. [b]auto[/]: a GPU where there is one."),
    ] = "auto",
    require_gpu: Annotated[bool, typer.Option("--require-gpu", help="Stop unless the engine runs on a GPU.")] = False,
    folder: Folder = DEMO_FOLDER,
    out: Annotated[
        Path | None, typer.Option(help="Write the result to this .json file, or under a name of its own into a folder.")
    ] = None,
) -> None:
    """A sparse model beside a dense one, end to end: is it faster here, by how much, at what quality?

    Both sides take turns within one run, after the sparse side's answers have been checked. Ctrl-C keeps the rounds
    that are done.

    For example: swiftprune-bench run ./model-2of4 --baseline ./model --concurrency 1,8 --out results/
    """
    if require_gpu:
        gpu.require()
    with ProgressBars() as progress:
        if Path(model).is_dir():
            if baseline is None:
                raise SettingsError("--baseline FOLDER is missing: what the sparse model is compared with")
            if not baseline.is_dir():
                raise SettingsError(f"--baseline {baseline}: there is no such folder")
            sides, name = {"dense": baseline, "sparse": Path(model)}, ""
        else:
            made = end_to_end.find(model, folder, "transformers" if engine == "torch" else engine, dtype, progress)
            sides, name, reference = made.sides, made.name, reference or made.reference
        if engine == "torch":
            if require_gpu:
                raise SettingsError("--require-gpu: --engine torch times the layers on the CPU; see gpu-suite")
            shapes = [(layer.rows, layer.cols) for layer in roofline.linears(sides["sparse"]) if layer.packed]
            found: results.Result = layers.measure(
                list(dict.fromkeys(shapes)),
                tokens=_numbers(concurrency, "--concurrency"),
                threads=[threads or torch.get_num_threads()],
                dtypes=[layers.short(dtype)],
                progress=progress,
            )
        else:
            settings = RunSettings(
                engine=engine,
                workload=workload or (VLLM_WORKLOADS[0] if engine == "vllm" else "batch"),
                concurrency=_numbers(concurrency, "--concurrency"),
                prompt_tokens=_numbers(prompt_tokens, "--prompt-tokens"),
                new_tokens=_numbers(new_tokens, "--new-tokens"),
                rounds=rounds,
                starts=min(starts, rounds),
                threads=threads or torch.get_num_threads(),
                dense_linears=dense_linears,
                dtype="float32" if engine in ONNX_ENGINES else dtype,
                device=device,
            )
            if require_gpu and not settings.on_gpu:
                raise SettingsError(f"--require-gpu: --engine {engine} runs on the CPU here")
            # Quality first: a text or task that cannot be used should not cost an hour of timing.
            rows = [quality.perplexity(sides, text, windows=windows, progress=progress)] if text else []
            rows += quality.tasks(sides, task, limit=limit, dtype=dtype, progress=progress) if task else []
            found = end_to_end.measure(
                sides, settings, name=name, work=folder / "logs", reference=reference, progress=progress
            )
            found.quality = rows
            if not rows:
                progress.notify("quality was not measured: --text FILE adds perplexity, --task NAME a benchmark")
    if out and out.suffix != ".json":
        out = out / f"{'layers' if engine == 'torch' else engine}-{name or Path(model).resolve().name}.json"
    _finish(found, report.markdown([found]), out)


@app.command("rivals", no_args_is_help=True)
def rivals_command(
    model: Annotated[
        str, typer.Argument(help=f"The dense checkpoint's folder, or one of: {', '.join(known_models.NAMES)}.")
    ],
    ours: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="An export of it, for onnxruntime-genai (`--target onnx`) or transformers. Repeat for several. "
            "Default: made here with 16-, 8- and 4-bit values, for onnxruntime-genai.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Perplexity on this text too. Repeat for several.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens of each text.")] = rivals.WINDOWS,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of the answer.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turns.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, show_default="all cores")] = None,
    folder: Folder = DEMO_FOLDER,
    out: Result = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw perplexity over milliseconds per token into this PNG.")
    ] = None,
) -> None:
    """What people run on CPUs today, beside 2:4: llama.cpp, onnxruntime-genai, transformers, all from one checkpoint.

    Needs: pip install 'swiftprune\\[rivals]', which compiles llama.cpp. Their files are made under --folder.

    For example: swiftprune-bench rivals ./model --ours ./model-2of4 --text held-out.txt --picture rivals.png
    """
    settings = RivalsSettings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads or torch.get_num_threads(),
        windows=windows,
    )
    with ProgressBars() as progress:
        result = rivals.measure(model, ours or (), text or (), folder, settings, progress=progress)
    _finish(result, rivals.markdown(result), out)
    if picture:
        plots.rivals(result, picture)


@app.command("gpu-suite")
def gpu_suite_command(
    out: Annotated[Path, typer.Option(help="Folder for gpu-suite.json.")] = Path("results"),
    budget: Annotated[float, typer.Option(min=10, help="Seconds it may take, about.")] = 540,
) -> None:
    """Every correctness check and measurement of the GPU backends, in under ten minutes, into one file.

    The file is written anew after every measurement, so that what there is outlives the machine.
    Exit code 1 when a check failed.
    """
    gpu.require()
    file = out / "gpu-suite.json"
    with ProgressBars() as progress:
        result = gpu.suite(budget_seconds=budget, progress=progress, keep=lambda now: results.save(now, file))
    _finish(result, gpu.markdown(result), file)
    if not all(check.passed for check in result.checks):
        sys.exit(1)


@app.command("gpu-table", no_args_is_help=True)
def gpu_table_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="What gpu-suite wrote, of one GPU or several.")],
    out: Annotated[Path, typer.Option(help="The table, for SWIFTPRUNE_GPU_TABLE.")] = Path("gpu-table.json"),
) -> None:
    """Which GPU backend for which weight and how many tokens, from measurements instead of a model.

    For example: swiftprune-bench gpu-table results/gpu-suite.json && SWIFTPRUNE_GPU_TABLE=gpu-table.json vllm serve ...
    """
    found = [result_files.load(path) for path in files]
    for path, result in zip(files, found, strict=True):
        if not isinstance(result, gpu.GpuResult):
            raise SettingsError(f"{path}: is a result of another command than gpu-suite")
    results.write_text(out, gpu_tables.table_text(gpu_tables.backend_table(found)))
    typer.echo(f"wrote {out}; set {TABLE_VARIABLE}={out} to use it")


@app.command("tune-triton")
def tune_triton_command(
    out: Annotated[Path, typer.Option(help="The table, for SWIFTPRUNE_TRITON_CONFIGS.")] = Path("triton_configs.toml"),
    tokens: Annotated[str, typer.Option(help="Numbers of tokens to tune for.")] = "1,2,4,8,16,32,64,128",
) -> None:
    """How to launch the Triton kernels on this GPU: measures what is promising, for the shapes of Llama-3-8B."""
    gpu.require()
    with ProgressBars() as progress:
        tuned = gpu_tables.tune(gpu.CudaDevice(), _numbers(tokens, "--tokens"), progress=progress)
    results.write_text(out, gpu_tables.configs_text(tuned))
    typer.echo(f"wrote {out}; set {CONFIGS_VARIABLE}={out} to use it")


@app.command("gate", no_args_is_help=True)
def gate_command(
    new: Annotated[Path, typer.Argument(help="What `run` or `layers` wrote now.")],
    against: Annotated[
        list[Path], typer.Option(metavar="FILE", help="What it wrote before; repeat to take several runs together.")
    ],
    max_regression: Annotated[str, typer.Option(help="How much slower the sparse side may become.")] = "5%",
    confidence: Annotated[str, typer.Option(help="Of each verdict.")] = "95%",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="What to judge: ttft, tpot, tokens_per_s, ... Default: what tells most of decoding."),
    ] = None,
) -> None:
    """Did it become slower? For continuous integration.

    Exit code 0: no. 1: yes. 2: cannot tell: no comparable baseline, a void or unreadable result, or too much noise.
    70: a bug, which must not look like a regression.
    """
    limit, sure = _share(max_regression, "--max-regression"), _share(confidence, "--confidence")
    try:
        comparisons = gate.judge(
            result_files.load(new),
            [result_files.load(path) for path in against],
            max_regression=limit,
            confidence=sure,
            metrics=metric or (),
        )
    except SwiftpruneError:
        raise
    except Exception:
        traceback.print_exc()
        sys.exit(70)
    _show(gate.markdown(comparisons))
    sys.exit(gate.exit_code(comparisons))


@app.command("report", no_args_is_help=True)
def report_command(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES", help="Results of run, layers, rivals, gpu-suite and trade-off, or folders."),
    ],
    html: Annotated[Path | None, typer.Option(help="One page with everything, that needs no network.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The table for a pull request.")] = None,
    picture: Annotated[Path | None, typer.Option(help="A PNG of the speedups.")] = None,
) -> None:
    """Show results: a page to look at, a table to paste."""
    files = [file for path in files for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise SettingsError("report: the folder holds no results (*.json)")
    for given in filter(None, (html, markdown, picture)):
        if given.is_dir():
            raise SettingsError(f"report: {given} is a folder; name a file in it")
        if given.resolve() in {path.resolve() for path in files}:
            raise SettingsError(f"report: {given} is one of the results to show; write to another file")
    if picture and picture.suffix != ".png":
        raise SettingsError(f"report: --picture {picture}: give a file that ends in .png")
    found = [result_files.load(path) for path in files]
    table = report.markdown(found)
    if markdown:
        results.write_text(markdown, table + "\n")
    if html:
        results.write_text(html, report.html(found, [str(path) for path in files]))
    if picture:
        report.picture(found, picture)
    _show(table)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON schema of results."""
    print(result_files.schema(), end="")


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


def _share(text: str, option: str) -> float:
    """5% or 0.05."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1
    if not 0 < share < 1:
        raise SettingsError(f"{option} takes a share, 5% or 0.05 say, not {text!r}")
    return share


def _finish(result: BaseModel, table: str, out: Path | None) -> None:
    if isinstance(result, results.Result):
        result.command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    _show(table)  # before anything is written: a full disk then loses nothing
    if out:
        results.save(result, out)
        typer.echo(f"wrote {out}", err=True)
    elif isinstance(result, results.Result):
        typer.echo("not written to a file: --out keeps it for `report` and `gate`", err=True)


def _show(table: str) -> None:
    """Set as a table on a terminal, as it stands elsewhere."""
    console = make_console()
    if console.is_terminal:
        console.print(Markdown(table))
    else:
        print(table)


def main() -> None:
    run_app(app)
