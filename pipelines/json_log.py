"""Progress as one JSON object per line, for programs that read logs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from pipelines.progress import Advance
from storage_schemas.redaction import without_secrets

__all__ = ["JsonReporter"]

_PLACE = re.compile(
    r"iteration (?P<iteration>\d+) · (?:(?P<stage>[^·]+?)(?: · shard (?P<shard>\d+)/\d+)?)$"
)


class JsonReporter:
    """Prints `{"time", "run", "event", "message", ...}` when a stage begins or ends.

    Events are `begin`, `end` and `note`. Stages of an iteration have `iteration` and `stage`, and
    E-step shards `shard` (from 0); ends have `done`, `total`, `unit` and `seconds`.

    Arguments:
        console: Where to.
        run: Name of the run.
    """

    def __init__(self, console: Console, *, run: str) -> None:
        self._console = console
        self._run = run

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        """Print a line at the beginning and one at the end."""
        place = _place(name)
        self._print("begin", name, **place)
        count, began = done, time.perf_counter()

        def advance(items: int) -> None:
            nonlocal count
            count += items

        yield advance
        self._print(
            "end",
            name,
            **place,
            done=count,
            total=total,
            unit=unit,
            seconds=round(time.perf_counter() - began, 3),
        )

    def note(self, text: str) -> None:
        """Print one line."""
        self._print("note", text)

    def _print(self, event: str, message: str, **more: Any) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run": self._run,
            "event": event,
            "message": without_secrets(message),
            **more,
        }
        text = json.dumps(line, ensure_ascii=False)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _place(name: str) -> dict[str, int | str]:
    """Read off a stage's name where it belongs."""
    match = _PLACE.fullmatch(name)
    if match is None:
        return {}
    place: dict[str, int | str] = {
        "iteration": int(match["iteration"]),
        "stage": match["stage"].lower(),
    }
    if match["shard"] is not None:
        place["shard"] = int(match["shard"]) - 1
    return place
