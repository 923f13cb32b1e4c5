"""Which errors are worth another try: faults of storage and devices, never a caller's mistake."""

from __future__ import annotations

import errno
from typing import Any

__all__ = ["PAUSES", "StageFailed", "is_fault", "worth_retrying"]

PAUSES = (1.0, 4.0, 15.0, 60.0)
"""Seconds before the repetitions of a stage; the last pause stands for all that follow."""

# A full disk, a missing permission and the like do not pass by themselves.
_LASTING = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
})  # fmt: skip
_DEVICE_ERRORS = frozenset({"AcceleratorError", "OutOfMemoryError", "WorkerDied", "RankDied"})


class StageFailed(RuntimeError):
    """A stage of an iteration failed for good; the message names it and the reason."""


def is_fault(error: BaseException) -> bool:
    """Tell whether an error may be gone at the next attempt.

    Arguments:
        error: What a stage raised.

    Returns:
        True for faults of storage (requests that failed after their own repetitions, connections,
        time-outs) and of devices (out of memory, a dead worker, errors of the driver); False for
        ValueError, numbers that are not finite, damage, a full disk, missing permissions.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _DEVICE_ERRORS:
        return True
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Decide about a repetition, as Prefect asks: see `is_fault`."""
    error = state.data
    return isinstance(error, BaseException) and is_fault(error)
