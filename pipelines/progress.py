"""Showing how far the work is: bars on a terminal, one line per finished stage elsewhere.

Stages report to the process's reporter; where nobody set one (a worker, a test, a library caller)
they report to nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = [
    "Advance",
    "LineReporter",
    "Reporter",
    "SilentReporter",
    "TerminalReporter",
    "reporter",
    "reporter_on",
    "stage",
    "use_reporter",
]

Advance = Callable[[int], None]
"""Called with the number of items just finished."""


class Reporter(Protocol):
    """What stages report to."""

    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """Open a stage of `total` items, `done` of them there already; yields what advances it."""
        ...

    def note(self, text: str) -> None:
        """Print one line."""
        ...


class SilentReporter:
    """Reports to nobody."""

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        """Count nothing."""
        yield lambda _: None

    def note(self, text: str) -> None:
        """Say nothing."""


class LineReporter:
    """Prints a line when a stage ends: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        """Count the items and print their number, the seconds and the rate at the end."""
        count, begin = 0, time.perf_counter()

        def advance(items: int) -> None:
            nonlocal count
            count += items

        yield advance
        seconds = time.perf_counter() - begin
        of = "" if total is None else f" of {total:,}"
        amount = f"{done + count:,}{of} {unit} in " if unit else ""
        rate = f", {count / seconds:,.0f} {unit}/s" if count and seconds > 0 else ""
        self.note(f"{name}: {amount}{seconds:.1f} s{rate}")

    def note(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Items per second since the stage began."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["done"]
        elapsed = task.finished_time if task.finished else task.elapsed
        if not done or not elapsed:
            return Text("")
        return Text(f"{done / elapsed:,.0f} {task.fields['unit']}/s", style="progress.data.speed")


class TerminalReporter:
    """Draws a bar with rate and time left for each running stage; a finished one's disappears."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=8,
        )
        self._lock = threading.Lock()
        self._running = 0

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        """Show a bar while the stage runs."""
        with self._lock:
            if self._running == 0:
                self._progress.start()
            self._running += 1
        task = self._progress.add_task(name, total=total, completed=done, unit=unit, done=done)
        try:
            yield lambda items: self._progress.advance(task, items)
        finally:
            self._progress.remove_task(task)
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._progress.stop()

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def reporter_on(console: Console) -> Reporter:
    """Return what reports to a console: bars on a terminal, lines elsewhere."""
    return TerminalReporter(console) if console.is_terminal else LineReporter(console)


_reporter: Reporter = SilentReporter()


def reporter() -> Reporter:
    """Return the process's reporter."""
    return _reporter


@contextmanager
def use_reporter(new: Reporter) -> Iterator[None]:
    """Let all stages of this process report to `new` inside the context."""
    global _reporter
    old, _reporter = _reporter, new
    try:
        yield
    finally:
        _reporter = old


def stage(
    name: str, *, total: int | None, unit: str, done: int = 0
) -> AbstractContextManager[Advance]:
    """Open a stage on the process's reporter."""
    return _reporter.stage(name, total=total, unit=unit, done=done)
