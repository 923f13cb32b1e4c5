"""Stopping work that is going on: asked for from anywhere, heeded at the next resumable point.

Python can interrupt neither a thread nor a library in the middle of its work. So whoever wants an
end (Ctrl-C, a termination signal, a cancelled flow run, the death of the parent process) asks for
it here, and the work looks here wherever it could stop without losing anything: after each batch
of an E-step, and after each step of an M-step, which writes a checkpoint first.
"""

from __future__ import annotations

import threading

__all__ = ["Cancelled", "allow", "check", "request", "requested"]


class Cancelled(BaseException):
    """The work was asked to stop and stopped at a resumable point.

    Like KeyboardInterrupt it is no Exception, so that nothing takes it for a fault and tries
    again.
    """


_asked = threading.Event()
_reason = ""


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


def allow() -> None:
    """Forget that an end was asked for: before the next run in this process."""
    global _reason
    _reason = ""
    _asked.clear()
