"""How much memory something takes at its peak: of this process, or of a GPU."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "base_memory", "highest_memory", "peak_memory"]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """A peak, once the context is left."""

    bytes: int = 0
    """Bytes beyond those that were taken before."""


def base_memory() -> int:
    """Return the bytes that this process takes now."""
    return _status("VmRSS:") or _used()


def highest_memory() -> int:
    """Return the most bytes that this process has taken so far."""
    return _status("VmHWM:") or _used()


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure by how much memory rises inside the context: of the GPU, or of the process.

    Where the system does not forget an earlier peak when it is asked to (anywhere but on Linux),
    a rise below that is not seen.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
        return
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
    before = base_memory()
    yield peak
    peak.bytes = max(0, highest_memory() - before)


def _status(key: str) -> int:
    """Read a number of KiB of Linux's account of this process; 0 elsewhere."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    return int(text.partition(key)[2].split()[0]) * 1024


def _used() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
