"""What calibration reads: every kind of file gives its text and nothing of its syntax, or says why not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from swiftprune.calibration.text import chat_template, start_tokens, token_windows
from swiftprune.calibration.text_files import Messages, read_text
from swiftprune.errors import TextError
from tests import models

LINES = [f"Document {index}, with “quotes” and a \t tab." for index in range(5)]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]}
    for i in range(5)
]
ANSWERED = "\n\n".join(f"<user>Question {i}?<assistant>Answer {i}." for i in range(5))


def render(messages: Messages) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def as_lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def zipped(content: bytes) -> bytes:
    """Without the time, which would be part of the names of tests, and those must be alike in all processes."""
    return gzip.compress(content, mtime=0)


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(8) + content[middle + 8 :]


TEXTS = [{"text": line, "id": 7} for line in LINES]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n\n".join(LINES)),
        ("a.md", "\n\n".join(LINES)),
        ("noending", "\n\n".join(LINES)),
        ("a.jsonl", as_lines(TEXTS)),
        ("a.JSONL", as_lines(TEXTS)),
        ("a.ndjson", "\n" + as_lines(TEXTS) + "\n\n"),
        ("a.json", json.dumps(TEXTS, indent=2)),
        ("b.json", json.dumps({"version": 1, "data": TEXTS})),
        ("c.json", json.dumps(LINES)),
    ],
)
@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_files_give_their_text(
    name: str, content: str, ending: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / (name + ending)
    path.write_bytes(compress(content.encode("utf-8-sig" if name == "a.txt" else "utf-8")))
    assert read_text(path) == "\n\n".join(LINES)


def test_only_a_line_feed_ends_a_row(tmp_path: Path) -> None:
    """Python's splitlines takes other characters for line ends, which JSON lets stand within a string."""
    lines = ["one\u2028line", "and\x85another", "\u2029"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\r\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines).encode())
    assert read_text(path) == "\n\n".join(lines[:2])


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": LINES, "n": list(range(5))}), tmp_path / "a.parquet")
    assert read_text(tmp_path / "a.parquet") == "\n\n".join(LINES)
    parquet.write_table(pa.Table.from_pylist(CHATS), tmp_path / "b.parquet")
    assert read_text(tmp_path / "b.parquet", render=render) == ANSWERED
    (tmp_path / "c.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(TextError, match=r"c\.parquet: not a readable Parquet file"):
        read_text(tmp_path / "c.parquet")


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_conversations_go_through_the_chat_template(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([{key: chat["messages"]} for chat in CHATS]))
    assert read_text(path, render=render) == ANSWERED
    path.write_text(
        as_lines([{key: [{"from": "human", "value": "Question 0?"}, {"from": "gpt", "value": "Answer 0."}]}])
    )
    assert read_text(path, render=render) == "<user>Question 0?<assistant>Answer 0."
    with pytest.raises(TextError, match="the model has no chat template"):
        read_text(path)


def test_a_column_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(as_lines([{"content": line, "text": "not this"} for line in LINES]))
    assert read_text(path, column="content") == "\n\n".join(LINES)
    path.write_text(as_lines([{"chat": chat["messages"]} for chat in CHATS]))
    assert read_text(path, column="chat", render=render) == ANSWERED


def test_a_folder_gives_all_of_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text(LINES[1])
    (tmp_path / "a.jsonl").write_text(as_lines(TEXTS[:1]))
    (tmp_path / "deep" / "c.json.gz").write_bytes(gzip.compress(json.dumps(TEXTS[2]).encode()))
    (tmp_path / ".hidden").write_bytes(b"\0")
    (tmp_path / "picture.png").write_bytes(b"\0")
    assert read_text(tmp_path) == "\n\n".join(LINES[:3])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match=r"the folder holds no text"):
        read_text(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nx", r"\.csv files are not read; convert it"),
        ("a.csv.gz", zipped(b"text\nx"), r"\.csv files are not read"),
        ("a.html", b"<p>x</p>", r"\.html files are not read"),
        ("a.txt", as_lines(CHATS).encode(), r"holds JSON lines; name it \.jsonl"),
        ("a.txt", b"zero \0 byte", "holds zero bytes"),
        ("a.txt", b"\xff\xfe\x00", "not a UTF-8 text file"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.gz", zipped(b"word " * 1000)[:-30], "cannot be read"),
        ("a.txt.xz", b"no xz", "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"prompt": "y", "answer": "z"}',
            r"row 2: no column `text` nor `messages`; it has "
            r"'prompt', 'answer'",
        ),
        ("a.jsonl", b"[1, 2]", "row 1: is list, not an object"),
        ("a.jsonl", b'{"text": 5}', "row 1: 'text' is neither text nor a list of messages"),
        ("a.jsonl", b'{"messages": ["hello"]}', "'messages' is neither text nor a list of messages"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "neither text nor a list"),
        ("a.json", b"{", "not valid JSON"),
        ("a.jsonl", b'{"text": ""}\n{"text": " "}', "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "row 2: its 'text' is null"),
        ("a.jsonl", b'{"text": "ab\\ud83d"}', r"row 1: character 2 is half of one \('\\ud83d'\)"),
        ("a.json", b'[{"messages": [{"role": "user", "content": "\\ude00"}]}]', "'messages': character 0 is half"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl.gz", damaged(zipped(as_lines(TEXTS * 100).encode())), "cannot be read"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(path, render=render)


@pytest.mark.parametrize(
    ("template", "start"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("</s> <s> $A", [1, 0])]
)
def test_each_window_begins_as_a_text_does(template: str, start: list[int], tmp_path: Path) -> None:
    models.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert start_tokens(tokenizer) == start
    windows = token_windows(models.TEXT, tokenizer, 64, "text")
    assert windows[:, : len(start)].tolist() == [start] * len(windows)
    body = windows[:, len(start) :].flatten().tolist()
    assert body == tokenizer(models.TEXT, add_special_tokens=False).input_ids[: len(body)]
    assert not {0, 1} & set(body)


def test_the_chat_template_of_the_model_is_used(tmp_path: Path) -> None:
    models.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert chat_template(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    path = tmp_path / "chats.jsonl"
    path.write_text(as_lines(CHATS[:1]))
    assert read_text(path, render=chat_template(tokenizer)) == "[user] Question 0?\n[assistant] Answer 0.\n"
