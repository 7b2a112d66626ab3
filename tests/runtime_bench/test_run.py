"""End-to-end runs: real engines on tiny models, and a made-up engine for what must never be believed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from exporters import export
from runtime_bench import check, cli, engines, onednn, report, result_files, roofline, run
from runtime_bench.engines import Job, Loaded, Options, Round
from runtime_bench.engines.worker import Worker
from runtime_bench.results import Check, RunResult
from runtime_bench.run import RunSettings
from swiftprune.config import PruneSettings
from swiftprune.errors import CheckpointError, OutputError, SettingsError, TextError


@pytest.fixture(scope="session")
def sides(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny dense checkpoint, with biases, and its packed twin."""
    dense = tiny_models("qwen2")
    sparse = tmp_path_factory.mktemp("sparse") / "tiny-2of4"
    export(dense, sparse, PruneSettings(calibration="none"))
    return {"dense": dense, "sparse": sparse}


def test_transformers_end_to_end(sides: dict[str, Path], tmp_path: Path) -> None:
    command = [
        "run",
        str(sides["sparse"]),
        "--baseline",
        str(sides["dense"]),
        "--concurrency",
        "1,2",
        "--prompt-tokens",
        "8",
    ]
    command += ["--new-tokens", "4", "--rounds", "3", "--starts", "2", "--threads", "1", "--out", str(tmp_path)]
    dtype = "bfloat16" if onednn.takes(torch.bfloat16) else "float32"
    outcome = CliRunner().invoke(cli.app, [*command, "--dense-linears", "onednn", "--dtype", dtype])
    assert outcome.exit_code == 0, outcome.output
    found = result_files.load(tmp_path / "transformers-tiny-2of4.json")
    assert isinstance(found, RunResult)
    assert (found.rounds, found.starts, found.threads, found.dense_linears) == (3, 2, 1, "onednn")
    assert set(found.dense.linears) == {"dense"}
    (backend,) = set(found.sparse.linears) - {"dense"}
    assert backend != "reference"
    assert found.sparse.linears[backend] == 7 * 3
    assert found.check
    assert found.check.passed
    assert found.check.tokens == 2 * 16
    assert [(case.concurrency, case.prompt_tokens, case.new_tokens, case.void) for case in found.cases] == [
        (1, 8, 4, None),
        (2, 8, 4, None),
    ]
    for case in found.cases:
        assert [len(metric.dense) for metric in case.metrics] == [3] * 6
        assert [len(gaps) for gaps in case.itl_ms.values()] == [3 * 3] * 2
        for name in ("ttft", "tpot", "tokens_per_s"):
            metric = case.metric(name)
            assert metric
            assert set(metric.bound) == {"dense", "sparse"}
        tpot = case.metric("tpot")
        assert tpot
        assert 0 < tpot.bound["sparse"] <= tpot.bound["dense"] < min(tpot.dense)
    assert [len(metric.dense) for metric in found.load] == [2, 2, 1]
    assert all(value > 0 for metric in found.load for value in (*metric.dense, *metric.sparse))
    assert found.dense.disk_bytes > found.sparse.disk_bytes
    assert "tpot" in outcome.stdout.lower()


def test_onnxruntime_end_to_end(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files are made on the way; the packed one holds bfloat16 values and computes in float32."""
    monkeypatch.setattr(
        "runtime_bench.known_models.fetch", lambda name, folder, progress: tiny_models("llama-gqa-tied")
    )
    command = ["run", "llama-3.2-1b", "--engine", "onnxruntime", "--folder", str(tmp_path), "--out", str(tmp_path)]
    options = ["--concurrency", "1,2", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2", "--threads", "1"]
    options += ["--starts", "1"]
    outcome = CliRunner().invoke(cli.app, [*command, *options])
    assert outcome.exit_code == 0, outcome.output
    found = result_files.load(tmp_path / "onnxruntime-llama-3.2-1b-bfloat16-values.json")
    assert isinstance(found, RunResult)
    assert (found.engine, found.dtype) == ("onnxruntime", "float32")
    assert found.check
    assert found.check.passed
    # q, k and v are one matrix there, and the tied head stays dense.
    (backend,) = set(found.sparse.linears) - {"dense"}
    assert found.sparse.linears == {backend: 5 * 3, "dense": 1}
    assert found.dense.linears == {"dense": 5 * 3 + 1}
    assert [case.void for case in found.cases] == [None, None]
    assert (
        found.sparse.matrix_bytes
        == found.dense.matrix_bytes - (32 - 9) * (found.dense.matrix_bytes // 4 - 300 * 64) // 8
    )
    disk = next(metric for metric in found.load if metric.name == "disk")
    assert disk.sparse[0] < disk.dense[0]


def test_quality_is_measured_on_both_sides(sides: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    from runtime_bench import quality

    text = text_file.read_text()[:2000]
    (tmp_path / "short.txt").write_text(text)
    found = quality.perplexity(sides, tmp_path / "short.txt", seqlen=64, dtype="float32")
    assert found.lower_is_better
    assert found.dense != found.sparse
    tokens = torch.tensor(_tokenizer(sides["dense"])(text, add_special_tokens=False)["input_ids"])
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    model: Any = AutoModelForCausalLM.from_pretrained(sides["sparse"], dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    assert found.sparse == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-3)
    assert found.tokens == windows.numel()
    ends = quality.perplexity(sides, tmp_path / "short.txt", seqlen=64, windows=2)
    assert ends.sparse == pytest.approx(float(torch.tensor([losses[0], losses[-1]]).mean().exp()), rel=1e-3)
    assert ends.tokens == 128


def test_harness_tasks_offline(sides: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra `evaluation`")
    from runtime_bench import quality

    (tmp_path / "docs.json").write_text(
        "\n".join(
            json.dumps({"question": f"Sentence {i} has its", "choices": ["own", "cat"], "label": 0}) for i in range(4)
        )
    )
    (tmp_path / "own.yaml").write_text(
        f"""task: own_words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "docs.json"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    higher_is_better: true
"""
    )
    (found,) = quality.tasks(sides, ["own_words"], include=tmp_path, dtype="float32")
    assert (found.name, found.lower_is_better) == ("own_words acc", False)
    assert found.dense in (0, 0.25, 0.5, 0.75, 1)
    with pytest.raises(SettingsError, match="has no task none_such"):
        quality.tasks(sides, ["own_words", "none_such"], include=tmp_path)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class MadeUp:
    """An engine whose sparse side takes half the time, in ticks of a clock of its own."""

    calls: list[tuple[str, str, int]]

    def __init__(self, side: str, calls: list[tuple[str, str, int]], linears: dict[str, int]) -> None:
        self.side, self.calls = side, calls
        self.loaded = Loaded("7.0", 1.0, linears)

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        self.calls.append(("tokens", self.side, len(prompts)))
        return [[1] * new_tokens for _ in prompts]

    def run(self, job: Job, prompts: list[list[int]]) -> Round:
        assert [len(prompt) for prompt in prompts] == [job.prompt_tokens] * job.concurrency
        self.calls.append(("run", self.side, job.concurrency))
        step = (2.0 if self.side == "dense" else 1.0) * job.concurrency
        return engines.figures([step * (index + 3) for index in range(job.new_tokens)], job.concurrency)

    def peak_memory_bytes(self) -> int:
        return 1_000_000


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str, int]]]:
    """Puts the made-up engine in the place of all; returns what it will have been asked."""

    def install(linears: dict[str, int] | None = None, gap: float = 0.0) -> list[tuple[str, str, int]]:
        calls: list[tuple[str, str, int]] = []

        @contextmanager
        def contender(engine: str, folder: Path, options: Options, work: Path, side: str) -> Iterator[MadeUp]:
            calls.append(("load", side, 0))
            yield MadeUp(side, calls, {"dense": 1} | ({} if side == "dense" else linears or {"avx2": 21}))

        monkeypatch.setattr(run, "contender", contender)
        monkeypatch.setattr(
            check, "against_reference", lambda *_: Check(tokens=32, equal=32, largest_gap=gap, tolerance=0.25)
        )
        monkeypatch.setattr(
            roofline,
            "measure",
            lambda dtype, threads: roofline.Peaks(
                threads=threads, dtype="bfloat16", read_gb_per_s=1e-3, gemm_gflop_per_s=1e9
            ),
        )
        return calls

    return install


def test_sides_take_turns_in_fresh_order(sides: dict[str, Path], made_up: Callable[..., list[Any]]) -> None:
    calls = made_up()
    found = run.measure(sides, RunSettings(concurrency=[1, 2], new_tokens=[4], rounds=12, starts=3))
    assert [call[0] for call in calls].count("load") == 2 * 3
    assert calls.index(("tokens", "sparse", run.CHECK_PROMPTS)) < calls.index(next(c for c in calls if c[0] == "run"))
    timed = [call for call in calls if call[0] == "run"]
    assert len(timed) == 3 * (2 * 2) + 12 * 2 * 2  # warm-ups and rounds
    per_start = [timed[20 * start + 4 : 20 * (start + 1)] for start in range(3)]
    pairs = [tuple(start[i : i + 2]) for start in per_start for i in range(0, 16, 2)]
    assert all({call[1] for call in pair} == {"dense", "sparse"} for pair in pairs)  # one right after the other
    assert all(pair[0][2] == pair[1][2] for pair in pairs)  # on the same case
    assert {pair[0][1] for pair in pairs} == {"dense", "sparse"}  # neither side always first
    assert {pair[0][2] for pair in pairs[::2]} == {1, 2}  # nor the same case
    for case in found.cases:
        assert case.decoding
        assert case.decoding.speedups == [2.0] * 12
        assert case.metric("ttft").dense == [6000.0 * case.concurrency] * 12  # type: ignore[union-attr]
        assert case.metric("tokens_per_s").sparse == [4 / 6] * 12  # type: ignore[union-attr]
    headline = report.headline(found)
    assert headline.case is found.cases[0]
    assert headline.speedup
    assert headline.speedup.value == 2


def test_bounds_follow_the_bytes(sides: dict[str, Path], made_up: Callable[..., list[Any]]) -> None:
    made_up()
    found = run.measure(sides, RunSettings(rounds=1, starts=1))
    dense = sum(p.numel() for n, p in _parameters(sides["dense"]) if p.ndim == 2 and "embed" not in n)
    head = next(p.numel() for n, p in _parameters(sides["dense"]) if "embed" in n)  # tied or not, read once
    assert found.dense.matrix_bytes == 2 * (
        dense if any("lm_head" in n for n, _ in _parameters(sides["dense"])) else dense + head
    )
    packed = 9 / 8 * (found.dense.matrix_bytes / 2 - head) + 2 * head
    assert found.sparse.matrix_bytes == pytest.approx(packed, rel=0.01)
    tpot = found.cases[0].metric("tpot")
    assert tpot
    assert tpot.bound["dense"] == pytest.approx(found.dense.matrix_bytes / 1e6 * 1e3)  # at 1 MB/s, in ms


def _parameters(folder: Path) -> list[tuple[str, torch.Tensor]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return list(model.named_parameters())


@pytest.mark.parametrize(
    ("linears", "gap", "reason"),
    [
        ({"reference": 21}, 0.0, "the backend 'reference' ran"),
        ({"avx2": 20, "reference": 1}, 0.0, "the backend 'reference' ran"),
        ({"dense": 1}, 0.0, "no packed linear ran in the sparse side"),
        ({"avx2": 21}, 0.3, "wrong answers: a token was 0.3 less likely"),
    ],
)
def test_a_void_run_has_no_numbers(
    sides: dict[str, Path], made_up: Callable[..., list[Any]], linears: dict[str, int], gap: float, reason: str
) -> None:
    calls = made_up(linears, gap)
    found = run.measure(sides, RunSettings(rounds=2))
    assert not [call for call in calls if call[0] == "run"]
    assert reason in (report.headline(found).void or "")
    for case in found.cases:
        assert case.void
        assert case.void.startswith(reason)
        assert not case.metrics


def test_ctrl_c_keeps_the_rounds_that_are_done(
    sides: dict[str, Path], made_up: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = made_up()
    real = MadeUp.run

    def interrupted(self: MadeUp, job: Job, prompts: list[list[int]]) -> Round:
        if [call[0] for call in calls].count("run") == 2 + 2 * 3 + 1:
            raise KeyboardInterrupt
        return real(self, job, prompts)

    monkeypatch.setattr(MadeUp, "run", interrupted)
    found = run.measure(sides, RunSettings(rounds=8, starts=1))
    assert found.rounds == 3
    assert [len(metric.dense) for metric in found.cases[0].metrics] == [3] * 6
    assert [len(metric.sparse) for metric in found.cases[0].metrics] == [3] * 6
    assert found.conditions
    assert "stopped after 3 of 8 rounds" in found.conditions.warnings


def test_spread_is_said(
    sides: dict[str, Path], made_up: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up()
    real, ticks = MadeUp.run, iter(range(1000))

    def noisy(self: MadeUp, job: Job, prompts: list[list[int]]) -> Round:
        done = real(self, job, prompts)
        return Round({name: value * (1 + next(ticks) % 5) for name, value in done.figures.items()}, done.itl_ms)

    monkeypatch.setattr(MadeUp, "run", noisy)
    found = run.measure(sides, RunSettings(rounds=8))
    assert found.conditions
    assert any("2 of 2 times spread by more than 10%" in warning for warning in found.conditions.warnings)


def test_the_oracle_finds_a_wrong_token(sides: dict[str, Path]) -> None:
    prompts = [[5, 6, 7, 8], [50, 60, 70, 80]]
    model: Any = AutoModelForCausalLM.from_pretrained(sides["sparse"], dtype=torch.float32).eval()
    answers: list[list[int]] = model.generate(
        torch.tensor(prompts), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
    )[:, 4:].tolist()
    good = check.against_reference(sides["sparse"], prompts, answers, "float32")
    assert (good.tokens, good.equal, good.passed) == (12, 12, True)
    answers[1][3] = (answers[1][3] + 1) % 300
    bad = check.against_reference(sides["sparse"], prompts, answers, "float32")
    assert not bad.passed
    assert bad.equal < 12
    assert bad.largest_gap > 0.01
    # The unpruned weights answer something else: the oracle is the sparse checkpoint, not the dense one.
    assert not check.against_reference(sides["dense"], prompts, answers, "float32").passed


def test_a_worker_gives_back_its_errors(sides: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(sides["sparse"], tmp_path / "broken"))
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    options = Options("bfloat16", 1)
    with (
        pytest.raises((RuntimeError, CheckpointError), match="truncated or damaged"),
        Worker("transformers", broken, options),
    ):
        pass
    large = torch.ones(300_000_000)  # of this process: the worker must not count it as its own
    with Worker("transformers", sides["sparse"], options) as worker:
        assert 100_000_000 < worker.peak_memory_bytes() < large.nbytes
        del large
        worker._process.kill()
        with pytest.raises(RuntimeError, match="its process was ended by SIGKILL; was there enough memory"):
            worker.tokens([[1, 2]], 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--new-tokens", "1"], "--new-tokens must be 2 or more"),
        (["--dtype", "int3"], "unknown dtype 'int3'; known: float32, float16, bfloat16"),
        (["--workload", "serve"], "--engine transformers has no workload 'serve'; it has: batch"),
        (["--engine", "vllm", "--workload", "batch"], "it has: serve, latency, throughput"),
        (
            ["--engine", "onnxruntime", "--dense-linears", "onednn"],
            "--dense-linears onednn is for --engine transformers",
        ),
        (["--concurrency", "0"], "--concurrency takes positive numbers"),
    ],
)
def test_mistakes_are_answered(options: list[str], message: str, sides: dict[str, Path]) -> None:
    outcome = CliRunner().invoke(cli.app, ["run", str(sides["sparse"]), "--baseline", str(sides["dense"]), *options])
    assert isinstance(outcome.exception, SettingsError)
    assert message in str(outcome.exception)


def test_onednn_is_refused_where_it_cannot_take_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "takes", lambda dtype: dtype == torch.float32)
    RunSettings(dense_linears="onednn", dtype="float32")
    with pytest.raises(SettingsError, match="cannot lay out bfloat16 weights on this CPU; take --dtype float32"):
        RunSettings(dense_linears="onednn")


def test_folders_are_checked(sides: dict[str, Path], tmp_path: Path) -> None:
    for arguments, message in (
        ([str(sides["sparse"])], "--baseline FOLDER is missing"),
        ([str(sides["sparse"]), "--baseline", str(tmp_path)], "no config.json: not a checkpoint's folder"),
        (["llama-0"], "neither a folder nor one of: smollm2-135m, llama-3.2-1b"),
        ([str(sides["sparse"]), "--baseline", str(sides["dense"]), "--require-gpu"], "GPU"),
    ):
        outcome = CliRunner().invoke(cli.app, ["run", *arguments])
        assert isinstance(outcome.exception, SettingsError)
        assert re.search(re.escape(message), str(outcome.exception))


def test_an_unusable_text_costs_no_timing(sides: dict[str, Path], made_up: Callable[..., list[Any]]) -> None:
    calls = made_up()
    command = ["run", str(sides["sparse"]), "--baseline", str(sides["dense"]), "--text", "/nowhere/text.txt"]
    outcome = CliRunner().invoke(cli.app, command)
    assert isinstance(outcome.exception, TextError)
    assert not calls


def test_a_result_that_cannot_be_written_is_shown(
    sides: dict[str, Path], made_up: Callable[..., list[Any]], tmp_path: Path
) -> None:
    made_up()
    (tmp_path / "file").write_text("")
    command = ["run", str(sides["sparse"]), "--baseline", str(sides["dense"]), "--rounds", "2"]
    outcome = CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "file" / "a.json")])
    assert isinstance(outcome.exception, OutputError)
    assert "2.00x" in outcome.stdout


def test_engine_torch_sweeps_the_models_own_linears(sides: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime_bench import layers

    asked: dict[str, Any] = {}

    def measure(shapes: list[tuple[int, int]], **options: Any) -> Any:
        asked.update(options, shapes=shapes)
        raise SettingsError("seen")

    monkeypatch.setattr(layers, "measure", measure)
    command = [
        "run",
        str(sides["sparse"]),
        "--baseline",
        str(sides["dense"]),
        "--engine",
        "torch",
        "--concurrency",
        "1,8",
    ]
    outcome = CliRunner().invoke(cli.app, command)
    assert str(outcome.exception) == "seen"
    assert asked["shapes"] == [(64, 64), (32, 64), (160, 64), (64, 160)]
    assert (asked["tokens"], asked["dtypes"]) == ([1, 8], ["bf16"])
