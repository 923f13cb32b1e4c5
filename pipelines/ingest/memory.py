"""Giving memory back to the system.

glibc takes large blocks from the system one by one and returns each when it is freed, but raises
the size from which it does so (128 kB at first) to that of the largest block freed so far. From
then on blocks of many megabytes come out of a heap, whose holes add up to several times what is
in use.
"""

from __future__ import annotations

import contextlib
import ctypes

__all__ = ["return_large_blocks"]

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 2**20


def return_large_blocks() -> None:
    """Have blocks of 1 MiB and more returned as soon as they are freed, in this whole process.

    It costs the faults of fresh pages. Where the C library is not glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
