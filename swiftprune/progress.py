"""How long work reports where it is, without knowing who shows it."""

from __future__ import annotations

from typing import Protocol


class ProgressCallback(Protocol):
    """Called with the name of a stage, how much of it is done, and its total in the same unit."""

    def __call__(self, stage: str, done: float, total: float) -> None: ...


def no_progress(stage: str, done: float, total: float) -> None:
    """Shows nothing."""


class Notify(Protocol):
    """Called with a sentence that a user wants to read before a long wait."""

    def __call__(self, text: str, /) -> None: ...


def ignore_message(text: str) -> None:
    """Tells nobody."""
