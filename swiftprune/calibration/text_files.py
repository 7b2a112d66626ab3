"""Reads the documents of text files: plain text, JSON, JSON lines, Parquet, compressed or not, and folders of them.

What a file holds is told from its name. Anything that is neither text nor one of these kinds is refused, since markup
or binary data that is calibrated on as if it were prose makes a worse model and says nothing.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from swiftprune.errors import TextError, first_line

Messages = list[dict[str, str]]
Render = Callable[[Messages], str]
"""Turns a conversation into text, as the model's chat template does."""

DEFAULT_COLUMN = "text"
_CONVERSATIONS = ("messages", "conversations", "conversation")
COMPRESSED = {".gz", ".bz2", ".xz", ".lzma", ".zst"}
ROWS = {".jsonl", ".ndjson", ".json", ".parquet"}
_NOT_TEXT = {
    ".csv",
    ".tsv",
    ".html",
    ".htm",
    ".xml",
    ".yaml",
    ".yml",
    ".pdf",
    ".docx",
    ".doc",
    ".odt",
    ".rtf",
    ".epub",
    ".xlsx",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
    ".rar",
    ".arrow",
    ".feather",
    ".avro",
    ".orc",
    ".npy",
    ".npz",
    ".pt",
    ".pth",
    ".bin",
    ".safetensors",
    ".gguf",
    ".onnx",
    ".db",
    ".sqlite",
    ".pkl",
    ".ipynb",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".wav",
}
# Roles as ShareGPT calls them.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def read_text(path: Path, *, column: str = DEFAULT_COLUMN, render: Render | None = None) -> str:
    """All documents of a file or folder, with an empty line between them. Raises TextError.

    Rows of JSON and Parquet give their `column`; without one of the default name, a conversation under `messages` goes
    through `render`.
    """
    text = "\n\n".join(documents(path, column=column, render=render))
    if not text.strip():
        raise TextError(f"{path}: is empty")
    return text


def documents(path: Path, *, column: str = DEFAULT_COLUMN, render: Render | None = None) -> Iterator[str]:
    """The documents of `path` in order; files of a folder by name, those that are no text left out."""
    if path.is_dir():
        if not (found := text_files(path)):
            raise TextError(f"{path}: the folder holds no text, .jsonl, .json or .parquet files")
        for file in found:
            yield from documents(file, column=column, render=render)
        return
    kind = _kind(path)
    if kind in _NOT_TEXT:
        raise TextError(f"{path}: {kind} files are not read; convert it to plain text, .jsonl or .parquet")
    if kind not in ROWS:
        yield _plain_text(path)
        return
    for number, row in enumerate(_rows(path, kind), start=1):
        text = document(row, f"{path}: row {number}", column, render)
        if text.strip():
            yield text


def text_files(path: Path) -> list[Path]:
    """The files that `documents` reads for `path`, which may be one of them."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.rglob("*")) if file.is_file() and _is_readable(file)]


def document(row: Any, where: str, column: str, render: Render | None) -> str:
    """The text of one row: a string, or a mapping with it under `column` or, as a conversation, under `messages`."""
    if isinstance(row, str):
        return _whole(row, where)
    if not isinstance(row, Mapping):
        raise TextError(f"{where}: is {type(row).__name__}, not an object with the text under {column!r}")
    names = (column, *_CONVERSATIONS) if column == DEFAULT_COLUMN else (column,)
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None and (empty := [name for name in names if name in row]):
        raise TextError(f"{where}: its {empty[0]!r} is null; leave such rows out")
    if name is None:
        listed = ", ".join(map(repr, row)) or "nothing"
        missing = " nor `messages`" if column == DEFAULT_COLUMN else ""
        raise TextError(f"{where}: no column `{column}`{missing}; it has {listed}: name one with --text-column")
    value = row[name]
    if isinstance(value, str):
        return _whole(value, where)
    messages = _messages(value, f"{where}: {name!r}")
    if render is None:
        raise TextError(f"{where}: {name!r} is a conversation, and the model has no chat template to put it through")
    try:
        return render(messages)
    except Exception as error:  # templates raise what they like
        raise TextError(
            f"{where}: the model's chat template does not take this {name!r}: {first_line(error)}"
        ) from error


def _whole(text: str, where: str) -> str:
    """`text`, which a JSON escape may have left with half a character that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{where}: character {error.start} is half of one ({text[error.start]!r}); mend it") from None
    return text


def _messages(value: Any, where: str) -> Messages:
    """`value` as a list of role and content. Raises TextError when it is none."""
    messages = []
    for message in value if isinstance(value, list | tuple) or hasattr(value, "tolist") else [None]:
        role, content = (
            (message.get("role") or message.get("from"), message.get("content") or message.get("value") or "")
            if isinstance(message, Mapping)
            else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise TextError(f"{where} is neither text nor a list of messages with 'role' and 'content'")
        messages.append({"role": _ROLES.get(role, role), "content": _whole(content, where)})
    return messages


def _kind(path: Path) -> str:
    """The ending that tells what the file holds, compression aside."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _is_readable(path: Path) -> bool:
    return not path.name.startswith((".", "_")) and _kind(path) not in _NOT_TEXT


def _open(path: Path) -> IO[bytes]:
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if ending == ".bz2":
        return bz2.open(path)
    if ending in (".xz", ".lzma"):
        return lzma.open(path)
    if ending == ".zst":
        try:
            opened: IO[bytes] = importlib.import_module("zstandard").open(path, "rb")
        except ImportError:
            raise TextError(f"{path}: to read .zst files, pip install zstandard") from None
        return opened
    return open(path, "rb")


def _content(path: Path) -> str:
    try:
        with _open(path) as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise TextError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not a UTF-8 text file ({error})") from error
    except TextError:
        raise
    except Exception as error:  # each kind of compression has its own
        raise TextError(f"{path}: cannot be read: {first_line(error)}") from error
    if "\0" in text:
        raise TextError(f"{path}: not a text file: it holds zero bytes")
    return text


def _plain_text(path: Path) -> str:
    text = _content(path)
    lines = [line for line in text[:100_000].splitlines() if line.strip()][:2]
    if lines and all(_is_json_object(line) for line in lines):
        raise TextError(f"{path}: holds JSON lines; name it .jsonl, so that its text is read and not its syntax")
    return text


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows(path: Path, kind: str) -> Iterator[Any]:
    if kind == ".parquet":
        yield from _parquet_rows(path)
    elif kind == ".json":
        try:
            value = json.loads(_content(path))
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path}: not valid JSON ({error})") from error
        if isinstance(value, dict) and isinstance(value.get("data"), list):
            value = value["data"]
        yield from value if isinstance(value, list) else [value]
    else:
        for number, line in enumerate(_content(path).split("\n"), start=1):  # others are text
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise TextError(f"{path}: line {number} is not valid JSON ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise TextError(f"{path}: no such file")
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise TextError(f"{path}: to read Parquet files, pip install 'swiftprune[datasets]'") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except Exception as error:  # pyarrow's own, of many types
        raise TextError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
