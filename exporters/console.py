"""What all command-line tools share: progress bars, error messages with exit codes, and Ctrl-C."""

from __future__ import annotations

import logging
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from types import FrameType

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from swiftprune import __version__
from swiftprune.errors import SwiftpruneError

_SECONDS_BETWEEN_LINES = 15


def make_console(*, stderr: bool = False) -> Console:
    """Names of files and values are shown as they are: no `:name:` in them becomes an emoji."""
    return Console(stderr=stderr, emoji=False)


class ProgressBars:
    """Shows each stage as a bar with the time it will still take; in a log, as a line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console = console or make_console(stderr=True)
        self._began: dict[str, float] = {}
        self._last_line = time.monotonic()
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description:24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        from transformers.utils import logging as transformers_logging  # slow to import, so not for --help

        transformers_logging.disable_progress_bar()  # its bars would break into these
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def notify(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def __call__(self, stage: str, done: float, total: float) -> None:
        if not self._console.is_terminal:
            self._line(stage, done, total)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def _line(self, stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        began = self._began.setdefault(stage, now)
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = f", about {(now - began) * (total - done) / done:.0f} s left" if now > began and 0 < done < total else ""
        self._console.print(
            f"{stage}: {done:,.0f} of {total:,.0f} after {now - began:.0f} s{left}", highlight=False, soft_wrap=True
        )


def run(app: Callable[[], object]) -> None:
    """Runs a command-line app with swiftprune's logging, error messages and exit codes, and `--version`."""
    if sys.argv[1:] == ["--version"]:
        found = installed_versions(("torch", "transformers", "onnxruntime", "vllm"))
        libraries = ", ".join(f"{name} {version}" for name, version in found.items())
        print(f"swiftprune {__version__}, Python {platform.python_version()}, {libraries}")
        return
    console = make_console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        app()
    except SwiftpruneError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Those of `packages` that are installed."""
    found = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@contextmanager
def signals_as_keyboard_interrupt(*, alone: bool) -> Iterator[None]:
    """KeyboardInterrupt on Ctrl-C even where C code, in which it came, made another exception of it (torch does).

    And on SIGTERM, where this process is `alone`: one of several that waits for the others in C code would never end.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(number, frame)

    # Only those that are as they were: not what is ignored in the background, or handled by a program that runs this.
    defaults = {signal.SIGINT: signal.default_int_handler} | ({signal.SIGTERM: signal.SIG_DFL} if alone else {})
    taken = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}
    for number in taken:
        signal.signal(number, note)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, default in taken.items():
            signal.signal(number, default)
