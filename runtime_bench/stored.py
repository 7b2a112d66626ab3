"""The base of everything that is written into a result file, and how its names are shown."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict


class Stored(BaseModel):
    """Keeps the fields it does not know."""

    model_config = ConfigDict(extra="allow")


def in_table(text: str) -> str:
    """Anybody's text as GitHub should show it in a table: on one line, without markup."""
    return re.sub(r"([\\`*\[\]|<])", r"\\\1", " ".join(text.split())).replace("&", "&amp;")
