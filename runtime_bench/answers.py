"""What people read before any number: greedy answers of two models to plain questions, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from runtime_bench.quality import load_model
from runtime_bench.results import SIDES
from swiftprune.calibration.text import load_tokenizer
from swiftprune.calibration.text_files import read_text
from swiftprune.progress import ProgressCallback, no_progress

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What does a bank do?",
    "Name three animals that live in the sea.",
    "What is a computer program?",
    "Why do people need sleep?",
    "Write two sentences about autumn.",
    "How does a bicycle stay upright?",
    "What should I pack for a day at the beach?",
)
NEW_TOKENS = 64


class Answer(BaseModel):
    question: str
    dense: str
    sparse: str


def compare(
    sides: dict[str, Path],
    questions: Sequence[str] = QUESTIONS,
    *,
    new_tokens: int = NEW_TOKENS,
    progress: ProgressCallback = no_progress,
) -> list[Answer]:
    """Greedy answers, float32, through the chat template where the dense side's tokenizer has one."""
    tokenizer = load_tokenizer(sides["dense"])
    given: dict[str, list[str]] = {}
    for side in SIDES:
        model = load_model(sides[side], "float32")
        given[side] = []
        for index, question in enumerate(questions):
            progress(f"answer, {side}", index, len(questions))
            given[side].append(_answer(model, tokenizer, question, new_tokens))
        progress(f"answer, {side}", len(questions), len(questions))
    return [
        Answer(question=question, dense=dense, sparse=sparse)
        for question, dense, sparse in zip(questions, given["dense"], given["sparse"], strict=True)
    ]


def read_questions(path: Path) -> list[str]:
    """One question a line. Raises TextError when there is none."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def markdown(answers: Sequence[Answer]) -> str:
    lines = ["| question | dense | 2:4 |", "| --- | --- | --- |"]
    for answer in answers:
        cells = (" ".join(text.split()).replace("|", "\\|") for text in (answer.question, answer.dense, answer.sparse))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _answer(model: Any, tokenizer: Any, question: str, new_tokens: int) -> str:
    if tokenizer.chat_template:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        asked = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
    ids = asked["input_ids"]
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip()
