"""How much memory a process has taken, as the system tells it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["base_memory", "highest_memory", "peak_of"]


def base_memory() -> int:
    """Return the bytes that this process takes now; where only its peak is known, that."""
    return _status("self", "VmRSS:") or _used()


def highest_memory() -> int:
    """Return the most bytes that this process has taken so far."""
    return peak_of("self") or _used()


def peak_of(pid: int | str) -> int:
    """Return the most bytes that a process has taken so far; 0 if it has ended, or off Linux.

    Unlike `ru_maxrss`, this is not inherited from the process that started it.

    Arguments:
        pid: Its number, or "self".
    """
    return _status(pid, "VmHWM:")


def _status(pid: int | str, key: str) -> int:
    """Read a number of KiB of Linux's account of a process; 0 where there is none."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    words = text.partition(key)[2].split(maxsplit=1)
    return int(words[0]) * 1024 if words else 0  # A process that has just ended has no memory.


def _used() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
