"""A stage once for each of some arguments, side by side, outside of any flow."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Protocol

from pipelines.faults import PAUSES, is_fault
from pipelines.progress import reporter

__all__ = ["Pool", "fan_out"]

_LOOK_SECONDS = 0.5


class Pool(Protocol):
    """What does stages side by side: this machine's devices, or a cluster."""

    @property
    def size(self) -> int:
        """Stages that run side by side."""
        ...

    @property
    def here(self) -> bool:
        """Whether they run in this process."""
        ...

    def call(self, stage: str, *args: Any) -> Any:
        """Do a stage and wait for it; threads may call side by side."""
        ...

    def close(self) -> None:
        """Ask whatever runs to end at its next resumable point."""
        ...


def fan_out(
    pool: Pool,
    stage: str,
    calls: Sequence[tuple[Any, ...]],
    *,
    retries: int,
    while_waiting: Callable[[], None],
) -> None:
    """Do a stage once for each of some arguments, side by side, and wait for all.

    Arguments:
        pool: Where.
        stage: Name of the stage.
        calls: Its arguments, JSON.
        retries: How often a call is tried again after a fault of storage or device, with growing
            pauses.
        while_waiting: Called now and then; what it raises ends the work.

    Raises:
        BaseException: What a call or `while_waiting` raised first; the others have been ended.
    """
    ended = threading.Event()

    def call(arguments: tuple[Any, ...]) -> None:
        for pause in itertools.islice(
            itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])), retries
        ):
            try:
                pool.call(stage, *arguments)
                return
            except Exception as error:
                if not is_fault(error) or ended.is_set():
                    raise
                reporter().note(f"{error}; trying again in {pause:g} s")
                ended.wait(pause)
        pool.call(stage, *arguments)

    with ThreadPoolExecutor(len(calls), thread_name_prefix="diffem-call") as threads:
        pending = {threads.submit(call, arguments) for arguments in calls}
        try:
            while pending:
                done, pending = wait(pending, _LOOK_SECONDS, FIRST_EXCEPTION)
                while_waiting()
                for finished in done:
                    finished.result()
        except BaseException:
            ended.set()
            pool.close()
            raise
