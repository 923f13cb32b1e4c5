"""The start of a run: the model that makes the first reconstructions, its own metrics, its commit.

start/model.safetensors, metrics.json, preview.png, stages/*.json
start/start.json                last, create-only
"""

from __future__ import annotations

from collections.abc import Mapping

from storage_schemas.documents import read_json
from storage_schemas.errors import IncompleteError
from storage_schemas.manifests import RunManifest, StageRecord, StartManifest
from storage_schemas.metrics import Metrics
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import read_seal
from storage_schemas.stage_folder import StageFolder, now

__all__ = ["StartStore"]

COMMIT = "start.json"
MODEL = "model.safetensors"


class StartStore(StageFolder):
    """The start of a run.

    Arguments:
        objects: The run's store.
        run: The run's manifest.
    """

    def __init__(self, objects: ObjectStore, run: RunManifest) -> None:
        super().__init__(objects, "start")
        self._run = run

    def commit(
        self, *, metrics: Metrics | None, stages: Mapping[str, StageRecord]
    ) -> StartManifest:
        """Declare the start complete: `start.json`, create-only, naming every object.

        Arguments:
            metrics: The numbers; written as `metrics.json` too.
            stages: Seconds and reuse of each stage, in order.

        Raises:
            IncompleteError: If the observations or the model are missing.
            DamageError: If it is committed already with another model.
        """
        seal = read_seal(self.objects)
        if seal is None:
            raise IncompleteError("observations.json is missing; write the observations first")
        if not self.objects.exists(self.path(MODEL)):
            raise IncompleteError(f"{self.path(MODEL)} is missing; fit the start first")
        if metrics is not None:
            self.write_metrics(metrics)
        found = self._records({}, without=(COMMIT,))
        manifest = StartManifest(
            config_digest=self._run.config_digest,
            parent_digest=seal.data_digest,
            model_digest=found[MODEL].sha256,
            objects=found,
            metrics=metrics,
            stages=dict(stages),
            finished=now(),
        )
        return self._committed_once(COMMIT, manifest)

    def manifest(self) -> StartManifest | None:
        """Return `start.json`: None as long as the start is not complete."""
        return read_json(self.objects, self.path(COMMIT), StartManifest)
