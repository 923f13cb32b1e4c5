"""What a run has done, read from its manifests alone: no array is opened, nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence

from storage_schemas._base import Record
from storage_schemas.lease import read_lease
from storage_schemas.manifests import IterationManifest, StageRecord
from storage_schemas.metrics import Metric
from storage_schemas.objects import redact_url
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import now

__all__ = ["CEILING", "RunStatus", "StepStatus", "read_status"]

CEILING = "trained on clean samples: a ceiling, not learned from observations"
"""What is said of every run whose method is `clean`."""


class StageStatus(Record):
    """One stage of the start or of an iteration."""

    seconds: float
    """Seconds of computing."""
    units: int
    """Units of work: shards, steps or samples."""
    reused: int
    """Units that were found done by the invocation that completed the stage."""


class StepStatus(Record):
    """The start, one EM iteration, or the prior."""

    iteration: int | None
    """EM iteration; None for the start and for the prior."""
    state: str
    """`complete`, `partial` or `missing`."""
    model_digest: str | None
    """SHA-256 of the model that it made."""
    metrics: dict[str, Metric]
    """Its numbers."""
    stages: dict[str, StageStatus]
    """Its finished stages."""


class RunStatus(Record):
    """A run."""

    run: str
    """Where it is."""
    name: str
    """Its name."""
    state: str
    """`complete`, or `incomplete`."""
    method: str
    """How it learns: `diffem`, `em-mmps`, or `clean`, which is a ceiling."""
    iterations: int
    """EM iterations that the config asks for."""
    complete: int
    """EM iterations that are complete."""
    config_digest: str
    """Digest of the config."""
    code_version: str
    """Version of the code that created the run."""
    writer: str | None
    """Who is writing the run now."""
    start: StepStatus
    """The start."""
    history: tuple[StepStatus, ...]
    """EM iterations that have begun, in order."""
    prior: StepStatus | None = None
    """The prior, where one is wanted."""
    stopped: str | None = None
    """Why the stopping rule ended it before its last iteration; None while it has not."""
    best: int | None = None
    """The best iteration, where the stopping rule ended it."""


def read_status(store: RunStore) -> RunStatus:
    """Read the status of a run.

    Arguments:
        store: The run.

    Returns:
        What its manifests say.
    """
    completed = store.completed()
    committed = store.start().manifest()
    begun = store.start().metrics() is not None
    start = StepStatus(
        iteration=None,
        state="complete" if committed else "partial" if begun else "missing",
        model_digest=committed and committed.model_digest,
        metrics={} if committed is None or committed.metrics is None else committed.metrics.values,
        stages=_stages({} if committed is None else committed.stages),
    )
    history = [
        StepStatus(
            iteration=manifest.iteration,
            state="complete",
            model_digest=manifest.model_digest,
            metrics={} if manifest.metrics is None else manifest.metrics.values,
            stages=_stages(manifest.stages),
        )
        for manifest in completed
    ]
    if len(completed) in store.iteration_numbers():
        history.append(_partial(store, len(completed)))
    lease = read_lease(store.objects)
    writing = lease is not None and not lease.available(now())
    prior = None if store.config.prior is None else _prior(store, completed)
    stopped = store.stopped()
    enough = len(completed) >= store.config.iterations or stopped is not None
    done = committed is not None and enough
    done = done and (prior is None or prior.state == "complete")
    return RunStatus(
        run=redact_url(store.url),
        name=store.config.name,
        state="complete" if done else "incomplete",
        method=store.config.method,
        iterations=store.config.iterations,
        complete=len(completed),
        config_digest=store.manifest.config_digest,
        code_version=store.manifest.provenance.code_version,
        writer=f"{lease.owner}, process {lease.pid} on {lease.host}"
        if writing and lease
        else None,
        start=start,
        history=tuple(history),
        prior=prior,
        stopped=None if stopped is None else stopped.reason,
        best=None if stopped is None else stopped.best,
    )


def _prior(store: RunStore, completed: Sequence[IterationManifest]) -> StepStatus:
    folder = store.prior()
    manifest = folder.manifest()
    last = completed[-1].model_digest if completed else None
    if manifest is not None and manifest.parent_digest == last:
        return StepStatus(
            iteration=None,
            state="complete",
            model_digest=manifest.model_digest,
            metrics={} if manifest.metrics is None else manifest.metrics.values,
            stages=_stages(manifest.stages),
        )
    begun = folder.stage("fit", checksum=False) is not None
    return StepStatus(
        iteration=None,
        state="partial" if begun else "missing",
        model_digest=None,
        metrics={},
        stages={},
    )


def _partial(store: RunStore, iteration: int) -> StepStatus:
    folder = store.iteration(iteration)
    stages: dict[str, StageStatus] = {}
    shards = folder.shards()
    if shards:
        seconds = sum(shard.seconds for shard in shards.values())
        stages["e_step"] = StageStatus(seconds=seconds, units=len(shards), reused=0)
    records = {name: folder.stage(name, checksum=False) for name in ("m_step", "evaluate")}
    stages |= _stages({name: record for name, record in records.items() if record is not None})
    metrics = folder.metrics() if records["evaluate"] is not None else None
    return StepStatus(
        iteration=iteration,
        state="partial",
        model_digest=None,
        metrics={} if metrics is None else metrics.values,
        stages=stages,
    )


def _stages(records: dict[str, StageRecord]) -> dict[str, StageStatus]:
    return {
        name: StageStatus(seconds=record.seconds, units=record.units, reused=record.reused)
        for name, record in records.items()
    }
