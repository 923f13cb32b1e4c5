"""The prior of a run: the model of clean data alone, made after the last EM iteration.

prior/model.safetensors, losses.json, metrics.json, samples.safetensors, stages/*.json
prior/prior.json                last

A run whose number of iterations is raised makes its prior anew, after the new last one.
"""

from __future__ import annotations

from collections.abc import Mapping

from storage_schemas.documents import read_json
from storage_schemas.errors import IncompleteError
from storage_schemas.manifests import IterationManifest, PriorManifest, RunManifest, StageRecord
from storage_schemas.metrics import Metrics
from storage_schemas.objects import ObjectStore
from storage_schemas.stage_folder import CHECKPOINT, StageFolder, now

__all__ = ["PriorStore"]

FOLDER = "prior"
COMMIT = "prior.json"
MODEL = "model.safetensors"


class PriorStore(StageFolder):
    """The prior of a run.

    Arguments:
        objects: The run's store.
        run: The run's manifest.
    """

    def __init__(self, objects: ObjectStore, run: RunManifest) -> None:
        super().__init__(objects, FOLDER)
        self._run = run

    def commit(
        self,
        last: IterationManifest,
        *,
        metrics: Metrics | None,
        stages: Mapping[str, StageRecord],
    ) -> PriorManifest:
        """Declare the prior complete: `prior.json`, create-only, naming every object.

        Arguments:
            last: The iteration that it is made of.
            metrics: The numbers; written as `metrics.json` too.
            stages: Seconds and reuse of each stage, in order.

        Raises:
            IncompleteError: If the model is missing.
            DamageError: If it is committed already with another model.
        """
        if not self.objects.exists(self.path(MODEL)):
            raise IncompleteError(f"{self.path(MODEL)} is missing; train the prior first")
        if metrics is not None:
            self.write_metrics(metrics)
        self.delete_checkpoint()
        found = self._records({}, without=(COMMIT, CHECKPOINT))
        manifest = PriorManifest(
            iteration=last.iteration,
            config_digest=self._run.config_digest,
            parent_digest=last.model_digest,
            model_digest=found[MODEL].sha256,
            objects=found,
            metrics=metrics,
            stages=dict(stages),
            finished=now(),
        )
        return self._committed_once(COMMIT, manifest)

    def manifest(self) -> PriorManifest | None:
        """Return `prior.json`: None as long as the prior is not complete."""
        return read_json(self.objects, self.path(COMMIT), PriorManifest)

    def clear(self) -> None:
        """Delete everything, the commit first: it is about to be made of a later iteration."""
        self.objects.delete(self.path(COMMIT))
        self.objects.delete_folder(FOLDER)
