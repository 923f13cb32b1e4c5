"""Draws from a posterior or a prior, and their summaries: what `diffem reconstruct` writes.

    draws.zarr/        x_hat(sample, draw, channel, y, x), or x_hat(sample, channel, y, x) of a
                       prior; mean, std (sample, channel, y, x); quantiles(sample, quantile, ...)
    plan.json          what was asked for; written after the array's metadata, before any shard
    shards/00007.json  written after the shard's objects
    draws.json         the seal: written last, names every object

Vectors have `feature` for `channel, y, x`. A shard is some samples with everything of them: one
object in each array. A process that is killed leaves whole shards behind, and the next one with
the same request does the others; equal numbers give equal bytes. A store that was made by another
request is refused with the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveInt

from storage_schemas._base import Record
from storage_schemas.documents import read_json, write_json
from storage_schemas.errors import DamageError, IncompleteError, StorageError
from storage_schemas.integrity import checked_object, is_whole
from storage_schemas.layout import ArrayLayout, StoreLayout, clean_dims, inner_chunk_rows
from storage_schemas.manifests import ObjectRecord
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.run_store import config_differences
from storage_schemas.sharding import shard_count, shard_rows

__all__ = ["DrawPlan", "DrawShard", "DrawStore", "DrawsManifest", "OtherDraws", "Summary"]

ARRAY = "draws.zarr"
PLAN = "plan.json"
SEAL = "draws.json"
_SHARDS = "shards"
_OURS = (ARRAY, PLAN, SEAL, _SHARDS, "lease")

Summary = Literal["mean", "std", "quantiles"]
"""What is kept of the draws of a sample."""

_LONG_NAMES = {
    "x_hat": "draw from the model",
    "mean": "mean of the draws",
    "std": "standard deviation of the draws",
    "quantiles": "quantiles of the draws, pixel by pixel",
}


class OtherDraws(StorageError):
    """The URL holds draws that were asked for otherwise, or something else."""


class DrawPlan(Record):
    """`plan.json`: the arrays are laid out."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    request: dict[str, JsonValue]
    """What determines the numbers: run, model, observations, sampler, seed."""
    samples: PositiveInt
    """Samples."""
    x_shape: tuple[PositiveInt, ...]
    """Shape of one draw."""
    draws: PositiveInt | None
    """Draws of each sample; None where each sample is one draw, as of a prior."""
    kept: bool
    """Whether the draws themselves are stored, beside their summaries."""
    summaries: tuple[Summary, ...] = ()
    """Summaries of the draws."""
    levels: tuple[float, ...] = ()
    """Levels of the quantiles."""
    shard_size: PositiveInt
    """Samples per shard; the last may have fewer."""
    units: str
    """Unit of the values."""
    objects: dict[str, ObjectRecord] = Field(default_factory=dict)
    """The metadata and the coordinates, by path in the store."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return shard_count(self.samples, self.shard_size)

    def rows(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row after its last."""
        return shard_rows(shard, self.samples, self.shard_size)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return what one sample has in each array, by name."""
        found: dict[str, tuple[int, ...]] = {}
        if self.kept:
            many = () if self.draws is None else (self.draws,)
            found["x_hat"] = (*many, *self.x_shape)
        for name in self.summaries:
            many = (len(self.levels),) if name == "quantiles" else ()
            found[name] = (*many, *self.x_shape)
        return found


class DrawShard(Record):
    """`shards/00007.json`: a shard is complete."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    shard: NonNegativeInt
    """Number of the shard."""
    start: NonNegativeInt
    """Its first row."""
    stop: PositiveInt
    """The row after its last."""
    objects: dict[str, ObjectRecord]
    """Its objects, one in each array, by path in the store."""
    seconds: NonNegativeFloat
    """Seconds of drawing."""
    finished: datetime
    """When it was written."""


class DrawsManifest(Record):
    """`draws.json`: everything is there."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    plan: DrawPlan
    """What was asked for."""
    attributes: dict[str, JsonValue]
    """Provenance, as in the attributes of the group."""
    notes: dict[str, JsonValue] = Field(default_factory=dict)
    """What was found on the way, such as how the observations compare with those of the run."""
    objects: dict[str, ObjectRecord]
    """Every object of the array store, by path in the store."""
    seconds: NonNegativeFloat
    """Seconds of drawing."""
    finished: datetime
    """When it ended."""


class DrawStore:
    """Draws at any URL; nothing is read or written by opening.

    Arguments:
        objects: Where they are.

    Raises:
        OtherDraws: Something else is there.
    """

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects
        self._metadata: dict[str, bytes] = {}
        if objects.local_path is not None and objects.local_path.is_file():
            raise OtherDraws(
                f"{redact_url(objects.url)} is a file; choose a folder that does not exist yet"
            )
        others = [name for name in objects.children() if name not in _OURS]
        if others:
            raise OtherDraws(
                f"{redact_url(objects.url)} is not empty: it holds {', '.join(others[:5])}"
                f"{', ...' if len(others) > 5 else ''}; choose another place for the draws"
            )

    def plan(self) -> DrawPlan | None:
        """Return `plan.json`: None as long as nothing is laid out."""
        return read_json(self.objects, PLAN, DrawPlan)

    def begun(self) -> DrawPlan | None:
        """Return `plan.json`: None also where it is damaged, and everything is drawn anew."""
        try:
            return self.plan()
        except DamageError:
            return None

    def manifest(self) -> DrawsManifest | None:
        """Return `draws.json`: None as long as the draws are not complete."""
        try:
            return read_json(self.objects, SEAL, DrawsManifest)
        except DamageError:
            return None  # it is written again

    def require_same(self, given: DrawPlan) -> None:
        """Refuse another request than the one that the store was begun with.

        Raises:
            OtherDraws: It is another; the message has the differences.
        """
        stored = self.begun()
        if stored is None:
            return
        ours, theirs = (
            plan.model_dump(mode="json", exclude={"objects", "schema_version"})
            for plan in (stored, given)
        )
        if differences := config_differences(ours, theirs):
            lines = "\n".join(f"  {line}" for line in differences)
            raise OtherDraws(
                f"{redact_url(self.objects.url)} holds draws that were asked for otherwise "
                f"(stored -> given):\n{lines}\ngive the stored values to go on there, or another "
                "place for new draws"
            )

    def create(
        self, given: DrawPlan, sample_ids: NDArray[np.int64], attributes: Mapping[str, JsonValue]
    ) -> DrawPlan:
        """Lay the arrays out, or take over what was begun with the same request.

        Arguments:
            given: What is asked for.
            sample_ids: Ids of the samples, shape (samples,).
            attributes: Provenance, put on the group.

        Returns:
            The plan, with the records of the metadata.

        Raises:
            OtherDraws: The store was begun with another request.
        """
        from storage_schemas import zarr_objects

        self.require_same(given)
        stored = self.begun()
        if stored is not None and is_whole(
            self.objects, stored.objects, prefix=ARRAY, checksum=True
        ):
            return stored
        self.objects.delete(SEAL)
        self.objects.delete(PLAN)
        if stored is None:  # what no plan answers for may belong to any request
            self.objects.delete_folder(_SHARDS)
        files = zarr_objects.encode_metadata(_layout(given, dict(attributes)))
        coordinates: dict[str, NDArray[Any]] = {"sample": np.asarray(sample_ids, np.int64)}
        if given.levels:
            coordinates["quantile"] = np.asarray(given.levels, np.float64)
        for name, values in coordinates.items():
            encoded = zarr_objects.encode_rows(files[f"{name}/zarr.json"], 0, values)
            files |= {f"{name}/{key}": data for key, data in encoded.items()}
        for path, data in files.items():
            self.objects.write(f"{ARRAY}/{path}", data)
        records = {path: ObjectRecord.of(data) for path, data in sorted(files.items())}
        plan = given.model_copy(update={"objects": records})
        write_json(self.objects, PLAN, plan)
        self._metadata = {}
        return plan

    def missing(self) -> list[int]:
        """Return the numbers of the shards that have yet to be drawn, checksums compared."""
        plan = self._required_plan()
        return [number for number in range(plan.shards) if self.shard(number) is None]

    def shard(self, shard: int) -> DrawShard | None:
        """Return a shard's manifest if the shard is complete and its objects are whole."""
        try:
            found = read_json(self.objects, _shard_name(shard), DrawShard)
        except DamageError:
            return None  # it is drawn again
        if found is None or (found.start, found.stop) != self._required_plan().rows(shard):
            return None
        whole = is_whole(self.objects, found.objects, prefix=ARRAY, checksum=True)
        return found if whole else None

    def write_shard(
        self, shard: int, arrays: Mapping[str, NDArray[Any]], *, seconds: float
    ) -> DrawShard:
        """Write a shard: an object in each array, then its manifest.

        Arguments:
            shard: Number of the shard.
            arrays: Values by name of the array, shape (rows of the shard, ...), finite.
            seconds: Seconds of drawing.

        Raises:
            ValueError: An array is missing, has another shape, or is not finite.
            IncompleteError: The arrays are not laid out.
        """
        from storage_schemas import zarr_objects

        plan = self._required_plan()
        start, stop = plan.rows(shard)
        expected = {name: (stop - start, *shape) for name, shape in plan.shapes().items()}
        received = {name: values.shape for name, values in arrays.items()}
        if received != expected:
            raise ValueError(f"shard {shard} received {received} but has {expected}")
        written: dict[str, ObjectRecord] = {}
        for name, values in arrays.items():
            stored = np.ascontiguousarray(values, np.float32)
            if not np.isfinite(stored).all():
                raise ValueError(f"{name} of shard {shard} is not finite; see the sampler")
            encoded = zarr_objects.encode_rows(self._array(plan, name), start, stored)
            for key, data in encoded.items():
                self.objects.write(f"{ARRAY}/{name}/{key}", data)
                written[f"{name}/{key}"] = ObjectRecord.of(data)
        manifest = DrawShard(
            shard=shard,
            start=start,
            stop=stop,
            objects=dict(sorted(written.items())),
            seconds=seconds,
            finished=datetime.now(UTC),
        )
        write_json(self.objects, _shard_name(shard), manifest)
        return manifest

    def seal(
        self, attributes: Mapping[str, JsonValue], notes: Mapping[str, JsonValue]
    ) -> DrawsManifest:
        """Declare the draws complete.

        Arguments:
            attributes: Provenance.
            notes: What was found on the way.

        Raises:
            IncompleteError: A shard is missing.
        """
        plan = self._required_plan()
        shards = [self.shard(number) for number in range(plan.shards)]
        found = [shard for shard in shards if shard is not None]
        if len(found) < plan.shards:
            raise IncompleteError(
                f"{self.objects}: {plan.shards - len(found)} shards have yet to be drawn; run the "
                "same command again"
            )
        objects = dict(plan.objects)
        for shard in found:
            objects |= shard.objects
        manifest = DrawsManifest(
            plan=plan,
            attributes=dict(attributes),
            notes=dict(notes),
            objects=dict(sorted(objects.items())),
            seconds=sum(shard.seconds for shard in found),
            finished=datetime.now(UTC),
        )
        write_json(self.objects, SEAL, manifest)
        return manifest

    def read(self, name: str, shard: int) -> NDArray[np.float32]:
        """Return one array's values of a complete shard, shape (rows of the shard, ...)."""
        from storage_schemas import zarr_objects

        plan, found = self._required_plan(), self.shard(shard)
        if found is None:
            raise IncompleteError(f"{self.objects}: shard {shard} has yet to be drawn")
        pieces = {
            path.removeprefix(f"{name}/"): checked_object(
                self.objects, path, record, whole=True, prefix=ARRAY
            )
            for path, record in found.objects.items()
            if path.startswith(f"{name}/")
        }
        return zarr_objects.decode_rows(
            self._array(plan, name), pieces, found.start, found.stop, path=f"{ARRAY}/{name}"
        )

    def _required_plan(self) -> DrawPlan:
        plan = self.plan()
        if plan is None:
            raise IncompleteError(f"{self.objects} has no {PLAN}; call create first")
        return plan

    def _array(self, plan: DrawPlan, name: str) -> bytes:
        if name not in self._metadata:
            path = f"{name}/zarr.json"
            self._metadata[name] = checked_object(
                self.objects, path, plan.objects.get(path), whole=True, prefix=ARRAY
            )
        return self._metadata[name]


def _shard_name(shard: int) -> str:
    return f"{_SHARDS}/{shard:05d}.json"


def _layout(plan: DrawPlan, attributes: dict[str, Any]) -> StoreLayout:
    extra = {"x_hat": () if plan.draws is None else ("draw",), "quantiles": ("quantile",)}
    arrays = {}
    for name, shape in plan.shapes().items():
        rows = inner_chunk_rows(plan.shard_size, 4 * int(np.prod(shape)))
        arrays[name] = ArrayLayout(
            dims=("sample", *extra.get(name, ()), *clean_dims(plan.x_shape)),
            shape=(plan.samples, *shape),
            dtype="float32",
            chunks=(rows, *shape),
            shards=(plan.shard_size, *shape),
            attributes={"long_name": _LONG_NAMES[name], "units": plan.units},
        )
    arrays["sample"] = ArrayLayout(
        dims=("sample",),
        shape=(plan.samples,),
        dtype="int64",
        chunks=(plan.samples,),
        attributes={"long_name": "sample id in the source's own order"},
    )
    if plan.levels:
        arrays["quantile"] = ArrayLayout(
            dims=("quantile",),
            shape=(len(plan.levels),),
            dtype="float64",
            chunks=(len(plan.levels),),
            attributes={"long_name": "level of the quantile", "units": "1"},
        )
    return StoreLayout(groups={"": attributes}, arrays=arrays)
