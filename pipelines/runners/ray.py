"""Stages on a Ray cluster: E-step shards as Ray tasks, the M-step as one, or as a Ray Train job.

    shard      one Ray task with `gpus_per_shard` GPUs and `cpus_per_shard` processors, through
               Prefect's task runner for Ray; a shard whose node dies is started again elsewhere
    M-step     one such task; with `m_step_workers` > 1 a Ray Train job of so many processes, each
               with the resources of a shard, that do the same stage as processes of one machine

Every process of the cluster writes to the run itself, and tells the Prefect server what it does:
both have to be reached from every node. Nothing here decides what is done; the store does.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Self

import ray
from prefect.exceptions import CancelledRun
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from prefect_ray.task_runners import PrefectRayFuture
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import AuthenticationError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import cancellation
from pipelines.embedded_server import has_server
from pipelines.runners.devices import GRACE_SECONDS, THREADS_VARIABLE, find_stage
from pipelines.runners.distributed import TIMEOUT, RankDied
from pipelines.runners.reachable import require_answer, unreachable
from pipelines.runners.wish import Wish
from storage_schemas.config import RayRunner

__all__ = [
    "ClusterFuture",
    "ClusterPool",
    "ClusterTaskRunner",
    "build_ray_task_runner",
    "cluster",
    "open_cluster_pool",
    "shard_resources",
    "train_on_cluster",
]

_POLL_SECONDS = 0.3
_ASK_SECONDS = 1.0
_WISH_SECONDS = 60.0
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
def cluster(config: RayRunner, *, for_flows: bool = True) -> Iterator[None]:
    """Be connected with the cluster; inside another such context, and after `ray.init`, use that.

    Arguments:
        config: The cluster's address.
        for_flows: Whether its processes tell a Prefect server what they do.

    Raises:
        ValueError: No Prefect server is named that the nodes could reach.
        ConnectionError: There is no cluster at the address, or it does not let this process in.
    """
    if ray.is_initialized():
        yield
        return
    arguments = _init_arguments(config, for_flows=for_flows)
    _require_answer(config.address)
    # One try, which lasts 40 s: what answers there may be no Ray cluster. Ray would try 20 times.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        ray.init(**arguments)
    except (ConnectionError, AuthenticationError) as error:
        # Ray tells of a token only in the text of what caused its error.
        if "AuthToken" in f"{error} {error.__cause__}":
            raise ConnectionError(
                f"the Ray cluster at runner.address {config.address!r} asks for a token, as "
                "`ray start --head` makes it do where ~/.ray/auth_token exists; set "
                "RAY_AUTH_MODE=token here and on every node, with that file in each home, or "
                "RAY_AUTH_MODE=disabled where all of them are started"
            ) from error
        raise unreachable(config.address, None, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(given: str) -> None:
    """Refuse an address at which nothing answers, within seconds.

    Raises:
        ConnectionError: Nothing answers, or there is no cluster for `auto` to find.
    """
    if given == "local":
        return
    address = given
    if given == "auto":
        # RAY_ADDRESS, or the cluster that was last started here, or whichever runs here; Ray has
        # no public name for that.
        try:
            address = str(canonicalize_bootstrap_address("auto"))
        except ConnectionError as error:
            raise unreachable(given, None, error) from error
    require_answer(address, given)


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
    # A process does any number of shards; on GPUs, Ray's default is one, so as to free the GPU.
    resources: AbstractContextManager[Any] = remote_options(
        num_gpus=config.gpus_per_shard, num_cpus=config.cpus_per_shard, max_calls=0
    )
    return resources


def _init_arguments(config: RayRunner, *, for_flows: bool = True) -> dict[str, Any]:
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if for_flows:
        passed_on["PREFECT_API_URL"] = _api_url()
    threads = config.threads or max(1, int(config.cpus_per_shard))
    return {
        "address": config.address,
        "namespace": "prefect",
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {
            "env_vars": {
                **passed_on,
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

    if not has_server():
        raise ValueError(
            "runner.kind is 'ray', but PREFECT_API_URL is not set, and each process of the "
            "cluster would start a Prefect server of its own; start one that all nodes can reach "
            "(prefect server start --host 0.0.0.0) and set PREFECT_API_URL to "
            "http://HOST:4200/api"
        )
    return str(get_current_settings().api.url)


# ----------------------------------------------------------------------------- asking for an end


def _wish() -> Any:
    """Return this job's actor; it is made where there is none, on this node."""
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(node_id=context.get_node_id(), soft=True)
    return (
        ray.remote(Wish)
        .options(
            name=f"diffem-wish-{context.get_job_id()}",
            get_if_exists=True,
            num_cpus=0,
            scheduling_strategy=here,
        )
        .remote()
    )


@contextlib.contextmanager
def _heeding() -> Iterator[None]:
    """Ask this process of the cluster to stop when the job should: at once, and from then on.

    Only a thread beside the work asks. Where the main thread of a task waits for an answer, Ray
    takes it for idle, gives its processor away, and starts a process for the next shard.
    """
    cancellation.allow()
    done = threading.Event()

    def heed() -> None:
        wish: Any = None
        while not done.is_set():
            try:
                # Where its node has died, another one is made.
                wish = wish or _wish()
                reason = ray.get(wish.get.remote(), timeout=10 * _ASK_SECONDS)
            except (RayError, ValueError):
                wish, reason = None, None
            if reason is not None:
                cancellation.request(reason)
                return
            done.wait(_ASK_SECONDS)

    threading.Thread(target=heed, name="diffem-wish", daemon=True).start()
    try:
        yield
    finally:
        done.set()


# --------------------------------------------------------------------------------------- shards


class ClusterFuture(PrefectRayFuture[Any]):  # type: ignore[misc]
    """A task on the cluster; when an end is asked for, it is told, and not waited for long."""

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> Any:
        """Wait for the task and return its result.

        Raises:
            CancelledRun: An end was asked for.
            BaseException: What the task raised.
        """
        self.wait(timeout)
        return super().result(timeout=timeout, raise_on_failure=raise_on_failure)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task.

        Raises:
            CancelledRun: An end was asked for, and the task did not come to a resumable point in
                some seconds. What it did since the last one is lost, no more.
        """
        try:
            if _wait(self.wrapped_future, cancellation.requested, timeout):
                super().wait(timeout)
        except cancellation.Cancelled as cancelled:
            raise CancelledRun(str(cancelled)) from None


def _wait(task: Any, ended_for: Callable[[], str | None], timeout: float | None = None) -> bool:
    """Wait for a task of the cluster; when an end is asked for, tell it, and do not wait long.

    Arguments:
        task: Ray's reference to its result.
        ended_for: Returns why an end was asked for; None if nobody did.
        timeout: Seconds to wait at most.

    Returns:
        Whether it is done.

    Raises:
        Cancelled: It did not come to a resumable point in some seconds.
    """
    limit = math.inf if timeout is None else time.monotonic() + timeout
    while not ray.wait([task], timeout=_POLL_SECONDS)[0]:
        if time.monotonic() > limit:
            return False
        reason = ended_for()
        if reason is not None and time.monotonic() > _told(reason) + GRACE_SECONDS:
            ray.cancel(task, force=True)
            raise cancellation.Cancelled(reason)
    return True


_asked: dict[str, float] = {}


def _told(reason: str) -> float:
    """Tell the job that it should end, once; return when that was."""
    job = ray.get_runtime_context().get_job_id()
    if job not in _asked:
        # Who cannot be told, because the node of the wish has died, is cancelled by force.
        with contextlib.suppress(RayError, ValueError):
            ray.get(_wish().set.remote(reason), timeout=10 * _ASK_SECONDS)
        _asked[job] = time.monotonic()
    return _asked[job]


class ClusterTaskRunner(RayTaskRunner[Any]):  # type: ignore[misc]
    """Prefect's task runner for Ray, whose tasks and futures heed `cancellation`."""

    def __enter__(self) -> Self:
        super().__enter__()
        # Tasks enter their flow's runner as well.
        if ray.get_runtime_context().get_task_id() is None:
            # It needs a process too, and shards would be first to have theirs. Where its node dies
            # just now, whoever asks next makes another.
            with contextlib.suppress(RayError, ValueError):
                ray.get(_wish().get.remote(), timeout=_WISH_SECONDS)
        return self

    def submit(self, *args: Any, **kwargs: Any) -> ClusterFuture:
        """Submit a task to the cluster; see `RayTaskRunner.submit`."""
        future = super().submit(*args, **kwargs)
        return ClusterFuture(task_run_id=future.task_run_id, wrapped_future=future.wrapped_future)

    @staticmethod
    def _run_prefect_task(*args: Any, **kwargs: Any) -> Any:
        with _heeding():
            return RayTaskRunner._run_prefect_task(*args, **kwargs)


# ---------------------------------------------------------------------------- outside of any flow


class ClusterPool:
    """Does stages as tasks of the cluster, without a flow; a task whose node dies starts again.

    Arguments:
        config: The resources of a shard.
    """

    here = False

    def __init__(self, config: RayRunner) -> None:
        self._config = config
        self._reason: str | None = None
        self._task = ray.remote(
            num_cpus=config.cpus_per_shard, num_gpus=config.gpus_per_shard, max_calls=0
        )(_stage_of_cluster)

    @property
    def size(self) -> int:
        """Shards for which the cluster has the resources now, one at least."""
        there = ray.cluster_resources()
        wanted = {"CPU": self._config.cpus_per_shard, "GPU": self._config.gpus_per_shard}
        room = [there.get(name, 0.0) / amount for name, amount in wanted.items() if amount]
        return max(1, int(min(room)))

    def call(self, stage: str, *args: Any) -> Any:
        """Do a stage on the cluster and wait for it; threads may call side by side.

        Raises:
            Cancelled: The pool was closed.
            BaseException: What the stage raises.
        """
        task = self._task.remote(stage, args)
        _wait(task, lambda: self._reason)
        try:
            found = ray.get(task)
        except RayError as error:
            raise _original(error) from error
        if "cancelled" in found:
            raise cancellation.Cancelled(found["cancelled"])
        return found["result"]

    def close(self) -> None:
        """Ask what runs to end at its next resumable point."""
        self._reason = self._reason or "the command ended"


@contextlib.contextmanager
def open_cluster_pool(config: RayRunner) -> Iterator[ClusterPool]:
    """Be connected with the cluster, without a Prefect server.

    Raises:
        ConnectionError: There is no cluster at the address, or it does not let this process in.
    """
    with cluster(config, for_flows=False):
        yield ClusterPool(config)


def _stage_of_cluster(stage: str, args: Sequence[Any]) -> dict[str, Any]:
    """Do a stage as a task; what is cancelled is a result, so that Ray does not start it again."""
    with _heeding():
        try:
            return {"result": find_stage(stage)(*args)}
        except cancellation.Cancelled as cancelled:
            return {"cancelled": str(cancelled)}


# --------------------------------------------------------------------------------------- training


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
        trainer = TorchTrainer(
            _as_worker,
            train_loop_config={"stage": stage, "args": list(args)},
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
            while True:
                with contextlib.suppress(NotYet):
                    error = fit.exception(timeout=_POLL_SECONDS)
                    break
                reason = cancellation.requested()
                if reason is not None:
                    _told(reason)
        if error is not None:
            _raise_cause(error, size)
    if fit.result().return_value != "done":
        raise cancellation.Cancelled(cancellation.requested() or "the training was ended")


def _as_worker(given: dict[str, Any]) -> str:
    """Do a stage as one of the processes of a Ray Train job, which have joined their group."""
    with _heeding():
        try:
            find_stage(given["stage"])(*given["args"])
        except cancellation.Cancelled as reason:
            return f"cancelled: {reason}"
    return "done"


def _raise_cause(error: BaseException, size: int) -> NoReturn:
    """Raise what one of the processes raised, or that one has gone.

    A process whose partner has gone fails as well, with a broken connection; the partner says
    nothing, and Ray calls it dead.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    causes = {rank: _original(failure) for rank, failure in failures.items()}
    for rank, cause in causes.items():
        if isinstance(cause, RayError):
            raise RankDied.of(rank, size, cause) from error
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
