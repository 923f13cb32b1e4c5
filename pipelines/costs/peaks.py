"""How much memory something takes at its peak: of this process, or of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.process_memory import base_memory, highest_memory

__all__ = ["Peak", "peak_memory"]

_RESET = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """A peak, once the context is left."""

    bytes: int = 0
    """Bytes beyond those that were taken before."""


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
