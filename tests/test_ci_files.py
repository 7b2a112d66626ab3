"""CI files: linters accept them, their commands exist, and the action's scripts do what docs/ci.md says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BENCH = ROOT / ".github" / "workflows" / "bench.yml"
ACTION = ROOT / ".github" / "actions" / "bench" / "action.yml"
COMMENT = ACTION.parent / "comment.cjs"
GUIDE = ROOT / "docs" / "ci.md"
ONLY_IN_WORKFLOW = {"artifact", "runs-on", "timeout-minutes"}


def parsed(text: str) -> dict[Any, Any]:
    content = yaml.safe_load(text)
    assert isinstance(content, dict)
    return content


def blocks(language: str) -> list[str]:
    """The guide's code blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def gitlab() -> str:
    return next(block for block in blocks("yaml") if "\n  script:\n" in block)


def examples() -> list[str]:
    """The guide's workflows for GitHub."""
    return [block for block in blocks("yaml") if block != gitlab()]


def accepted(command: str, *arguments: str | Path) -> None:
    program = Path(sys.executable).with_name(command)
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


# Linters and schemas


def test_actionlint_accepts_the_workflows(tmp_path: Path) -> None:
    copies = [tmp_path / f"{number}.yml" for number, _ in enumerate(examples())]
    assert WORKFLOWS
    assert len(copies) == 2
    for copy, example in zip(copies, examples(), strict=True):
        copy.write_text(example)
    accepted("actionlint", "-shellcheck=", "-pyflakes=", *WORKFLOWS, *copies)


def test_schemas_accept_all_files(tmp_path: Path) -> None:
    snippet = tmp_path / "gitlab-ci.yml"
    snippet.write_text(gitlab())
    accepted("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    accepted("check-jsonschema", "--builtin-schema", "vendor.github-actions", ACTION)
    accepted("check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", snippet)


# What the linters do not know


def all_jobs() -> dict[str, dict[str, Any]]:
    return {f"{path.name}: {name}": job for path in WORKFLOWS for name, job in parsed(path.read_text())["jobs"].items()}


def all_steps() -> list[dict[str, Any]]:
    jobs = [*all_jobs().values(), parsed(ACTION.read_text())["runs"]]
    return [step for job in jobs for step in job.get("steps", [])]


def test_no_expression_inside_a_script() -> None:
    scripts = [step.get("run") or step.get("with", {}).get("script") or "" for step in all_steps()]
    assert sum(map(bool, scripts)) > 5
    for script in scripts:
        assert "${{" not in script


def test_actions_are_of_a_major_version() -> None:
    for step in all_steps():
        assert re.fullmatch(r"\./.*|actions/[\w-]+@v\d+", step.get("uses", "./")), step


def test_only_the_comment_may_write() -> None:
    for path in WORKFLOWS:
        assert parsed(path.read_text())["permissions"] in ({}, {"contents": "read"})
    writers = {
        name for name, job in all_jobs().items() if "write" in job.get("permissions", {}).values() and "steps" in job
    }
    assert writers == {"bench.yml: comment"}
    assert all_jobs()["bench.yml: comment"]["permissions"] == {"contents": "read", "pull-requests": "write"}


def test_action_workflow_and_guide_have_the_same_inputs() -> None:
    action = parsed(ACTION.read_text())["inputs"]
    workflow = parsed(BENCH.read_text())[True]["workflow_call"]["inputs"]  # YAML reads `on` as true
    assert set(workflow) - set(action) == ONLY_IN_WORKFLOW
    as_text = {name: yaml_text(entry.get("default", "")) for name, entry in workflow.items()}
    assert {name: as_text[name] for name in action} == {
        name: entry.get("default", "") for name, entry in action.items()
    }
    rows = re.findall(r"^\| `([\w-]+)` \| (?:`(.*?)`)? ?\|", GUIDE.read_text(), re.MULTILINE)
    assert dict(rows) == as_text

    call = next(step for step in all_jobs()["bench.yml: bench"]["steps"] if step.get("id") == "bench")
    passed = {name: f"${{{{ inputs.{name} }}}}" for name in action if name != "comment"}  # a job of its own does that
    assert call["with"] == passed
    for example in examples():
        for job in parsed(example)["jobs"].values():
            given = [step["with"] for step in job.get("steps", []) if "OWNER" in step.get("uses", "")] or [job["with"]]
            assert set(given[0]) <= (set(workflow) if "uses" in job else set(action))


def yaml_text(value: object) -> str:
    """As an expression renders it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# The command line


def exists(arguments: list[str]) -> None:
    from runtime_bench.cli import app

    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    assert arguments[0] in commands, f"no command {arguments[0]}"
    known = {name for parameter in commands[arguments[0]].params for name in parameter.opts}
    before_positional = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for argument in before_positional[1:]:
        name = argument.partition("=")[0]
        assert not name.startswith("-") or name in known, f"{arguments[0]} has no option {name}"


def written_commands() -> list[list[str]]:
    """Those in the guide and in workflows; the action's are seen when it runs."""
    lines = "\n".join(blocks("console")).replace("\\\n", " ").splitlines() + parsed(gitlab())["benchmark"]["script"]
    for step in [step for job in all_jobs().values() for step in job.get("steps", [])]:
        lines += step.get("run", "").replace("\\\n", " ").splitlines()
    words = [shlex.split(line.partition("||")[0]) for line in lines]
    return [line[1:] for line in words if line[:1] == ["swiftprune-bench"]]


def test_written_commands_exist() -> None:
    commands = written_commands()
    assert [command[0] for command in commands] == ["run", "gate", "report", "run", "report", "gate"]
    for command in commands:
        exists(command)


def test_the_commands_of_the_action_exist(tmp_path: Path) -> None:
    run = Run(tmp_path, {"dense": "dense", "baseline-file": "base.json"}, baselines=("base.json",))
    assert [command[0] for command in run.commands] == ["run", "gate", "report"]
    for command in run.commands:
        exists(command)


# The action itself: its steps in order, with stand-ins for swiftprune-bench, python3 and pip

STAND_IN = f"""#!{sys.executable} -SE
import json, os, pathlib, sys
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, *arguments]) + "\\n")
if name == "python3":  # -m venv FOLDER
    pip = pathlib.Path(arguments[2]) / "bin" / "pip"
    pip.parent.mkdir()
    pip.symlink_to(sys.argv[0])
for option in ("--out", "--html", "--markdown"):
    if option in arguments:
        pathlib.Path(arguments[arguments.index(option) + 1]).write_text("the table\\n")
if arguments[0] == "gate":
    print("the gate says why")
sys.exit(json.loads(os.environ["STATUS"]).get(arguments[0], 0))
"""


class Run:
    """What GitHub does with the action, as far as the action uses it."""

    def __init__(
        self,
        folder: Path,
        given: dict[str, str] | None = None,
        *,
        baselines: tuple[str, ...] = (),
        statuses: dict[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self.work = folder / "work"
        for path in (self.work, folder / "bin", folder / "temp"):
            path.mkdir()
        for name in baselines:
            (self.work / name).touch()
        for name in ("swiftprune-bench", "python3"):
            (folder / "bin" / name).write_text(STAND_IN)
            (folder / "bin" / name).chmod(0o755)
        action = parsed(ACTION.read_text())
        self.inputs: dict[str, str] = {name: entry.get("default", "") for name, entry in action["inputs"].items()}
        self.inputs |= {"model": "sparse"} | (given or {})
        assert set(self.inputs) == set(action["inputs"])
        self.outputs: dict[str, dict[str, str]] = {}
        self.outcomes: dict[str, str] = {}
        self.used: dict[str, dict[str, str]] = {}
        self.log = ""
        self.statuses = statuses or {}
        for step in action["runs"]["steps"]:
            self.step(step)

    @property
    def failed(self) -> bool:
        return "failure" in self.outcomes.values()

    @property
    def commands(self) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == "swiftprune-bench"]

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def summary(self) -> str:
        return (self.folder / "summary").read_text()

    def value(self, name: str) -> str:
        kind, *rest = name.split(".")
        if kind == "inputs":
            return self.inputs[rest[0]]
        if kind == "steps" and rest[1] == "outputs":
            return self.outputs.get(rest[0], {}).get(rest[2], "")
        if kind == "steps" and rest[1:] == ["outcome"]:
            return self.outcomes[rest[0]]
        assert name == "github.action_path"
        return str(ACTION.parent)

    def filled(self, entries: dict[str, str]) -> dict[str, str]:
        def fill(found: re.Match[str]) -> str:
            return self.value(found[1])

        return {name: re.sub(r"\$\{\{ (\S+) \}\}", fill, text) for name, text in entries.items()}

    def wanted(self, condition: str) -> bool:
        terms = condition.removeprefix("${{ ").removesuffix(" }}").split(" && ") if condition else []
        if "!cancelled()" not in terms and self.failed:
            return False
        for term in terms:
            if term != "!cancelled()":
                found = re.fullmatch(r"(\S+) (==|!=) '(.*)'", term)
                assert found, term
                if (self.value(found[1]) == found[3]) != (found[2] == "=="):
                    return False
        return True

    def step(self, step: dict[str, Any]) -> None:
        name = step.get("id") or step["name"].lower()
        if not self.wanted(step.get("if", "")):
            self.outcomes[name] = "skipped"
        elif "uses" in step:
            self.used[step["uses"].partition("@")[0]] = self.filled(step.get("env", {}) | step.get("with", {}))
            self.outcomes[name] = "success"
        else:
            self.script(name, step)

    def script(self, name: str, step: dict[str, Any]) -> None:
        assert step["shell"] == "bash"
        outputs = self.folder / f"outputs-{name}"
        script = self.folder / "script"
        script.write_text(step["run"])
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.folder / "temp"),
            "GITHUB_OUTPUT": str(outputs),
            "GITHUB_PATH": str(self.folder / "path"),
            "GITHUB_STEP_SUMMARY": str(self.folder / "summary"),
            "CALLS": str(self.folder / "calls"),
            "STATUS": json.dumps(self.statuses),
        }
        run = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=self.work,
            env=environment | self.filled(step.get("env", {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.log += run.stdout
        self.outcomes[name] = "failure" if run.returncode else "success"
        lines = outputs.read_text().splitlines() if outputs.exists() else []
        self.outputs[name] = dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize(
    ("status", "fail_on_inconclusive", "failed", "verdict", "annotation"),
    [
        (0, "true", False, "fine", ""),
        (0, "false", False, "fine", ""),
        (1, "true", True, "regression", "error"),
        (1, "false", True, "regression", "error"),
        (2, "true", True, "inconclusive", "error"),
        (2, "false", False, "inconclusive", "warning"),
        (3, "false", True, "error", "error"),
    ],
)
def test_gate(
    tmp_path: Path, status: int, fail_on_inconclusive: str, failed: bool, verdict: str, annotation: str
) -> None:
    given = {"baseline-file": "base.json", "fail-on-inconclusive": fail_on_inconclusive}
    run = Run(tmp_path, given, baselines=("base.json",), statuses={"gate": status})
    assert run.failed == failed
    assert run.outputs["gate"]["verdict"] == verdict
    assert re.findall(r"^::(\w+) ", run.log, re.MULTILINE) == ([annotation] if annotation else [])
    # Whatever the gate said, there is a report, a summary and an artifact.
    assert run.outcomes["report"] == run.outcomes["upload"] == "success"
    assert f"## swiftprune-bench: {verdict}\n" in run.summary
    assert "the gate says why" in run.summary
    assert "the table" in run.summary
    uploaded = run.used["actions/upload-artifact"]
    files = {path.name for path in Path(uploaded["path"]).iterdir()}
    assert files == {"new.json", "report.html", "summary.md", "gate.md", "comment.md"}
    assert (Path(uploaded["path"]) / "comment.md").read_text() == run.summary


def test_a_pattern_gives_the_gate_several_baselines(tmp_path: Path) -> None:
    run = Run(tmp_path, {"baseline-file": "base *.json"}, baselines=("base a.json", "base b.json", "other.json"))
    assert run.commands[1][2:6] == ["--against", "base a.json", "--against", "base b.json"]


def test_the_first_run_has_no_baseline_and_says_what_to_do(tmp_path: Path) -> None:
    run = Run(tmp_path, {"baseline-file": "base.json"})
    assert run.failed
    assert run.outputs["gate"]["verdict"] == "inconclusive"
    assert [command[0] for command in run.commands] == ["run", "report"]
    assert "commit new.json" in run.summary
    assert run.outcomes["upload"] == "success"


def test_without_a_baseline_it_measures_only(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not run.failed
    assert run.outputs["gate"]["verdict"] == "not-compared"
    assert [command[0] for command in run.commands] == ["run", "report"]
    assert "## swiftprune-bench: not compared\n" in run.summary


def test_a_failed_measurement_fails_even_with_exit_code_2(tmp_path: Path) -> None:
    run = Run(tmp_path, {"fail-on-inconclusive": "false"}, statuses={"run": 2})
    assert run.failed
    assert run.outcomes["gate"] == run.outcomes["report"] == run.outcomes["upload"] == "skipped"


def test_settings_reach_the_commands(tmp_path: Path) -> None:
    given = {
        "model": "a sparse one",
        "dense": "a dense one",
        "engine": "vllm",
        "concurrency": "2,4",
        "prompt-tokens": "5",
        "new-tokens": "6",
        "rounds": "7",
        "baseline-file": "the base.json",
        "max-regression": "8%",
    }
    measure, gate, _ = Run(tmp_path, given, baselines=("the base.json",)).commands
    for option in ("engine", "concurrency", "prompt-tokens", "new-tokens", "rounds"):
        assert measure[measure.index(f"--{option}") + 1] == given[option]
    assert measure[measure.index("--baseline") + 1] == "a dense one"
    assert measure[-2:] == ["--", "a sparse one"]
    assert gate[2:] == ["--against", "the base.json", "--max-regression", "8%"]


def test_it_installs_into_an_environment_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path, {"pip-arguments": "--constraint versions.txt\n--no-cache-dir"})
    folder = (tmp_path / "path").read_text().strip()
    assert Path(folder).is_relative_to(tmp_path / "temp")
    assert run.calls[1] == [
        "pip",
        "install",
        "--quiet",
        "--constraint",
        "versions.txt",
        "--no-cache-dir",
        "--",
        "swiftprune[report,demo]",
    ]


def test_without_a_package_it_installs_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, {"package": ""})
    assert {call[0] for call in run.calls} == {"swiftprune-bench"}
    assert "actions/setup-python" not in run.used


@pytest.mark.parametrize("comment", ["true", "false"])
def test_it_comments_when_asked(tmp_path: Path, comment: str) -> None:
    used = Run(tmp_path, {"comment": comment}).used.get("actions/github-script")
    assert (used is not None) == (comment == "true")
    if used:
        assert Path(used["SCRIPT"]) == COMMENT
        assert Path(used["FILE"]).exists()


@pytest.mark.parametrize(
    "hostile", ["x; touch pwned", "$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "--help"]
)
def test_inputs_are_never_run(tmp_path: Path, hostile: str) -> None:
    names = [name for name in parsed(ACTION.read_text())["inputs"] if name not in ("comment", "baseline-file")]
    given = dict.fromkeys(names, hostile) | {"baseline-file": hostile}
    run = Run(tmp_path, given, baselines=(hostile,))
    assert not run.failed
    assert not list(tmp_path.rglob("pwned"))
    measure, gate, _ = run.commands
    assert measure[-1] == hostile
    assert gate[3] == gate[5] == hostile


# GitLab's job


@pytest.mark.parametrize(
    ("statuses", "ends_with"), [({}, 0), ({"gate": 1}, 1), ({"gate": 2}, 2), ({"run": 2}, 1), ({"install": 2}, 1)]
)
def test_only_the_gate_ends_the_gitlab_job_with_2(tmp_path: Path, statuses: dict[str, int], ends_with: int) -> None:
    for name in ("swiftprune-bench", "pip"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bench").mkdir()  # `run` makes it
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": "calls", "STATUS": json.dumps(statuses)}
    script = "\n".join(parsed(gitlab())["benchmark"]["script"])
    run = subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=environment, check=False)
    assert run.returncode == ends_with
    if "gate" in statuses:
        kept = {path.name for path in (tmp_path / "bench").iterdir()}
        assert kept == {"new.json", "report.html", "summary.md"}


# The comment


@dataclass
class Commented:
    """What the script asked GitHub for."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    error: str = ""


def commented(folder: Path, *, existing: list[dict[str, Any]], status: int = 0, text: str = "the table") -> Commented:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    (folder / "comment.md").write_text(text)
    script = """
        const [script, existing, status] = process.argv.slice(1);
        const seen = { calls: [], notices: [], error: "" };
        const write = (name) => async (call) => {
          if (+status) throw Object.assign(new Error("refused"), { status: +status });
          seen.calls.push({ name, ...call });
        };
        const issues = { listComments: {}, createComment: write("create"), updateComment: write("update") };
        require(script)({
          github: { paginate: async () => JSON.parse(existing), rest: { issues } },
          context: { payload: { pull_request: { number: 5 } }, repo: { owner: "me", repo: "mine" }, runId: 7 },
          core: { notice: (text) => seen.notices.push(text) },
        }).catch((error) => { seen.error = error.message; }).then(() => console.log(JSON.stringify(seen)));
    """
    run = subprocess.run(
        [node, "-e", script, COMMENT, json.dumps(existing), str(status)],
        env={"NAME": "speed", "FILE": str(folder / "comment.md")},
        capture_output=True,
        text=True,
        check=True,
    )
    return Commented(**json.loads(run.stdout))


def test_the_first_comment_is_made_and_then_updated(tmp_path: Path) -> None:
    bot = {"type": "Bot"}
    others: list[dict[str, Any]] = [
        {"id": 1, "user": bot, "body": "<!-- swiftprune-bench: another -->"},
        {"id": 2, "user": {"type": "User"}, "body": "<!-- swiftprune-bench: speed -->"},
        {"id": 3, "user": None, "body": None},
    ]
    made = commented(tmp_path, existing=others).calls
    assert [call["name"] for call in made] == ["create"]
    assert made[0]["issue_number"] == 5
    assert "the table" in made[0]["body"]

    updated = commented(tmp_path, existing=[*others, {"id": 4, "user": bot, "body": made[0]["body"]}]).calls
    assert [(call["name"], call["comment_id"]) for call in updated] == [("update", 4)]


def test_a_token_that_may_only_read_fails_nothing(tmp_path: Path) -> None:
    seen = commented(tmp_path, existing=[], status=403)
    assert not seen.error
    assert len(seen.notices) == 1


def test_other_errors_are_errors(tmp_path: Path) -> None:
    assert commented(tmp_path, existing=[], status=500).error == "refused"


def test_a_long_table_is_cut_where_github_would_refuse_it(tmp_path: Path) -> None:
    body = commented(tmp_path, existing=[], text="x" * 100_000).calls[0]["body"]
    assert len(body) <= 65_536
    assert "actions/runs/7" in body
