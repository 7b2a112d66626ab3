"""Answers of two models side by side, against a greedy loop that is written out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from exporters import export
from runtime_bench import answers
from runtime_bench.answers import Answer, compare, markdown, read_questions
from runtime_bench.cli import app
from swiftprune.config import PruneSettings
from swiftprune.errors import TextError

QUESTION = "the red fox"


@pytest.fixture
def sides(tiny_models: Callable[[str], Path], tmp_path: Path) -> dict[str, Path]:
    dense = Path(shutil.copytree(tiny_models("llama-gqa-tied"), tmp_path / "dense"))
    export(dense, tmp_path / "sparse", PruneSettings(method="magnitude"))
    return {"dense": dense, "sparse": tmp_path / "sparse"}


def greedy(folder: Path, prompt: str, count: int) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = tokenizer(prompt).input_ids
    made: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("template", [None, "user says: {{ messages[0].content }} reply:"])
def test_answers_are_the_greedy_ones(template: str | None, sides: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sides["dense"])
    tokenizer.chat_template = template
    for folder in sides.values():
        tokenizer.save_pretrained(folder)
    prompt = f"user says: {QUESTION} reply:" if template else f"Question: {QUESTION}\nAnswer:"
    (given,) = compare(sides, [QUESTION], new_tokens=5)
    assert given.question == QUESTION
    assert given.dense == greedy(sides["dense"], prompt, 5)
    assert given.sparse == greedy(sides["sparse"], prompt, 5)
    assert given.dense != given.sparse


def test_a_table_holds_every_answer_on_one_line() -> None:
    table = markdown([Answer(question="a | b?", dense="one\n\ntwo", sparse="")])
    assert table.splitlines()[2] == r"| a \| b? | one two |  |"


def test_questions_of_a_file(tmp_path: Path, sides: dict[str, Path]) -> None:
    (file := tmp_path / "questions.txt").write_text(" the lazy dog \n\nthe fox\n")
    assert read_questions(file) == ["the lazy dog", "the fox"]
    run = CliRunner().invoke(
        app,
        ["answers", str(sides["dense"]), str(sides["sparse"]), "--questions", str(file), "--new-tokens", "2"],
    )
    assert run.exit_code == 0, run.output
    assert "the lazy dog" in run.output
    assert answers.QUESTIONS[0] not in run.output
    file.write_text("\n \n")
    with pytest.raises(TextError, match="is empty"):
        read_questions(file)
