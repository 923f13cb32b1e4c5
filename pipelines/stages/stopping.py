"""Whether a run is to stop after its last complete iteration, as its store tells it."""

from __future__ import annotations

import dataclasses

from diffem_core.stopping import Point, decide
from pipelines import build
from pipelines.stages.bench import Json
from storage_schemas.config import BudgetStop
from storage_schemas.manifests import IterationManifest
from storage_schemas.run_store import RunStore

__all__ = ["decide_stop"]


def decide_stop(run_url: str) -> Json:
    """Apply the run's stopping rule to the iterations that are complete.

    It depends on the committed metrics alone, so that a run that is resumed decides as before.

    Arguments:
        run_url: The run.

    Returns:
        `stop`; `best`, the number of the best iteration, -1 while none is complete; and `reason`,
        in words.
    """
    store = RunStore.open(run_url)
    completed = store.completed()
    if not completed:
        return {"stop": False, "best": -1, "reason": "no iteration is complete"}
    config = store.config.stop
    name = "divergence" if isinstance(config, BudgetStop) else config.monitor
    history = [_point(manifest, name) for manifest in completed]
    return dataclasses.asdict(decide(history, build.build_stop_rule(config)))


def _point(manifest: IterationManifest, name: str) -> Point:
    metrics = {} if manifest.metrics is None else manifest.metrics.values
    value, floor = metrics.get(name), metrics.get(f"{name}_floor")
    return Point(
        iteration=manifest.iteration,
        value=None if value is None else value.value,
        standard_error=None if value is None else value.standard_error,
        floor=None if floor is None else floor.value,
        floor_error=None if floor is None else floor.standard_error,
    )
