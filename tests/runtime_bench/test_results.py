"""Results on disk: whole or absent, old ones and foreign ones answered clearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_bench import result_files, results
from swiftprune.errors import OutputError, ResultError
from tests.runtime_bench.sample_results import layers_result, run_result, trade_off_result


@pytest.mark.parametrize(
    "result", [run_result(), layers_result(), trade_off_result()], ids=["run", "layers", "trade-off"]
)
def test_round_trip_keeps_fields_that_are_not_known(result: Any, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.json"
    results.save(result, path)
    data = json.loads(path.read_text())
    data["later"] = {"a": [1]}
    data["machine"]["later"] = 2
    (data.get("cases") or data.get("cells") or data["rows"])[0]["later"] = 3
    path.write_text(json.dumps(data))
    loaded = result_files.load(path)
    assert type(loaded) is type(result)
    results.save(loaded, path)
    assert json.loads(path.read_text()) == data


def test_speedups_survive(tmp_path: Path) -> None:
    results.save(run_result(), tmp_path / "a.json")
    loaded = result_files.load(tmp_path / "a.json")
    for before, after in zip(run_result().cases, loaded.cases, strict=True):
        assert after.metrics[0].speedups == before.metrics[0].speedups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("schema_version"), "no schema_version: not a result"),
        (lambda data: data.update(schema_version=99), "schema version 99, but this swiftprune reads up to 1"),
        (lambda data: data.update(kind="other"), "kind"),
        (lambda data: data.pop("engine"), "run.engine: Field required"),
        (
            lambda data: data["cases"][0].update(concurrency="many"),
            "run.cases.0.concurrency: Input should be a valid integer",
        ),
        (lambda data: data["cases"][0]["metrics"][0]["dense"].pop(), "9 dense and 10 sparse values are no pairs"),
        (lambda data: data["cases"][0]["metrics"][0].update(dense=[], sparse=[]), "0 dense and 0 sparse"),
        (
            lambda data: data["cases"][0]["metrics"][0]["sparse"].__setitem__(3, 0.0),
            "values must be positive and finite",
        ),
        (lambda data: data["cases"][0].update(void="x"), "a void case has no figures"),
    ],
)
def test_unusable_files_are_answered(change: Any, message: str, tmp_path: Path) -> None:
    data = run_result().model_dump(mode="json")
    change(data)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ResultError, match=message) as caught:
        result_files.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["rows"].pop(0), "the first row is of 'wanda', not of the dense model"),
        (lambda data: data["rows"][1]["perplexity"].pop("news"), "wanda: no perplexity on news"),
        (lambda data: data["rows"][1]["perplexity"].update(news=0), "wanda: a perplexity must be finite and at least"),
        (lambda data: data.update(tokens={}), "trade-off.tokens: Dictionary should have at least 1 item"),
    ],
)
def test_unusable_trade_offs_are_answered(change: Any, message: str, tmp_path: Path) -> None:
    data = trade_off_result().model_dump(mode="json")
    change(data)
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(ResultError, match=message):
        result_files.load(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"schema_version": 1', "\x00", "[" * 100_000])
def test_what_is_no_result_at_all(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"a\.json: (not JSON|no schema_version)"):
        result_files.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    results.write_text(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match=r"a\.json: cannot be written: No space left on device"):
        results.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_schema_in_the_repository_is_up_to_date() -> None:
    """`swiftprune-bench schema > runtime_bench/schema/result.json` makes it."""
    assert result_files.SCHEMA_FILE.read_text() == result_files.schema()


def test_results_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(result_files.SCHEMA_FILE.read_text())
    for result in (run_result(), layers_result(), trade_off_result()):
        jsonschema.validate(result.model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**run_result().model_dump(mode="json"), "rounds": "many"}, schema)


def test_committed_results_load() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results"
    for path in folder.glob("*.json"):
        if "schema_version" in json.loads(path.read_text()):
            result_files.load(path)
