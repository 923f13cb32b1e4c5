"""The manifests of a run: what was written, from what, with which checksum.

    run.json                               RunManifest              first; create-only
    observations.json                      ObservationsManifest     after observations.zarr
    start/start.json                       StartManifest            after the start's objects
    iterations/000/reconstructions.json    ReconstructionsManifest  after the array's metadata
    iterations/000/shards/00007.json       ShardManifest            after the shard's object
    iterations/000/stages/m_step.json      StageRecord              after the stage's objects
    iterations/000/iteration.json          IterationManifest        last; create-only
    stop.json                              StopRecord               once a stopping rule ends it
    prior/prior.json                       PriorManifest            last

An object counts only if a manifest names it, and a manifest only if it answers to its own checksum
(`documents`). Digests chain the stages: a reconstruction shard names the model that drew it
(`parent_digest`), the M-step names the reconstructions that it learned from, and the iteration
names both. Timestamps and seconds stand here and nowhere else.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from storage_schemas._base import Record
from storage_schemas.config import RunConfig, StopConfig
from storage_schemas.metrics import Metrics
from storage_schemas.sharding import shard_count, shard_rows

__all__ = [
    "Digest",
    "IterationManifest",
    "ObjectRecord",
    "ObservationsManifest",
    "PriorManifest",
    "Provenance",
    "ReconstructionsManifest",
    "RunManifest",
    "ShardManifest",
    "StageRecord",
    "StartManifest",
    "StopRecord",
]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256, in hexadecimal."""


_Bytes = bytes  # in the class below, `bytes` is a field


class ObjectRecord(Record):
    """What an object must look like."""

    sha256: Digest
    """Checksum of its bytes."""
    bytes: NonNegativeInt
    """Its size."""

    @classmethod
    def of(cls, data: _Bytes) -> ObjectRecord:
        """Describe an object's bytes."""
        return cls(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


class Provenance(Record):
    """By what a run was made."""

    code_version: str
    """Version of this package, with the commit where it is known."""
    python: str
    """Version of Python."""
    platform: str
    """Operating system and processor."""
    packages: dict[str, str]
    """Versions of the packages that the numbers depend on."""


class RunManifest(Record):
    """`run.json`: what a run is."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    config: RunConfig
    """The config, every default filled in."""
    config_digest: Digest
    """`config.digest` when the run was created."""
    provenance: Provenance
    """By what the run was created."""
    created: datetime
    """When."""


class ObservationsManifest(Record):
    """`observations.json`: the observations are complete."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    data_digest: Digest
    """Digest of the numbers, whatever their compression: ids, split, y, params, truth."""
    samples: PositiveInt
    """Observations, held-out ones included."""
    holdout: NonNegativeInt
    """Observations held out for evaluation."""
    x_shape: tuple[PositiveInt, ...]
    """Shape of one clean sample."""
    y_shape: tuple[PositiveInt, ...]
    """Shape of one observation."""
    parameters: dict[str, tuple[PositiveInt, ...]]
    """Shape of one sample's operator parameters, by name."""
    truth: bool
    """Whether clean samples are stored (for evaluation only)."""
    labels: bool
    """Whether classes are stored (for evaluation only)."""
    units: str
    """Unit of the values."""
    source: str
    """Where the observations come from, in words."""
    copied: tuple[Digest, ...] = ()
    """Data digests of the generations of another store that were copied; none if they were made
    here."""
    from_iteration: NonNegativeInt = 0
    """The first EM iteration that learns from them: later than 0 where they came later."""
    objects: dict[str, ObjectRecord]
    """Every object of `observations.zarr`, by path in the run."""
    seconds: NonNegativeFloat
    """Seconds that writing took."""
    finished: datetime
    """When it ended."""


class ReconstructionsManifest(Record):
    """`reconstructions.json`: the array is laid out; its shards can be written, in any order."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    iteration: NonNegativeInt
    """EM iteration."""
    samples: PositiveInt
    """Reconstructions: one per observation of the training split."""
    x_shape: tuple[PositiveInt, ...]
    """Shape of one reconstruction."""
    dtype: str
    """NumPy's name of the stored type."""
    shard_size: PositiveInt
    """Reconstructions per shard; the last may have fewer."""
    parent_digest: Digest
    """Digest of the model that draws them."""
    seed: NonNegativeInt
    """Seed of the E-step."""
    objects: dict[str, ObjectRecord]
    """The array's metadata and the sample ids, by path in the iteration."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return shard_count(self.samples, self.shard_size)

    def rows(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row after its last."""
        return shard_rows(shard, self.samples, self.shard_size)


class ShardManifest(Record):
    """`shards/00007.json`: one E-step shard is complete."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    iteration: NonNegativeInt
    """EM iteration."""
    shard: NonNegativeInt
    """Number of the shard."""
    start: NonNegativeInt
    """Its first row."""
    stop: PositiveInt
    """The row after its last."""
    path: str
    """Its object, by path in the iteration."""
    object: ObjectRecord
    """What the object must look like."""
    parent_digest: Digest
    """Digest of the model that drew it."""
    seed: NonNegativeInt
    """Seed that it was drawn with."""
    seconds: NonNegativeFloat
    """Seconds of drawing."""
    finished: datetime
    """When it was written."""


class StageRecord(Record):
    """`stages/m_step.json`: a stage is complete, with these objects."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    stage: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the stage."""
    parent_digest: Digest | None = None
    """Digest of what the stage worked from: it is stale when that is another now."""
    objects: dict[str, ObjectRecord] = Field(default_factory=dict)
    """What the stage wrote, by path in the iteration."""
    seconds: NonNegativeFloat
    """Seconds of computing, interrupted attempts whose work was kept included."""
    units: NonNegativeInt = 1
    """Units of work: shards of an E-step, steps of an M-step."""
    reused: NonNegativeInt = 0
    """Units that were found done by the invocation that completed the stage or the iteration."""
    finished: datetime
    """When it ended."""


class _Commit(Record):
    schema_version: Literal[1] = 1
    """Version of this schema."""
    config_digest: Digest
    """Digest of the run's config."""
    parent_digest: Digest
    """Digest of what it was computed from: the observations (start) or the model before."""
    model_digest: Digest
    """SHA-256 of the model's file."""
    objects: dict[str, ObjectRecord]
    """Every object, by path in the folder of this manifest."""
    metrics: Metrics | None
    """The numbers, as in `metrics.json`."""
    stages: dict[str, StageRecord]
    """Seconds and reuse of each stage, in order."""
    finished: datetime
    """When it was committed."""


class StartManifest(_Commit):
    """`start.json`: the start (the model that makes the first reconstructions) is complete."""


class IterationManifest(_Commit):
    """`iteration.json`: an EM iteration is complete."""

    iteration: NonNegativeInt
    """EM iteration, from 0."""
    samples: PositiveInt
    """Reconstructions."""
    shards: PositiveInt
    """Shards of the reconstructions."""


class StopRecord(Record):
    """`stop.json`: the stopping rule ended the run before its last iteration."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    rule: StopConfig
    """The rule; the record counts as long as the config has the same."""
    model_digest: Digest
    """Digest of the last complete iteration's model; it counts as long as that is the last one."""
    best: NonNegativeInt
    """The best iteration by the rule's monitor."""
    reason: str
    """Why, in words."""


class PriorManifest(_Commit):
    """`prior.json`: the model of clean data alone is complete."""

    iteration: NonNegativeInt
    """EM iteration whose reconstructions or model it is made of; its model is the parent."""
