"""One line per event, in the log of the flow or task run as well, where the UI shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from pipelines.progress import Advance, Reporter
from storage_schemas.redaction import without_secrets

__all__ = ["LoggingReporter"]


class LoggingReporter:
    """Passes on to a reporter, and writes what stages report to the log of the Prefect run."""

    def __init__(self, inner: Reporter) -> None:
        self._inner = inner

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        """Write one line when the stage ends."""
        count, began = done, time.perf_counter()
        with self._inner.stage(name, total=total, unit=unit, done=done) as advance:

            def both(items: int) -> None:
                nonlocal count
                count += items
                advance(items)

            yield both
        seconds = time.perf_counter() - began
        of = "" if total is None else f" of {total:,}"
        _log(f"{name}: {count:,}{of} {unit} in {seconds:.1f} s")

    def note(self, text: str) -> None:
        """Write one line."""
        self._inner.note(text)
        _log(text)


def _log(text: str) -> None:
    try:
        logger = get_run_logger()
    except MissingContextError:  # a thread of its own, outside of flow and task runs
        return
    logger.info("%s", without_secrets(text))
