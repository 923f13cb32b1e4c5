"""One thread in which all stages of a process compute, whichever thread asks for them.

OpenMP keeps a team of threads for every thread that ever computed. As soon as teams have more
threads than there are processors, all of them sleep between two parallel loops where they would
wait actively, and a small network trains and samples a fifth slower. Prefect calls the stages of
each flow run from other threads.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines import cancellation

__all__ = ["WorkThread"]


class WorkThread:
    """Does one call after the other, in a thread that is started by the first."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="diffem-work")
        self._number: int | None = None

    def call(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do `work` in the thread, in the caller's context, and wait for it.

        Raises:
            Cancelled: The thread takes no more calls.
            BaseException: What `work` raises.
        """
        if threading.get_ident() == self._number:
            return work(*args)
        try:
            done = self._threads.submit(contextvars.copy_context().run, self._do, work, *args)
        except RuntimeError:
            raise cancellation.Cancelled("the devices were closed") from None
        return done.result()

    def _do(self, work: Callable[..., Any], *args: Any) -> Any:
        self._number = threading.get_ident()
        return work(*args)

    def close(self) -> None:
        """Take no more calls; those that were taken go on, to their ends or where they stop."""
        self._threads.shutdown(wait=False)
