"""The reconstructions of an EM iteration: laid out by one process, written by shards by any.

    reconstructions.zarr/                   metadata and sample ids, written by the coordinator
    reconstructions.json                    ... and sealed by it, before the fan-out
    reconstructions.zarr/x_hat/c/7/0/0/0    a shard's object, by any process, in any order
    shards/00007.json                       ... and its manifest, after it

A process that writes a shard needs nothing but the run's URL, the iteration and the shard's
number. A shard whose manifest names another model than `reconstructions.json` is stale: it counts
as not there. Writing one twice is harmless: equal numbers give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.documents import decode_json, digest_of, read_json, write_json
from storage_schemas.errors import DamageError, IncompleteError
from storage_schemas.integrity import checked_object, is_whole
from storage_schemas.layout import reconstruction_layout
from storage_schemas.manifests import (
    IterationManifest,
    ObjectRecord,
    ReconstructionsManifest,
    RunManifest,
    ShardManifest,
)
from storage_schemas.objects import ObjectStore
from storage_schemas.stage_folder import StageFolder, now

__all__ = ["Reconstructions", "iteration_folder", "shard_name"]

ARRAY = "reconstructions.zarr"
PLAN = "reconstructions.json"
COMMIT = "iteration.json"


def iteration_folder(iteration: int) -> str:
    """Return the path of an iteration's folder in its run."""
    return f"iterations/{iteration:03d}"


def shard_name(shard: int) -> str:
    """Return the path of a shard's manifest in its iteration."""
    return f"shards/{shard:05d}.json"


class Reconstructions(StageFolder):
    """The reconstructions of one EM iteration, in the iteration's folder.

    Arguments:
        objects: The run's store.
        run: The run's manifest.
        iteration: EM iteration, from 0.
    """

    def __init__(self, objects: ObjectStore, run: RunManifest, iteration: int) -> None:
        if iteration < 0:
            raise ValueError(f"iteration is {iteration} but iterations count from 0")
        super().__init__(objects, iteration_folder(iteration))
        self.iteration = iteration
        self._run = run
        self._plan: ReconstructionsManifest | None = None
        self._array_metadata: bytes | None = None

    # ----------------------------------------------------------------------------- reconstructions

    def create_reconstructions(
        self,
        sample_ids: NDArray[np.int64],
        *,
        x_shape: tuple[int, ...],
        shard_size: int,
        parent_digest: str,
        seed: int,
        dtype: str = "float32",
        units: str = "1",
        attributes: Mapping[str, Any] | None = None,
    ) -> ReconstructionsManifest:
        """Lay out the array before its shards are written; for one coordinating process.

        What exists with the same layout is kept. If it was drawn by another model its shards are
        stale from now on, and a commit is taken back.

        Arguments:
            sample_ids: Original ids of the observations, shape (n,).
            x_shape: Shape of one reconstruction.
            shard_size: Reconstructions per shard.
            parent_digest: Digest of the model that draws them.
            seed: Seed of the E-step.
            dtype: `float32` or `float16`.
            units: Unit of the values.
            attributes: More provenance for the group's attributes; JSON-able and the same at
                every resumption.

        Raises:
            LayoutMismatch: If the array exists with another layout.
        """
        from storage_schemas import zarr_objects

        provenance = {
            "title": f"DiffEM reconstructions of iteration {self.iteration}",
            "run": self._run.config.name,
            "config_digest": self._run.config_digest,
            "em_iteration": self.iteration,
            "parent_digest": parent_digest,
            "seed": seed,
            "code_version": self._run.provenance.code_version,
            **(attributes or {}),
        }
        layout = reconstruction_layout(
            samples=len(sample_ids),
            x_shape=x_shape,
            dtype=dtype,
            shard_size=shard_size,
            units=units,
            attributes=provenance,
        )
        encoded = zarr_objects.encode_metadata(layout)
        ids = zarr_objects.encode_rows(
            encoded["sample/zarr.json"], 0, np.asarray(sample_ids, np.int64)
        )
        files = {f"{ARRAY}/sample/{key}": data for key, data in ids.items()}
        files |= {f"{ARRAY}/{key}": data for key, data in encoded.items()}
        plan = ReconstructionsManifest(
            iteration=self.iteration,
            samples=len(sample_ids),
            x_shape=x_shape,
            dtype=dtype,
            shard_size=shard_size,
            parent_digest=parent_digest,
            seed=seed,
            objects={path: ObjectRecord.of(data) for path, data in sorted(files.items())},
        )
        committed = self.manifest()
        if committed is not None and committed.parent_digest != parent_digest:
            self.objects.delete(self.path(COMMIT))  # it followed from another model
            committed = None
        try:
            stored = read_json(self.objects, self.path(PLAN), ReconstructionsManifest)
        except DamageError:
            stored = None
        if stored is not None:
            if self._has_same_plan(stored, plan, encoded):
                return self._adopt(stored)
            if committed is None:
                self.objects.delete(self.path(PLAN))  # nothing counts until it is there again
        for path, data in files.items():
            self._require_unchanged(path, data, committed.objects.get(path) if committed else None)
            self.objects.write(self.path(path), data)
        write_json(self.objects, self.path(PLAN), plan)
        return self._adopt(plan)

    def _has_same_plan(
        self,
        stored: ReconstructionsManifest,
        given: ReconstructionsManifest,
        encoded: Mapping[str, bytes],
    ) -> bool:
        """Tell whether what is stored serves; raise LayoutMismatch if it is another array."""
        from storage_schemas import zarr_objects

        whole = is_whole(self.objects, stored.objects, prefix=self.prefix, checksum=True)
        name = f"{ARRAY}/x_hat/zarr.json"
        if whole:
            zarr_objects.require_same_layout(
                self.path(f"{ARRAY}/x_hat"),
                stored=self.objects.read(self.path(name)),
                given=encoded["x_hat/zarr.json"],
            )
        ids = f"{ARRAY}/sample/c/0"
        return (
            whole
            and stored.model_copy(update={"objects": {}})
            == given.model_copy(update={"objects": {}})
            and stored.objects.get(ids) == given.objects.get(ids)
        )

    def _adopt(self, plan: ReconstructionsManifest) -> ReconstructionsManifest:
        self._plan, self._array_metadata = plan, None
        return plan

    def reconstructions(self) -> ReconstructionsManifest | None:
        """Return `reconstructions.json`, None until the array is laid out."""
        if self._plan is None:
            self._plan = read_json(self.objects, self.path(PLAN), ReconstructionsManifest)
        return self._plan

    def write_shard(
        self, shard: int, x_hat: NDArray[Any], *, seed: int, seconds: float
    ) -> ShardManifest:
        """Write one shard: its object, then its manifest.

        Arguments:
            shard: Number of the shard.
            x_hat: Reconstructions, shape (rows of the shard, *x_shape), finite.
            seed: Seed that they were drawn with.
            seconds: Seconds of drawing.

        Raises:
            ValueError: If the shape is wrong or a value is not finite.
            IncompleteError: If the array is not laid out.
            DamageError: If the iteration is committed with other numbers.
        """
        from storage_schemas import zarr_objects

        plan = self._required_plan()
        start, stop = plan.rows(shard)
        expected = (stop - start, *plan.x_shape)
        if x_hat.shape != expected:
            raise ValueError(f"x_hat has shape {x_hat.shape} but shard {shard} has {expected}")
        with np.errstate(over="ignore"):  # beyond float16: becomes infinite and is refused below
            values = np.asarray(x_hat).astype(plan.dtype, copy=False)
        if not np.isfinite(values).all():
            rows = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            raise ValueError(
                f"x_hat of shard {shard} is not finite in {len(rows)} of {len(values)} rows as "
                f"{plan.dtype}, first in row {start + rows[0]}; see the sampler's noise range"
            )
        [(key, data)] = zarr_objects.encode_rows(self._metadata(plan), start, values).items()
        path = f"{ARRAY}/x_hat/{key}"
        committed = self.manifest()
        self._require_unchanged(path, data, committed.objects.get(path) if committed else None)
        self.objects.write(self.path(path), data)
        if committed is not None and (kept := self.shard(shard)) is not None:
            return kept  # its manifest is an object of the commit
        manifest = ShardManifest(
            iteration=self.iteration,
            shard=shard,
            start=start,
            stop=stop,
            path=path,
            object=ObjectRecord.of(data),
            parent_digest=plan.parent_digest,
            seed=seed,
            seconds=seconds,
            finished=now(),
        )
        write_json(self.objects, self.path(shard_name(shard)), manifest)
        return manifest

    def shard(self, shard: int, *, checksum: bool = False) -> ShardManifest | None:
        """Return a shard's manifest if the shard is complete.

        Arguments:
            shard: Number of the shard.
            checksum: Compare the object's checksum, else only its size.

        Returns:
            None unless manifest and object are there, whole, and drawn by the model that
            `reconstructions.json` names.
        """
        plan = self.reconstructions()
        if plan is None:
            return None
        path = self.path(shard_name(shard))
        content = self.objects.read_many([path]).get(path)
        return self._whole_shard(plan, shard, content, checksum=checksum)

    def shards(self, *, checksum: bool = False) -> dict[int, ShardManifest]:
        """Return the manifests of all complete shards, by number."""
        plan = self.reconstructions()
        if plan is None:
            return {}
        sizes = self.objects.sizes(self.prefix)
        paths = {number: self.path(shard_name(number)) for number in range(plan.shards)}
        contents = self.objects.read_many(path for path in paths.values() if path in sizes)
        found = {}
        for number, path in paths.items():
            manifest = self._whole_shard(
                plan, number, contents.get(path), checksum=checksum, sizes=sizes
            )
            if manifest is not None:
                found[number] = manifest
        return found

    def missing_shards(self, *, checksum: bool = False) -> list[int]:
        """Return the numbers of the shards that have yet to be drawn."""
        complete = self.shards(checksum=checksum)
        return [number for number in range(self._required_plan().shards) if number not in complete]

    def reconstructions_digest(self) -> str:
        """Return the digest of all reconstructions: what the M-step works from.

        Raises:
            IncompleteError: If a shard is missing.
        """
        complete = self._all_shards()
        return digest_of([complete[number].object.sha256 for number in sorted(complete)])

    def sample_ids(self) -> NDArray[np.int64]:
        """Return the original ids of the reconstructed observations, shape (n,)."""
        from storage_schemas import zarr_objects

        plan = self._required_plan()
        pieces = {}
        for name in ("zarr.json", "c/0"):
            path = f"{ARRAY}/sample/{name}"
            pieces[name] = checked_object(
                self.objects, path, plan.objects.get(path), whole=True, prefix=self.prefix
            )
        metadata = pieces.pop("zarr.json")
        return zarr_objects.decode_rows(
            metadata, pieces, 0, plan.samples, path=self.path(f"{ARRAY}/sample")
        )

    def read_reconstructions(
        self, rows: slice | None = None, *, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Return reconstructions, in the data's own units, shard by shard.

        Arguments:
            rows: Consecutive rows; all by default.
            out: Array to fill, shape (n, *x_shape); a new one by default.

        Returns:
            Shape (n, *x_shape).

        Raises:
            IncompleteError: If one of the shards has yet to be drawn.
            DamageError: If an object is not what was written.
        """
        from storage_schemas import zarr_objects

        plan = self._required_plan()
        first, last, step = (rows or slice(None)).indices(plan.samples)
        if step != 1:
            raise ValueError(f"rows have step {step} but must be consecutive; give a step of 1")
        last = max(first, last)
        if out is None:
            out = np.empty((last - first, *plan.x_shape), plan.dtype)
        if out.shape != (last - first, *plan.x_shape):
            raise ValueError(
                f"out has shape {out.shape} but the rows have {(last - first, *plan.x_shape)}"
            )
        if first == last:
            return out
        metadata = self._metadata(plan)
        for number in range(first // plan.shard_size, (last - 1) // plan.shard_size + 1):
            manifest = self.shard(number)
            if manifest is None:
                raise self._missing([number])
            data = checked_object(
                self.objects, manifest.path, manifest.object, whole=False, prefix=self.prefix
            )
            key = manifest.path.removeprefix(f"{ARRAY}/x_hat/")
            start, stop = max(first, manifest.start), min(last, manifest.stop)
            out[start - first : stop - first] = zarr_objects.decode_rows(
                metadata, {key: data}, start, stop, path=self.path(manifest.path)
            )
        return out

    def manifest(self) -> IterationManifest | None:
        """Return `iteration.json`: None as long as the iteration is not complete."""
        return read_json(self.objects, self.path(COMMIT), IterationManifest)

    # ------------------------------------------------------------------------------------- private

    def _required_plan(self) -> ReconstructionsManifest:
        plan = self.reconstructions()
        if plan is None:
            raise IncompleteError(
                f"{self.path(PLAN)} is missing; call create_reconstructions first"
            )
        return plan

    def _metadata(self, plan: ReconstructionsManifest) -> bytes:
        if self._array_metadata is None:
            path = f"{ARRAY}/x_hat/zarr.json"
            self._array_metadata = checked_object(
                self.objects, path, plan.objects.get(path), whole=True, prefix=self.prefix
            )
        return self._array_metadata

    def _whole_shard(
        self,
        plan: ReconstructionsManifest,
        shard: int,
        content: bytes | None,
        *,
        checksum: bool,
        sizes: Mapping[str, int] | None = None,
    ) -> ShardManifest | None:
        if content is None:
            return None
        path = self.path(shard_name(shard))
        try:
            manifest = decode_json(content, ShardManifest, path=path)
        except DamageError:
            return None  # the shard is drawn again
        if manifest.parent_digest != plan.parent_digest:
            return None
        if (manifest.start, manifest.stop) != plan.rows(shard):
            return None
        records = {manifest.path: manifest.object}
        whole = is_whole(self.objects, records, prefix=self.prefix, checksum=checksum, sizes=sizes)
        return manifest if whole else None

    def _all_shards(self) -> dict[int, ShardManifest]:
        plan, complete = self._required_plan(), self.shards()
        missing = [number for number in range(plan.shards) if number not in complete]
        if missing:
            raise self._missing(missing)
        return complete

    def _missing(self, numbers: list[int]) -> IncompleteError:
        shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        return IncompleteError(
            f"{self.prefix}: {len(numbers)} shards have yet to be drawn ({shown}); run "
            "`diffem run`"
        )
