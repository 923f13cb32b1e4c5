"""Ctrl-C and termination: first asked for, and insisted on if that takes too long."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipelines import cancellation

__all__ = ["PATIENCE", "ending_softly"]

PATIENCE = 8.0
"""Seconds that the work has to come to a resumable point."""


@contextmanager
def ending_softly() -> Iterator[None]:
    """Let Ctrl-C (SIGINT) and SIGTERM stop the work at its next resumable point.

    A second one, or a work that has not stopped after some seconds, is interrupted at once: what
    it did since its last resumable point is done anew later. Does nothing in a thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer: threading.Timer | None = None

    def insist() -> None:
        signal.raise_signal(signal.SIGINT)

    def heed(number: int, frame: FrameType | None) -> None:
        nonlocal timer
        if cancellation.requested() is not None:
            raise KeyboardInterrupt
        cancellation.request(signal.Signals(number).name)
        timer = threading.Timer(PATIENCE, insist)
        timer.daemon = True
        timer.start()

    with cancellation.lasting():
        before = {s: signal.signal(s, heed) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if timer is not None:
                timer.cancel()
