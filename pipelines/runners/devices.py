"""The devices of this machine, and stages that run on whichever of them is free.

Where there is one device only, stages run in this process, all in one thread. Otherwise each
device has a process of its own, which sees no other GPU; a stage goes to a process that is idle.
Shards, which are worked on side by side, have equal shares of the processor's threads; any other
stage has them all. A process that ends under a stage fails this stage only, and another takes its
place.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import queue
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipelines import cancellation
from pipelines.runners.processors import usable_threads
from pipelines.runners.work_thread import WorkThread
from storage_schemas.config.runner import LocalRunner

if TYPE_CHECKING:
    from pipelines.runners.worker_process import WorkerProcess

__all__ = [
    "GPUS_VARIABLE",
    "GRACE_SECONDS",
    "THREADS_VARIABLE",
    "VISIBLE_VARIABLE",
    "Device",
    "DevicePool",
    "WorkerDied",
    "choose_devices",
    "count_gpus",
    "current",
    "find_stage",
    "open_devices",
    "threads_of_each",
    "visible_gpus",
]

GRACE_SECONDS = 5.0
"""Seconds in which a process that was asked to end may reach a resumable point."""
THREADS_VARIABLE = "DIFFEM_THREADS"
"""Environment variable of a worker: the threads that it may use; `build_device` obeys it."""
GPUS_VARIABLE = "DIFFEM_GPUS"
"""Environment variable of a worker: all GPUs of the run, as `CUDA_VISIBLE_DEVICES` would name
them, while the worker itself is bound to one."""
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable of CUDA: the GPUs that a process may use."""

_POLL_SECONDS = 0.1

# Stages that run on all devices at once.
_SIDE_BY_SIDE = frozenset({"e_step_shard", "draw_shards"})

# Stages of using a run, which are no part of it: where each is.
_OF_USING = {"draw_shards": "pipelines.using.drawing"}


class WorkerDied(RuntimeError):
    """A worker process ended while it did a stage: a fault of the machine, not of the stage."""


@dataclass(frozen=True)
class Device:
    """Where a worker works."""

    name: str
    """For messages: 'GPU 1', 'processor'."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What binds a process to it, if set before PyTorch is imported."""


class DevicePool:
    """Does stages on the devices that are free; its processes start with it.

    Arguments:
        config: Devices, workers and threads.
    """

    def __init__(self, config: LocalRunner) -> None:
        self._workers: list[WorkerProcess] = []
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._threads = _threads(config)
        self._closed = False
        self._outer: DevicePool | None = None
        self._keeper: ThreadPoolExecutor | None = None
        self._thread = WorkThread()
        self._opened: Future[int] = Future()
        if _one_at_most(config):
            self._opened.set_result(1)
        else:
            # Linux kills a process when the thread that started it ends, so one thread, which
            # lasts as long as the pool, starts them all. It also asks PyTorch for the GPUs.
            self._keeper = ThreadPoolExecutor(1, thread_name_prefix="diffem-devices")
            self._opened = self._keeper.submit(self._open, config)

    def _open(self, config: LocalRunner) -> int:
        devices = choose_devices(config, count_gpus() if _has_cuda(config) else 0)
        if len(devices) > 1:
            from pipelines.runners.worker_process import WorkerProcess

            for number, device in enumerate(devices):
                self._workers.append(WorkerProcess(number, device))
            for worker in self._workers:
                self._idle.put(worker)
        return len(devices)

    @property
    def size(self) -> int:
        """Stages that run side by side. Where there may be a GPU, asking waits for PyTorch."""
        return self._opened.result()

    @property
    def here(self) -> bool:
        """Whether stages run in this process."""
        return self.size == 1

    @property
    def pids(self) -> list[int]:
        """Numbers of the worker processes; empty where stages run in this process."""
        return [worker.pid for worker in self._workers] if self.size > 1 else []

    def call(self, stage: str, *args: Any) -> Any:
        """Do a stage on a device that is free, and wait for it; threads may call side by side.

        Arguments:
            stage: Name of a function in `pipelines.stages`.
            args: Its arguments, JSON.

        Returns:
            What it returns, JSON.

        Raises:
            Cancelled: An end was asked for, or the pool was closed.
            WorkerDied: The worker process ended under it.
            ValueError: There is no such stage.
            BaseException: Whatever the stage raises; an error that JSON cannot describe comes as
                a FloatingPointError, ValueError, OSError or RuntimeError that names its type.
        """
        cancellation.check()
        if self.here:
            return self._thread.call(find_stage(stage), *args)
        worker = self._take()
        try:
            self._revive(worker)
            return worker.call(stage, args, None if stage in _SIDE_BY_SIDE else self._threads)
        except WorkerDied:
            if self._closed:
                raise cancellation.Cancelled("the devices were closed") from None
            raise
        finally:
            self._idle.put(worker)

    def _take(self) -> WorkerProcess:
        while True:
            cancellation.check()
            if self._closed:
                raise cancellation.Cancelled("the devices were closed")
            try:
                return self._idle.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

    def _revive(self, worker: WorkerProcess) -> None:
        """Replace a process that has ended."""
        if not worker.alive:
            assert self._keeper is not None
            try:
                restarted = self._keeper.submit(self._restart, worker)
            except RuntimeError:
                raise cancellation.Cancelled("the devices were closed") from None
            restarted.result()

    def _restart(self, worker: WorkerProcess) -> None:
        if self._closed:
            raise cancellation.Cancelled("the devices were closed")
        worker.restart()

    def close(self) -> None:
        """End the processes: each is asked first, and killed after some seconds."""
        self._thread.close()
        if self._closed or self._keeper is None:
            return
        self._closed = True
        self._keeper.submit(self._end).result()
        self._keeper.shutdown()

    def _end(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.ask_to_end()
        for worker in self._workers:
            worker.end(deadline)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Self:
        global _current
        self._outer, _current = _current, self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _current
        _current = self._outer
        self.close()


_current: DevicePool | None = None


def current() -> DevicePool | None:
    """Return the pool whose context is open in this process, if there is one."""
    return _current


def open_devices(config: LocalRunner) -> DevicePool:
    """Open the devices that a config asks for; their processes start at once."""
    return DevicePool(config)


def choose_devices(config: LocalRunner, gpus: int) -> tuple[Device, ...]:
    """Choose what the workers work on: each GPU in turn, or equal parts of the processor.

    Arguments:
        config: Devices, workers and threads.
        gpus: GPUs that this process may use, `CUDA_VISIBLE_DEVICES` already heeded.

    Returns:
        One device per worker; their threads add up to those of the config, or are one each.
    """
    several = gpus if config.device in ("auto", "cuda") else 0
    workers = config.workers or max(1, several)
    shared = threads_of_each(config, workers)
    if not several:
        name = config.device if config.device.startswith("cuda:") else "processor"
        return (Device(name, shared),) * workers
    visible = visible_gpus(gpus)
    shared[GPUS_VARIABLE] = ",".join(visible)
    bound = [visible[worker % gpus] for worker in range(workers)]
    return tuple(Device(f"GPU {gpu}", {**shared, VISIBLE_VARIABLE: gpu}) for gpu in bound)


def threads_of_each(config: LocalRunner, processes: int) -> dict[str, str]:
    """Return the environment that gives each of some processes its part of the threads."""
    threads = str(max(1, _threads(config) // processes))
    return {THREADS_VARIABLE: threads, "OMP_NUM_THREADS": threads}


def visible_gpus(gpus: int) -> list[str]:
    """Name the first GPUs that the run may use, as `CUDA_VISIBLE_DEVICES` does.

    A worker is bound to one of them, but told of all.
    """
    given = os.environ.get(GPUS_VARIABLE) or os.environ.get(VISIBLE_VARIABLE)
    named = [str(i) for i in range(gpus)] if given is None else given.split(",")
    return [gpu.strip() for gpu in named[:gpus]]


def count_gpus() -> int:
    """Count the GPUs that the run may use, without taking hold of any; imports PyTorch.

    Returns:
        The number, also in a worker that is bound to one of them.
    """
    if told := os.environ.get(GPUS_VARIABLE):
        return len(told.split(","))
    import torch

    return torch.cuda.device_count()


def _threads(config: LocalRunner) -> int:
    """Count the processor's threads that the run may use."""
    return config.threads or usable_threads()


def _one_at_most(config: LocalRunner) -> bool:
    """Tell, without importing anything, whether there is surely no second device."""
    if config.workers is not None:
        return config.workers == 1
    return not _has_cuda(config)


def _has_cuda(config: LocalRunner) -> bool:
    """Tell whether GPUs are asked for and the driver that each needs is installed."""
    if config.device not in ("auto", "cuda"):
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def find_stage(name: str) -> Callable[..., Any]:
    """Find a stage by its name, in `pipelines.stages` or among those of using a run.

    Raises:
        ValueError: There is none of this name.
    """
    from pipelines import stages

    if name not in stages.__all__ and name not in _OF_USING:
        known = ", ".join((*stages.__all__, *_OF_USING))
        raise ValueError(f"there is no stage {name!r}; known are {known}")
    module = importlib.import_module(_OF_USING.get(name, stages.__name__))
    found: Callable[..., Any] = getattr(module, name)
    return found
