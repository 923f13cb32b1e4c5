"""Keeping freed memory for the next tensor, on processors with the GNU C library.

The C library gives large blocks back to the system as soon as they are free, and gets them again,
page by page and zeroed, for the next tensor of the same size: half of a training step's time can
go there. With the thresholds raised, what a step frees serves the next step. No number changes.

GPUs are not concerned: PyTorch keeps their memory itself.
"""

from __future__ import annotations

import ctypes
import functools
import os

__all__ = ["keep_freed_memory"]

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8

_KEPT = 1 << 30
_PADDING = 64 << 20
# Older C libraries refuse more than 32 MiB.
_LARGEST = (256 << 20, 32 << 20)


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory, for blocks of up to 256 MiB.

    Whoever has set the C library's own variables (`MALLOC_...`) or another allocator
    (`LD_PRELOAD`) is left alone.

    Returns:
        Whether it does.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  Others' mallopt means other things.
    except (OSError, AttributeError, TypeError):
        return False
    if not any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST):
        return False
    # Stages run in threads, whose own arenas would give back what they freed.
    return all(
        mallopt(name, value)
        for name, value in ((_ARENA_MAX, 1), (_TOP_PAD, _PADDING), (_TRIM_THRESHOLD, _KEPT))
    )
