"""One EM iteration of a run: reconstructions, model, metrics, commit.

    reconstructions.zarr, reconstructions.json, shards/*.json      (`reconstructions`)
    model.safetensors, checkpoint/, metrics.json, preview.png, stages/*.json
    iteration.json                                                 last, create-only

The iteration is complete when `iteration.json` is there: it names everything else.
"""

from __future__ import annotations

from collections.abc import Mapping

from storage_schemas.documents import create_json
from storage_schemas.errors import DamageError, IncompleteError
from storage_schemas.manifests import IterationManifest, ObjectRecord, StageRecord
from storage_schemas.metrics import Metrics
from storage_schemas.reconstructions import ARRAY, COMMIT, Reconstructions, shard_name
from storage_schemas.stage_folder import CHECKPOINT, METRICS, now

__all__ = ["IterationStore"]

MODEL = "model.safetensors"


class IterationStore(Reconstructions):
    """One EM iteration of a run.

    Arguments:
        objects: The run's store.
        run: The run's manifest.
        iteration: EM iteration, from 0.
    """

    def commit(
        self, *, metrics: Metrics | None, stages: Mapping[str, StageRecord]
    ) -> IterationManifest:
        """Declare the iteration complete: `iteration.json`, create-only, naming every object.

        The checkpoint is deleted before. Committing again is harmless.

        Arguments:
            metrics: The numbers; written as `metrics.json` too.
            stages: Seconds and reuse of each stage, in order.

        Raises:
            IncompleteError: If a shard or the model is missing.
            DamageError: If it is committed already with other objects.
        """
        plan = self._required_plan()
        shards = self._all_shards()
        if not self.objects.exists(self.path(MODEL)):
            raise IncompleteError(f"{self.path(MODEL)} is missing; do the M-step first")
        if metrics is not None:
            self.write_metrics(metrics)
        self.delete_checkpoint()
        known = {manifest.path: manifest.object for manifest in shards.values()}
        found = self._records(known, without=(COMMIT, CHECKPOINT))
        self._require_no_strays(found, known)
        manifest = IterationManifest(
            iteration=self.iteration,
            config_digest=self._run.config_digest,
            parent_digest=plan.parent_digest,
            model_digest=found[MODEL].sha256,
            samples=plan.samples,
            shards=plan.shards,
            objects=found,
            metrics=metrics,
            stages=dict(stages),
            finished=now(),
        )
        try:
            create_json(self.objects, self.path(COMMIT), manifest)
        except FileExistsError:
            committed = self.manifest()
            assert committed is not None
            _require_same_results(self.path(COMMIT), committed, manifest)
            return committed
        return manifest

    def _require_no_strays(
        self, found: dict[str, ObjectRecord], known: Mapping[str, ObjectRecord]
    ) -> None:
        """Delete shard objects and shard manifests beyond the last shard of a former layout."""
        manifests = {shard_name(number) for number in range(len(known))}
        for name in list(found):
            stray = (name.startswith(f"{ARRAY}/x_hat/c/") and name not in known) or (
                name.startswith("shards/") and name not in manifests
            )
            if stray:
                self.objects.delete(self.path(name))
                del found[name]


def _require_same_results(
    path: str, committed: IterationManifest, given: IterationManifest
) -> None:
    """Compare two commits in what they computed; manifests hold seconds and may differ."""
    ours, theirs = (
        {name: record for name, record in manifest.objects.items() if _is_result(name)}
        for manifest in (committed, given)
    )
    if ours != theirs or committed.parent_digest != given.parent_digest:
        names = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise DamageError(path, f"is committed with other results ({', '.join(names[:5])})")


def _is_result(name: str) -> bool:
    return name.startswith(ARRAY) or name in (MODEL, METRICS)
