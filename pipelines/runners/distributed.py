"""Training in several processes: on devices of this machine, or on a Ray cluster.

    g = sum_r g_r         every process its part of every batch, see `diffem_core.data_parallel`

On one machine the processes are those of `worker_process`, one per device, which join a process
group of torch.distributed (nccl on GPUs, gloo on processors) as `torchrun` would have them do.
torch's own launchers are left aside for what they do not do: `torch.distributed.run` takes over
signals from the main thread only, starts the group anew where here the flow decides about that,
and returns nothing; `torch.multiprocessing.spawn` imports the caller's main module again. Neither
passes on progress, errors as they were, or a wish to stop. A group needs no port: its processes
meet in a file.

The first process alone reads the checkpoint and writes to the run; the others read what they need
from there. Every process does the same stage, which asks `current_group()` whether it has company.
"""

from __future__ import annotations

import contextvars
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from pipelines import cancellation
from pipelines.progress import SilentReporter, reporter, use_reporter
from pipelines.runners.devices import (
    GRACE_SECONDS,
    VISIBLE_VARIABLE,
    Device,
    WorkerDied,
    count_gpus,
    find_stage,
    threads_of_each,
    visible_gpus,
)
from storage_schemas.config import LocalRunner, RayRunner, RunnerConfig
from storage_schemas.run_store import RunStore

if TYPE_CHECKING:
    from diffem_core.data_parallel import DataParallel
    from pipelines.runners.worker_process import WorkerProcess

__all__ = [
    "TIMEOUT",
    "RankDied",
    "as_rank",
    "current_group",
    "rank_devices",
    "train_together",
    "training_workers",
    "trains_together",
]

TIMEOUT = timedelta(hours=1)
"""How long a process waits for the others, while the first one writes a checkpoint for example. A
process that ends is noticed at once, by whoever started it."""

_SETTLE_SECONDS = 1.0  # In which the cause of a failure is told apart from what follows from it.


class RankDied(RuntimeError):
    """A process of a training ended under it: a fault of the machine. The checkpoint is there."""

    @classmethod
    def of(cls, rank: int, size: int, cause: BaseException) -> RankDied:
        """Say which of how many, and how it is known."""
        return cls(
            f"process {rank} of the {size} of a training is gone ({cause}); the others were "
            "ended, and the same command goes on from the last checkpoint"
        )


def current_group() -> DataParallel | None:
    """Return the processes that this process trains with; None where it trains alone."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    from diffem_core.data_parallel import DataParallel

    return DataParallel()


def training_workers(config: RunnerConfig) -> int:
    """Return how many processes train together.

    Arguments:
        config: Its `m_step_workers`, or else one for each GPU of this machine that it may use; one
            on a processor, on one chosen GPU, and on a cluster.
    """
    if config.m_step_workers is not None:
        return config.m_step_workers
    if isinstance(config, LocalRunner) and config.device in ("auto", "cuda"):
        return max(1, count_gpus())
    return 1


def trains_together(stage: str, run_url: str) -> bool:
    """Tell whether a stage starts processes of its own, which need all devices of the machine."""
    if stage not in ("refine_model", "fit_prior"):
        return False
    return training_workers(RunStore.open(run_url).config.runner) > 1


def train_together(stage: str, args: Sequence[Any], config: RunnerConfig, size: int) -> None:
    """Do a stage that trains in several processes, and wait for them; what it makes is in the run.

    Arguments:
        stage: Name of a stage that asks `current_group()`.
        args: Its arguments, JSON.
        config: Where the processes are.
        size: How many.

    Raises:
        Cancelled: An end was asked for, and the checkpoint is written.
        RankDied: A process ended under it.
        ValueError: There are fewer GPUs than processes, or the cluster cannot be reached.
        BaseException: What the stage raised in one of the processes.
    """
    match config:
        case LocalRunner():
            _on_this_machine(stage, args, rank_devices(config, size))
        case RayRunner():
            from pipelines.runners.ray import train_on_cluster

            train_on_cluster(stage, args, config, size)
        case _:
            assert_never(config)


def rank_devices(config: LocalRunner, size: int) -> tuple[Device, ...]:
    """Choose what each process of a training works on: a GPU, or an equal part of the processor.

    Raises:
        ValueError: There are fewer GPUs than processes, or one is asked for by number.
    """
    gpus = count_gpus() if config.device != "cpu" else 0
    shared = threads_of_each(config, size)
    if sys.platform == "linux":  # One machine: no other address than this machine's own.
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if not gpus and not config.device.startswith("cuda"):
        return (Device("processor", shared),) * size
    if size > gpus or config.device not in ("auto", "cuda"):
        raise ValueError(
            f"runner.m_step_workers is {size} on runner.device {config.device!r}, but each takes "
            f"a GPU of its own and there are {gpus}; set m_step_workers to at most that, with "
            "device 'auto'"
        )
    bound = visible_gpus(gpus)[:size]
    return tuple(Device(f"GPU {gpu}", {**shared, VISIBLE_VARIABLE: gpu}) for gpu in bound)


def as_rank(
    stage: str, args: Sequence[Any], rank: int, size: int, backend: str, rendezvous: str
) -> Any:
    """Join the processes of a training and do a stage with them.

    Arguments:
        stage: Name of the stage.
        args: Its arguments.
        rank: Number of this process.
        size: How many there are.
        backend: Of torch.distributed.
        rendezvous: Path of a file that does not exist yet, the same for all.

    Returns:
        What the stage returns.
    """
    import torch.distributed as dist

    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=TIMEOUT
    )
    # Everybody would report the same.
    with use_reporter(reporter() if rank == 0 else SilentReporter()):
        result = find_stage(stage)(*args)
    # Where the stage raised, the others would hear of it as of a broken connection, perhaps before
    # the parent hears the reason; it ends them all.
    dist.destroy_process_group()
    return result


def _on_this_machine(stage: str, args: Sequence[Any], devices: Sequence[Device]) -> None:
    from pipelines.runners.worker_process import WorkerProcess

    cuda = any(VISIBLE_VARIABLE in device.environment for device in devices)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    size = len(devices)
    ranks: list[WorkerProcess] = []
    with tempfile.TemporaryDirectory(prefix="diffem-") as folder:
        try:
            # Linux ends them with this thread, which waits for them.
            ranks.extend(WorkerProcess(rank, device) for rank, device in enumerate(devices))
            with ThreadPoolExecutor(size, thread_name_prefix="diffem-ranks") as pool:
                calls = [
                    pool.submit(
                        contextvars.copy_context().run,  # Prefect's settings are among it.
                        process.call,
                        "as_rank",
                        [stage, list(args), rank, size, backend, str(Path(folder) / "meeting")],
                    )
                    for rank, process in enumerate(ranks)
                ]
                try:
                    _wait(calls)
                finally:
                    _end(ranks)
        finally:
            _end(ranks)
            for process in ranks:
                process.close()


def _wait(calls: Sequence[Future[Any]]) -> None:
    """Wait for all processes, or for the first that fails; raise the cause."""
    wait(calls, return_when=FIRST_EXCEPTION)
    first = next((c for c in calls if c.done() and c.exception() is not None), None)
    if first is None:
        return
    asked = isinstance(first.exception(), cancellation.Cancelled)
    wait(calls, timeout=GRACE_SECONDS if asked else _SETTLE_SECONDS)
    failed = {rank: call.exception() for rank, call in enumerate(calls) if call.done()}
    for rank, error in failed.items():
        if isinstance(error, WorkerDied):
            raise RankDied.of(rank, len(calls), error) from error
    error = first.exception()
    assert error is not None
    if asked and (reason := cancellation.requested()) is not None:
        raise cancellation.Cancelled(reason) from error  # whichever process was heard first
    raise error


def _end(ranks: Sequence[WorkerProcess]) -> None:
    """End what still runs; one that waits for another can only be killed."""
    now = time.monotonic()
    for process in ranks:
        with suppress(OSError):
            process.end(now)
