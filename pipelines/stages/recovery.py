"""Making a run ready to go on, whatever state it was left in."""

from __future__ import annotations

from pipelines.progress import stage
from pipelines.stages.bench import Json
from storage_schemas.run_store import RunStore
from storage_schemas.verify import repair, verify

__all__ = ["first_unfinished_iteration", "recover"]


def recover(run_url: str) -> Json:
    """Compare every object of the run with its manifests, and make room for what has to be redone.

    Returns:
        The number of objects that were checked, and a line for each that has to be made anew.
    """
    store = RunStore.open(run_url)
    with stage("checking the run", total=None, unit="objects") as advance:
        report = verify(store, on_object=lambda *_: advance(1))
    repair(store, report)
    findings = (*report.missing, *report.damaged, *report.orphaned)
    return {"objects": report.objects, "findings": [f"{f.path}: {f.problem}" for f in findings]}


def first_unfinished_iteration(run_url: str) -> int:
    """Return the first iteration that is not complete."""
    store = RunStore.open(run_url)
    return min(len(store.completed()), store.config.iterations)
