"""Patterns that name the linears to leave dense."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

from swiftprune.errors import SettingsError

DEFAULT_IGNORE = r"lm_head|embed"


class Ignore:
    """Names of linears that stay dense, from a text or a list of patterns with commas between them.

    A pattern is a regular expression that is searched for in the full name of a module; after `re:`, as llm-compressor
    writes them, one that matches from its start. One that ends in a digit does not match within a longer number.
    """

    def __init__(self, text: str) -> None:
        self.pattern = text
        self._patterns = {entry: _compiled(entry, text) for entry in _entries(text)}

    def search(self, name: str) -> bool:
        return any(pattern.search(name) for pattern in self._patterns.values())

    def check(self, names: Iterable[str]) -> None:
        """Raises SettingsError for a pattern that matches none of `names`; it lists those that come near."""
        names = list(names)
        for entry, pattern in self._patterns.items():
            if any(map(pattern.search, names)):
                continue
            parts = {".".join(name.split(".")[start:]) for name in names for start in range(name.count(".") + 1)}
            near = difflib.get_close_matches(re.sub(r"^re:|[\\^$*+?]", "", entry).strip("."), parts, cutoff=0.4)
            listed = f"; near are: {', '.join(near)}" if near else ""
            raise SettingsError(f"--ignore {entry!r}: no module of the model has a name that it matches{listed}")


def _entries(text: str) -> list[str]:
    """The patterns of a list: JSON, or with commas outside of brackets."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
        return list(filter(None, found))
    entries, depth = [""], 0
    for character in re.findall(r"\\.|.", text, re.DOTALL):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            entries.append("")
        else:
            entries[-1] += character
    return [entry.strip() for entry in entries if entry.strip()] or [text]


def _compiled(entry: str, text: str) -> re.Pattern[str]:
    expression = rf"\A(?:{entry.removeprefix('re:')})" if entry.startswith("re:") else entry
    if entry[-1:].isdigit():
        expression += r"(?!\d)"
    try:
        return re.compile(expression)
    except re.error as error:
        raise SettingsError(f"--ignore {text!r}: not a regular expression ({error})") from error


def compile_ignore(pattern: str) -> Ignore:
    """Raises SettingsError when a pattern is not a regular expression."""
    return Ignore(pattern)
