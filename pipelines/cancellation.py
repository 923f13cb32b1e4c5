"""Stopping work that is going on: asked for from anywhere, heeded at the next resumable point.

Python can interrupt neither a thread nor a library in the middle of its work. So whoever wants an
end (Ctrl-C, a termination signal, a cancelled flow run, the death of the parent process) asks for
it here, and the work looks here wherever it could stop without losing anything: after each batch
of an E-step, and after each step of an M-step, which writes a checkpoint first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Cancelled", "allow", "begin", "check", "lasting", "request", "requested"]


class Cancelled(BaseException):
    """The work was asked to stop and stopped at a resumable point.

    Like KeyboardInterrupt it is no Exception, so that nothing takes it for a fault and tries
    again.
    """


_asked = threading.Event()
_reason = ""
_lasts = False


def request(reason: str) -> None:
    """Ask all work of this process to stop at its next resumable point; may be called again."""
    global _reason
    if not _asked.is_set():
        _reason = reason
        _asked.set()


def requested() -> str | None:
    """Return why an end was asked for; None if nobody did."""
    return _reason if _asked.is_set() else None


def check() -> None:
    """Stop here if an end was asked for.

    Raises:
        Cancelled: It was.
    """
    if _asked.is_set():
        raise Cancelled(_reason)


@contextmanager
def lasting() -> Iterator[None]:
    """Let an end that is asked for in this context last until its end, whatever begins in it.

    What was asked for before is forgotten, and so is what was asked for in it afterwards.
    """
    global _lasts
    allow()
    _lasts = True
    try:
        yield
    finally:
        _lasts = False
        allow()


def begin() -> None:
    """Forget what was asked of an earlier run of this process, outside of `lasting`."""
    if not _lasts:
        allow()


def allow() -> None:
    """Forget that an end was asked for."""
    global _reason
    _reason = ""
    _asked.clear()
