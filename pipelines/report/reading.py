"""What a report shows, read from the manifests, numbers and pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pipelines.status import RunStatus, StageStatus, StepStatus, read_status
from storage_schemas.config import RunConfig
from storage_schemas.errors import DamageError
from storage_schemas.integrity import problem_of
from storage_schemas.manifests import (
    IterationManifest,
    ObservationsManifest,
    PriorManifest,
    Provenance,
    StartManifest,
)
from storage_schemas.metrics import Metric, Metrics
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import StageFolder

__all__ = ["MAX_PICTURES", "Report", "Step", "read_report"]

MAX_PICTURES = 24
"""Pictures that a page holds at most: each is tens or hundreds of kB."""

PREVIEW = "preview.png"
_PNG = b"\x89PNG\r\n\x1a\n"

_Manifest = StartManifest | IterationManifest | PriorManifest | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """The start, one EM iteration, or the prior."""

    iteration: int | None
    """EM iteration; None for the start and for the prior."""
    name: str
    """What it is called: `start`, `iteration 003` or `prior`."""
    state: str
    """`complete`, `partial` or `missing`."""
    model_digest: str | None
    """SHA-256 of its model."""
    metrics: Mapping[str, Metric]
    """Its numbers."""
    stages: Mapping[str, StageStatus]
    """Its finished stages."""
    picture: bytes | None
    """Its picture, a PNG file."""

    @property
    def place(self) -> str:
        """Its name inside a sentence: "at the start", "at iteration 003"."""
        return self.name if self.iteration is not None else f"the {self.name}"

    @property
    def short(self) -> str:
        """Its name where there is little room."""
        return self.name if self.iteration is None else f"{self.iteration:03d}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run, as far as it has come."""

    status: RunStatus
    """What has been done."""
    config: RunConfig
    """The config."""
    provenance: Provenance
    """By what it was made."""
    created: datetime
    """When the run began."""
    finished: datetime | None
    """When the last complete step was committed."""
    observations: ObservationsManifest | None
    """What is known of the observations; None until they are sealed."""
    steps: tuple[Step, ...]
    """The start, then the EM iterations that have begun."""
    prior: Step | None
    """The prior, where one is wanted."""

    @property
    def judged(self) -> list[Step]:
        """Return the steps that have numbers, in order."""
        return [step for step in self.steps if step.metrics]

    @property
    def best(self) -> Step | None:
        """Return the step that the run stands for: its best iteration, or the last judged one."""
        for step in self.steps:
            if step.iteration is not None and step.iteration == self.status.best:
                return step
        return self.judged[-1] if self.judged else None


def read_report(store: RunStore) -> Report:
    """Read what a report shows.

    Arguments:
        store: The run, complete or not.

    Raises:
        DamageError: If a manifest, the numbers or a picture are not what was written.
    """
    status = read_status(store)
    start = store.start()
    folders: list[tuple[StepStatus, StageFolder, _Manifest]] = [
        (status.start, start, start.manifest())
    ]
    for entry in status.history:
        assert entry.iteration is not None, "the history holds iterations"
        folder = store.iteration(entry.iteration)
        complete = entry.state == "complete"
        folders.append((entry, folder, folder.manifest() if complete else None))
    shown = _shown(len(folders), status.best)
    steps = tuple(
        _step(entry, folder, manifest, picture=place in shown)
        for place, (entry, folder, manifest) in enumerate(folders)
    )
    prior = None
    if status.prior is not None:
        whole = store.prior().manifest() if status.prior.state == "complete" else None
        prior = _step(status.prior, store.prior(), whole, picture=False, name="prior")
    commits = [manifest for *_, manifest in folders if manifest is not None]
    return Report(
        status=status,
        config=store.config,
        provenance=store.manifest.provenance,
        created=store.manifest.created,
        finished=commits[-1].finished if commits else None,
        observations=store.observations_manifest(),
        steps=steps,
        prior=prior,
    )


def _shown(count: int, best: int | None) -> set[int]:
    """Choose whose pictures are shown: all, or the first, the last, the best and some between."""
    if count <= MAX_PICTURES:
        return set(range(count))
    wanted = MAX_PICTURES - 1
    chosen = {round(i * (count - 1) / (wanted - 1)) for i in range(wanted)}
    return chosen if best is None else chosen | {best + 1}


def _step(
    status: StepStatus,
    folder: StageFolder,
    manifest: _Manifest,
    *,
    picture: bool,
    name: str = "start",
) -> Step:
    return Step(
        iteration=status.iteration,
        name=name if status.iteration is None else f"iteration {status.iteration:03d}",
        state=status.state,
        model_digest=status.model_digest,
        metrics=_metrics(status, folder, manifest),
        stages=status.stages,
        picture=_picture(folder, manifest) if picture else None,
    )


def _metrics(status: StepStatus, folder: StageFolder, manifest: _Manifest) -> Mapping[str, Metric]:
    """Return the numbers, which a commit and `metrics.json` must agree on."""
    if manifest is None:
        return status.metrics
    written = folder.metrics()
    if manifest.metrics is None:
        return {}
    path = folder.path("metrics.json")
    if written is None:
        raise DamageError(path, "is missing")
    if written != Metrics(values=manifest.metrics.values):
        raise DamageError(path, "does not hold the numbers that were committed")
    return written.values


def _picture(folder: StageFolder, manifest: _Manifest) -> bytes | None:
    try:
        data = folder.read_bytes(PREVIEW)
    except FileNotFoundError:
        if manifest is not None and PREVIEW in manifest.objects:
            raise DamageError(folder.path(PREVIEW), "is missing") from None
        return None
    record = None if manifest is None else manifest.objects.get(PREVIEW)
    if record is not None and (problem := problem_of(data, record)) is not None:
        raise DamageError(folder.path(PREVIEW), problem)
    if not data.startswith(_PNG):
        raise DamageError(folder.path(PREVIEW), "is not a PNG file")
    return data
