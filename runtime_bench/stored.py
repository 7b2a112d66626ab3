"""The base of everything that is written into a result file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Stored(BaseModel):
    """Keeps the fields it does not know."""

    model_config = ConfigDict(extra="allow")
