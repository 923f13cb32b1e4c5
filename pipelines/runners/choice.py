"""Runner config to what carries out its work: devices of this machine, or a Ray cluster."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, assert_never

from pipelines.faults import PAUSES, is_fault
from pipelines.progress import reporter
from pipelines.runners.distributed import training_workers
from storage_schemas.config import LocalRunner, RayRunner
from storage_schemas.config import RunnerConfig as Config

__all__ = [
    "Pool",
    "fan_out",
    "open_pool",
    "open_runner",
    "shard_resources",
    "task_runner",
    "trains_from_here",
]

_LOOK_SECONDS = 0.5


class Pool(Protocol):
    """What does stages side by side, outside of any flow."""

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


def open_runner(config: Config) -> AbstractContextManager[Any]:
    """Return a context in which this machine's devices, or the cluster, are ready for stages."""
    match config:
        case LocalRunner():
            from pipelines.runners.devices import open_devices

            return open_devices(config)
        case RayRunner():
            from pipelines.runners.ray import cluster

            return cluster(config)
    assert_never(config)


def task_runner(config: Config) -> Any:
    """Return the Prefect task runner that maps shards."""
    match config:
        case LocalRunner():
            from prefect.task_runners import ThreadPoolTaskRunner

            from pipelines.runners.devices import current

            pool = current()
            return ThreadPoolTaskRunner(max_workers=1 if pool is None else pool.size)
        case RayRunner():
            from pipelines.runners.ray import build_ray_task_runner

            return build_ray_task_runner(config)
    assert_never(config)


def shard_resources(config: Config) -> AbstractContextManager[Any]:
    """Return a context in which tasks are submitted with the resources that a shard takes."""
    match config:
        case LocalRunner():
            return nullcontext()
        case RayRunner():
            from pipelines.runners.ray import shard_resources as resources

            return resources(config)
    assert_never(config)


def trains_from_here(config: Config) -> bool:
    """Tell whether the M-step has to be called by the flow's own process.

    A training in several processes of a cluster asks for their resources itself; as a task of the
    cluster it would hold some of them and wait for the rest.
    """
    return isinstance(config, RayRunner) and training_workers(config) > 1


def open_pool(config: Config) -> AbstractContextManager[Pool]:
    """Return a context in which stages can be done where a run's shards are, without a flow."""
    match config:
        case LocalRunner():
            from pipelines.runners.devices import open_devices

            return open_devices(config)
        case RayRunner():
            from pipelines.runners.ray import open_cluster_pool

            return open_cluster_pool(config)
    assert_never(config)


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
