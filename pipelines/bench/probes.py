"""What the measured processes of `bench_orchestration` do."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from pipelines.prefect_settings import apply_defaults

__all__ = ["map_nothing", "mapped_loop", "plain_loop"]


def plain_loop(config: str, url: str, overrides: Sequence[str]) -> None:
    """Do a whole run as a loop over its stages: no Prefect, no lease, no checks."""
    from pipelines import stages
    from pipelines.config_io import load_config
    from storage_schemas.run_store import RunStore

    store = RunStore.create(url, load_config(config, overrides))
    print("begin", file=sys.stderr, flush=True)
    _loop(url, store.config.iterations, lambda stage, *args: getattr(stages, stage)(*args), map)
    if store.config.prior is not None:
        stages.fit_prior(url)


def mapped_loop(config: str, url: str) -> None:
    """Do a whole run as a loop over its stages, with shards mapped over the devices."""
    from concurrent.futures import ThreadPoolExecutor

    from pipelines.config_io import load_config
    from pipelines.runners.devices import open_devices
    from storage_schemas.config import LocalRunner
    from storage_schemas.run_store import RunStore

    store = RunStore.create(url, load_config(config, ()))
    runner = store.config.runner
    assert isinstance(runner, LocalRunner), "this machine is measured"
    with open_devices(runner) as pool, ThreadPoolExecutor(pool.size) as threads:
        _loop(url, store.config.iterations, pool.call, threads.map)


def _loop(
    url: str, iterations: int, call: Callable[..., Any], mapped: Callable[..., Iterable[Any]]
) -> None:
    """Do a new run up to its last iteration.

    Arguments:
        url: The run.
        iterations: How many it has.
        call: Does a stage that computes, by its name and arguments.
        mapped: `map`, over shards.
    """
    from pipelines import stages

    stages.prepare_observations(url)
    stages.fit_start(url)
    for iteration in range(iterations):
        plan = stages.lay_out_iteration(url, iteration)
        digest, parent = plan["config_digest"], plan["parent_digest"]
        stage, run, k = repeat("e_step_shard"), repeat(url), repeat(iteration)
        shards = range(plan["shards"])
        list(mapped(call, stage, run, k, shards, repeat(digest), repeat(parent)))
        learned_from = stages.reconstructions_digest(url, iteration)
        call("refine_model", url, iteration, digest, learned_from)
        call("evaluate_iteration", url, iteration, digest, stages.model_digest(url, iteration))
        stages.commit_iteration(url, iteration, 0)


def nothing(run_url: str, shard: int) -> dict[str, Any]:
    """Do nothing, as the E-step of a shard does it: a small record comes back."""
    return {"shard": shard, "reused": False}


def map_nothing(shards: int, folder: str, *, ray: bool = False) -> None:
    """Map a task that does nothing, wrapped as the E-step is; print seconds and memory as JSON."""
    apply_defaults()
    from prefect import flow
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.task_runners import ThreadPoolTaskRunner

    from pipelines.flows import stage_task

    runner: Any = ThreadPoolTaskRunner(max_workers=1)
    if ray:
        from pipelines.runners.ray import build_ray_task_runner
        from storage_schemas.config import RayRunner

        runner = build_ray_task_runner(RayRunner(address="local", gpus_per_shard=0.0))
    empty = stage_task(nothing, "nothing", "shard {shard:05d}")

    @flow(name="bench", task_runner=runner, result_storage=Path(folder))
    def mapped() -> float:
        empty.submit(folder, -1).result()  # what a first task costs more
        began = time.perf_counter()
        futures = [empty.submit(folder, shard) for shard in range(shards)]
        for future in futures:
            future.result()
        return time.perf_counter() - began

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        seconds = mapped()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "memory_mb": memory}))
