"""Errors a user can act on, each with the exit code the command line ends with.

Exit codes: 0 done; 1 a bug in swiftprune; 2 wrong settings, or a result file that cannot be used; 3 the checkpoint
cannot be used; 4 the calibration or evaluation text cannot be used; 5 the output cannot be written; 6 packed data
breaks the 2:4 format; 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sized


class SwiftpruneError(Exception):
    """Base of all errors that carry a message meant for the user."""

    exit_code = 1


class SettingsError(SwiftpruneError):
    """A setting is unknown, out of range, or contradicts another one."""

    exit_code = 2


class ResultError(SwiftpruneError):
    """A result file is missing, damaged, or of a version that is not supported."""

    exit_code = 2


class CheckpointError(SwiftpruneError):
    """The source checkpoint is missing, damaged, or of a kind that is not supported."""

    exit_code = 3


class TextError(SwiftpruneError):
    """The calibration or evaluation text is missing, empty or too short."""

    exit_code = 4


class OutputError(SwiftpruneError):
    """The output folder exists, is unfinished under other settings, or cannot be written."""

    exit_code = 5


class FormatError(SwiftpruneError):
    """A tensor breaks the packed 2:4 format."""

    exit_code = 6


class InterruptedByUserError(SwiftpruneError):
    """The user stopped the run (Ctrl-C, or SIGTERM)."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def and_more(names: Sized) -> str:
    """What follows the first of `names` in a message that lists no other."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
