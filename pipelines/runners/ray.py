"""Stages on a Ray cluster: E-step shards as Ray tasks, the M-step as one, or as a Ray Train job.

    shard      one Ray task with `gpus_per_shard` GPUs and `cpus_per_shard` processors, through
               Prefect's task runner for Ray; a shard whose node dies is started again elsewhere
    M-step     one such task; with `m_step_workers` > 1 a Ray Train job of so many processes, each
               with the resources of a shard, that does the same stage as processes of one machine

Every process of the cluster writes to the run itself, and tells the Prefect server what it does:
both have to be reached from every node. Nothing here decides what is done; the store does.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import ray
from prefect.exceptions import CancelledRun
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from prefect_ray.task_runners import PrefectRayFuture
from ray.exceptions import RayError, RayTaskError

from pipelines import cancellation
from pipelines.runners.devices import THREADS_VARIABLE, find_stage
from pipelines.runners.distributed import TIMEOUT, RankDied
from storage_schemas.config import RayRunner

__all__ = [
    "ClusterFuture",
    "ClusterTaskRunner",
    "build_ray_task_runner",
    "cluster",
    "shard_resources",
    "train_on_cluster",
]

_POLL_SECONDS = 0.3
_ASK_SECONDS = 1.0
# What the processes of the cluster need to know of this one's settings. Secrets, such as an API
# key, are not among them: they would be shown by Ray's dashboard, and belong into the environment
# in which the nodes are started.
_PASSED_ON = (
    "DO_NOT_TRACK",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL",
    "PREFECT_SERVER_ANALYTICS_ENABLED",
)


# ------------------------------------------------------------------------------------ the cluster


@contextlib.contextmanager
def cluster(config: RayRunner) -> Iterator[None]:
    """Be connected with the cluster; inside another such context, and after `ray.init`, use that.

    Arguments:
        config: The cluster's address.

    Raises:
        ValueError: No Prefect server is named that the nodes could reach.
        ConnectionError: There is no cluster.
    """
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(**_init_arguments(config))
    except ConnectionError as error:
        raise ConnectionError(
            f"runner.address is {config.address!r}, but no Ray cluster answers there ({error}); "
            "start one with `ray start --head`, join it with `ray start --address HOST:PORT`, and "
            "run this command on one of its nodes"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def build_ray_task_runner(config: RayRunner) -> ClusterTaskRunner:
    """Build the task runner whose tasks are tasks of the cluster.

    Raises:
        ValueError: No Prefect server is named that the nodes could reach.
    """
    arguments = _init_arguments(config)
    # Given 'auto' for itself, the runner would start a cluster of its own.
    return ClusterTaskRunner(init_kwargs=arguments)


def shard_resources(config: RayRunner) -> AbstractContextManager[Any]:
    """Return a context in which tasks are submitted with the resources that a shard takes."""
    return remote_options(num_gpus=config.gpus_per_shard, num_cpus=config.cpus_per_shard)


def _init_arguments(config: RayRunner) -> dict[str, Any]:
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    threads = config.threads or max(1, int(config.cpus_per_shard))
    return {
        "address": config.address,
        "namespace": "prefect",
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {
            "env_vars": {
                **passed_on,
                "PREFECT_API_URL": _api_url(),
                THREADS_VARIABLE: str(threads),
            }
        },
    }


def _api_url() -> str:
    """Return the address of the Prefect server.

    Raises:
        ValueError: There is none.
    """
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if url is None:
        raise ValueError(
            "runner.kind is 'ray', but PREFECT_API_URL is not set, and each process of the "
            "cluster would start a Prefect server of its own; start one that all nodes can reach "
            "(prefect server start --host 0.0.0.0) and set PREFECT_API_URL to "
            "http://HOST:4200/api"
        )
    return str(url)


# --------------------------------------------------------------------------------------- shards


class ClusterFuture(PrefectRayFuture[Any]):
    """A task on the cluster; waiting for it ends as soon as an end is asked for."""

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> Any:
        """Wait for the task and return its result.

        Raises:
            CancelledRun: An end was asked for; the task is cancelled.
            BaseException: What the task raised.
        """
        self.wait(timeout)
        return super().result(timeout=timeout, raise_on_failure=raise_on_failure)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task.

        Raises:
            CancelledRun: An end was asked for; the task is cancelled.
        """
        waited = 0.0
        while timeout is None or waited < timeout:
            ready, _ = ray.wait([self.wrapped_future], timeout=_POLL_SECONDS)
            if ready:
                break
            waited += _POLL_SECONDS
            reason = cancellation.requested()
            if reason is not None:
                # An unfinished shard leaves nothing behind: its object is written in one piece.
                ray.cancel(self.wrapped_future, force=True)
                raise CancelledRun(reason)
        else:
            return
        super().wait(timeout)


class ClusterTaskRunner(RayTaskRunner[Any]):
    """Prefect's task runner for Ray, whose futures heed `cancellation`."""

    def submit(self, *args: Any, **kwargs: Any) -> ClusterFuture:
        """Submit a task to the cluster; see `RayTaskRunner.submit`."""
        future = super().submit(*args, **kwargs)
        return ClusterFuture(
            task_run_id=future.task_run_id, wrapped_future=future.wrapped_future
        )


# --------------------------------------------------------------------------------------- training


class _Wish:
    """An actor that knows whether the training should end, and why."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def set(self, reason: str) -> None:
        self._reason = reason

    def get(self) -> str | None:
        return self._reason


def train_on_cluster(stage: str, args: Sequence[Any], config: RayRunner, size: int) -> None:
    """Do a stage that trains in several processes of the cluster; what it makes is in the run.

    Arguments:
        stage: Name of a stage that asks `current_group()`.
        args: Its arguments, JSON.
        config: The cluster, and the resources of each process.
        size: How many.

    Raises:
        Cancelled: An end was asked for, and the checkpoint is written.
        RankDied: A process ended under it, or its node did.
        BaseException: What the stage raised in one of the processes.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = config.gpus_per_shard > 0
    # Ray Train changes into a folder of its own, in which `module:Name` would not be found.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    with cluster(config), tempfile.TemporaryDirectory(prefix="diffem-ray-") as folder:
        wish = ray.remote(num_cpus=0)(_Wish).remote()
        trainer = TorchTrainer(
            _as_worker,
            train_loop_config={"stage": stage, "args": list(args), "wish": wish},
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if gpus else "gloo",
                timeout_s=int(TIMEOUT.total_seconds()),
            ),
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=gpus,
                resources_per_worker={
                    "CPU": config.cpus_per_shard,
                    **({"GPU": max(1.0, config.gpus_per_shard)} if gpus else {}),
                },
            ),
            # The flow decides about another try, which goes on from the checkpoint.
            run_config=RunConfig(
                name="training", storage_path=folder, failure_config=FailureConfig(max_failures=0)
            ),
        )
        # In the main thread, Ray Train would take over Ctrl-C for good.
        with ThreadPoolExecutor(1, thread_name_prefix="diffem-ray-train") as pool:
            fit = pool.submit(trainer.fit)
            told = False
            while True:
                with contextlib.suppress(NotYet):
                    error = fit.exception(timeout=_POLL_SECONDS)
                    break
                reason = cancellation.requested()
                if reason is not None and not told:
                    wish.set.remote(reason)
                    told = True
        if error is not None:
            _raise_cause(error, size)
    if fit.result().return_value != "done":
        raise cancellation.Cancelled(cancellation.requested() or "the training was ended")


def _as_worker(given: dict[str, Any]) -> str:
    """Do a stage as one of the processes of a Ray Train job, which have joined their group."""
    done = threading.Event()
    cancellation.allow()
    threading.Thread(target=_heed, args=(given["wish"], done), daemon=True).start()
    try:
        find_stage(given["stage"])(*given["args"])
    except cancellation.Cancelled as reason:
        return f"cancelled: {reason}"
    finally:
        done.set()
    return "done"


def _heed(wish: Any, done: threading.Event) -> None:
    """Ask this process to stop when the training should."""
    while not done.wait(_ASK_SECONDS):
        with contextlib.suppress(RayError):
            reason = ray.get(wish.get.remote(), timeout=_ASK_SECONDS)
            if reason is not None:
                cancellation.request(reason)
                return


def _raise_cause(error: BaseException, size: int) -> NoReturn:
    """Raise what one of the processes raised, or that one has gone.

    A process whose partner has gone fails as well, with a broken connection; the partner says
    nothing, and Ray calls it dead.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    causes = {rank: _original(failure) for rank, failure in failures.items()}
    for rank, cause in causes.items():
        if isinstance(cause, RayError):
            raise RankDied(
                f"process {rank} of the {size} of a training is gone ({cause}); the others were "
                "ended, and the same command goes on from the last checkpoint"
            ) from error
    told = [cause for cause in causes.values() if not _is_broken_connection(cause)]
    raise (told or list(causes.values()) or [error])[0]


def _original(failure: BaseException) -> BaseException:
    """Return what the stage raised, without Ray's wrappers."""
    inner = getattr(failure, "base_exc", None) or failure.__cause__
    if isinstance(failure, RayTaskError):
        inner = failure.cause
    return failure if not isinstance(inner, BaseException) else _original(inner)


def _is_broken_connection(cause: BaseException) -> bool:
    kind = type(cause).__name__
    return kind == "DistNetworkError" or "onnection" in str(cause)
