"""Runner config to what carries out its work: devices of this machine, or a Ray cluster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, assert_never

from pipelines.runners.distributed import training_workers
from pipelines.runners.fan_out import Pool
from storage_schemas.config import LocalRunner, RayRunner
from storage_schemas.config import RunnerConfig as Config

__all__ = [
    "open_pool",
    "open_runner",
    "shard_resources",
    "task_runner",
    "trains_from_here",
]


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
