"""Observations: written once as a stream, sealed by `observations.json`, read by rows.

Blocks of any length come in and whole shards go out, so that memory holds one shard and one
block, however many observations there are. Order of writing: shards, sample ids and split,
metadata, seal. Until the seal is there nothing of it counts, and the next attempt begins anew,
unless its caller knows the shards that are there (`unsealed`). A store that is sealed is written
again only with the same numbers (to repair it): others are refused before they touch it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage_schemas.documents import create_json, digest_of, read_json
from storage_schemas.errors import BadObservations, IncompleteError
from storage_schemas.integrity import checked_object
from storage_schemas.layout import StoreLayout, observation_layout
from storage_schemas.manifests import ObjectRecord, ObservationsManifest
from storage_schemas.objects import ObjectStore

__all__ = [
    "ObservationBlock",
    "Observations",
    "Split",
    "layout_of",
    "read_seal",
    "write_observations",
]

Split = Literal["train", "holdout"]
Rows = slice | NDArray[np.int64] | None

FOLDER = "observations.zarr"
SEAL = "observations.json"

# Ids of more observations than this are kept, of so many stores and splits: each shard asks for
# its own, and reading all of them for every shard would grow with the square of their number.
_FEW = 2**16
_INDEXES = 4
_indexes: dict[tuple[object, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}


@dataclass(frozen=True)
class ObservationBlock:
    """Some observations, in the data's own units."""

    sample: NDArray[np.int64]
    """Original ids, shape (n,)."""
    holdout: NDArray[np.bool_]
    """Which are held out for evaluation, shape (n,)."""
    y: NDArray[Any]
    """Observations, shape (n, *y_shape)."""
    params: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Parameters of each sample's operator, by name, shape (n, ...)."""
    x: NDArray[Any] | None = None
    """Clean samples, where they are known: for evaluation only; shape (n, *x_shape)."""
    label: NDArray[Any] | None = None
    """Classes, where they are known: for evaluation only; shape (n,)."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by their paths in the store."""
        found: dict[str, NDArray[Any]] = {
            "sample": np.asarray(self.sample, np.int64),
            "split": np.asarray(self.holdout, np.uint8),
            "observation": np.asarray(self.y),
        }
        found |= {f"params/{name}": np.asarray(a) for name, a in sorted(self.params.items())}
        if self.x is not None:
            found["truth/clean"] = np.asarray(self.x)
        if self.label is not None:
            found["truth/label"] = np.asarray(self.label)
        return found


def read_seal(objects: ObjectStore) -> ObservationsManifest | None:
    """Return `observations.json`, None as long as the observations are not complete."""
    return read_json(objects, SEAL, ObservationsManifest)


def layout_of(
    arrays: Mapping[str, NDArray[Any]],
    *,
    samples: int,
    x_shape: tuple[int, ...],
    units: str,
    attributes: Mapping[str, Any],
) -> StoreLayout:
    """Return the layout of observations such as those of a block.

    Arguments:
        arrays: `ObservationBlock.arrays()`.
        samples: How many there are in all.
        x_shape: Shape of one clean sample.
        units: Unit of the values.
        attributes: Provenance, put on the group.
    """
    specs = {path: (a.shape[1:], a.dtype.name) for path, a in arrays.items()}
    return observation_layout(
        samples=samples,
        x_shape=x_shape,
        y_shape=specs["observation"][0],
        y_dtype=specs["observation"][1],
        parameters={
            path.removeprefix("params/"): spec
            for path, spec in specs.items()
            if path.startswith("params/")
        },
        x_dtype=specs["truth/clean"][1] if "truth/clean" in specs else None,
        label_dtype=specs["truth/label"][1] if "truth/label" in specs else None,
        units=units,
        attributes=dict(attributes),
    )


def write_observations(
    objects: ObjectStore,
    blocks: Iterable[ObservationBlock],
    *,
    x_shape: tuple[int, ...],
    units: str,
    source: str,
    attributes: Mapping[str, Any],
    data_digest: str | None = None,
    kept: Mapping[str, ObjectRecord] | None = None,
    copied: Sequence[str] = (),
    from_iteration: int = 0,
) -> ObservationsManifest:
    """Write observations and seal them.

    Arguments:
        objects: The run's store.
        blocks: Observations in their final order, any number at a time.
        x_shape: Shape of one clean sample.
        units: Unit of the values.
        source: Where they come from, in words.
        attributes: Provenance, put on the group.
        data_digest: Digest that the numbers must have, where something was computed from them.
        kept: Objects by path that are there already and are not written again; it may grow while
            blocks are read. By default everything that nobody sealed is deleted first.
        copied: Data digests of the generations of another store that they are copied from.
        from_iteration: The first EM iteration that learns from them.

    Returns:
        The seal: the one that was there if the store was sealed already.

    Raises:
        BadObservations: If they are none, not finite, of a wrong shape or twice the same id, or
            other than those that are sealed.
    """
    from storage_schemas import zarr_objects

    began = time.monotonic()
    sealed = read_seal(objects)
    if sealed is None and kept is None:
        objects.delete_folder(FOLDER)
    stream = _checked(blocks, x_shape)
    try:
        first = next(stream)
    except StopIteration:
        raise BadObservations("there are no observations; give at least one") from None
    specs = {path: (a.shape[1:], a.dtype.name) for path, a in first.items()}

    def layout(samples: int) -> StoreLayout:
        return layout_of(
            first, samples=samples, x_shape=x_shape, units=units, attributes=attributes
        )

    records: dict[str, ObjectRecord] = {}

    def put(path: str, data: bytes) -> None:
        record = ObjectRecord.of(data)
        if sealed is not None and sealed.objects.get(path) != record:
            raise BadObservations(
                f"the observations given are not those sealed in {SEAL} ({path} would differ); "
                "give the same, or another --store or name for a new run"
            )
        if kept is None or kept.get(path) != record:
            objects.write(path, data)
        records[path] = record

    digests = {path: hashlib.sha256() for path in first}
    ids: list[NDArray[np.int64]] = []
    splits: list[NDArray[np.uint8]] = []
    small = {"sample", "split"}
    rows = layout(1).arrays["observation"].object_rows
    start = 0
    for shard in _rebuffered(first, stream, rows):
        count = len(shard["sample"])
        metadata = zarr_objects.encode_metadata(layout(start + count))
        for path, values in shard.items():
            digests[path].update(np.ascontiguousarray(values).view(np.uint8).data)
            if path in small:
                continue
            encoded = zarr_objects.encode_rows(metadata[f"{path}/zarr.json"], start, values)
            for key, data in encoded.items():
                put(f"{FOLDER}/{path}/{key}", data)
        ids.append(shard["sample"].copy())
        splits.append(shard["split"].copy())
        start += count
    sample, split = np.concatenate(ids), np.concatenate(splits)
    _require_unique(sample)
    final = layout(start)
    metadata = zarr_objects.encode_metadata(final)
    for path, values in (("sample", sample), ("split", split)):
        for key, data in zarr_objects.encode_rows(
            metadata[f"{path}/zarr.json"], 0, values
        ).items():
            put(f"{FOLDER}/{path}/{key}", data)
    for key, data in metadata.items():
        put(f"{FOLDER}/{key}", data)
    manifest = ObservationsManifest(
        data_digest=digest_of(
            {
                path: [dtype, list(shape), digests[path].hexdigest()]
                for path, (shape, dtype) in specs.items()
            }
        ),
        samples=start,
        holdout=int(split.sum()),
        x_shape=x_shape,
        y_shape=specs["observation"][0],
        parameters={
            path.removeprefix("params/"): shape
            for path, (shape, _) in specs.items()
            if path.startswith("params/")
        },
        truth="truth/clean" in specs,
        labels="truth/label" in specs,
        units=units,
        source=source,
        copied=tuple(copied),
        from_iteration=from_iteration,
        objects=dict(sorted(records.items())),
        seconds=time.monotonic() - began,
        finished=datetime.now(UTC),
    )
    if sealed is not None:
        if sealed.objects.keys() != records.keys():
            raise BadObservations(
                f"{start} observations were given but {sealed.samples} are sealed in {SEAL}; give "
                "the same, or another --store or name for a new run"
            )
        return sealed
    if data_digest not in (None, manifest.data_digest):
        raise BadObservations(
            "the observations given are not those that this run was computed from; give the same, "
            "or another --store or name for a new run"
        )
    create_json(objects, SEAL, manifest)
    return manifest


class Observations:
    """The observations of a run, or one split of them; nothing is read before it is asked for.

    Arguments:
        objects: The run's store.
        split: `train`, `holdout`, or None for all.

    Raises:
        IncompleteError: If they are not sealed.
        DamageError: Here and at every reading, if an object is not what was sealed.
    """

    def __init__(self, objects: ObjectStore, split: Split | None = None) -> None:
        manifest = read_seal(objects)
        if manifest is None:
            raise IncompleteError(
                f"{objects} has no {SEAL}: the observations are not complete; run `diffem run`"
            )
        self._objects = objects
        self.manifest = manifest
        self._metadata: dict[str, bytes] = {}
        self._rows, ids = self._index(split)
        self.sample_ids: NDArray[np.int64] = ids
        """Original ids, shape (n,)."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many of them came together, in order: all, unless they grew (`generations`)."""
        return (len(self),)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one clean sample."""
        return self.manifest.x_shape

    @property
    def y_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return self.manifest.y_shape

    def y(self, rows: Rows = None) -> NDArray[Any]:
        """Return observations, in the data's own units.

        Arguments:
            rows: Which rows of this split: a slice, indices, or all.

        Returns:
            Shape (n, *y_shape).
        """
        return self._read("observation", self._selected(rows))

    def params(self, rows: Rows = None) -> dict[str, NDArray[Any]]:
        """Return the operators' parameters by name, shape (n, ...)."""
        selected = self._selected(rows)
        return {name: self._read(f"params/{name}", selected) for name in self.manifest.parameters}

    def truth(self, rows: Rows = None) -> NDArray[Any] | None:
        """Return clean samples, shape (n, *x_shape), or None: for evaluation only."""
        return self._read("truth/clean", self._selected(rows)) if self.manifest.truth else None

    def labels(self, rows: Rows = None) -> NDArray[Any] | None:
        """Return classes, shape (n,), or None: for evaluation only."""
        return self._read("truth/label", self._selected(rows)) if self.manifest.labels else None

    def _index(self, split: Split | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of a split and their ids: of many, once a process, not once a shard."""
        names = [f"{FOLDER}/{name}/c/0" for name in ("sample", "split")]
        records = [self.manifest.objects.get(name) for name in names]
        key = (self._objects.url, split, *(record and record.sha256 for record in records))
        many = self.manifest.samples > _FEW
        if many and key in _indexes:
            return _indexes[key]
        everyone = np.arange(self.manifest.samples)
        sample = self._read("sample", everyone)
        rows = everyone
        if split is not None:
            rows = np.flatnonzero(self._read("split", everyone) == (split == "holdout"))
        found = rows, sample[rows]
        if many:
            for array in found:
                array.setflags(write=False)
            while len(_indexes) >= _INDEXES:
                _indexes.pop(next(iter(_indexes)), None)
            _indexes[key] = found
        return found

    def _selected(self, rows: Rows) -> NDArray[np.int64]:
        return self._rows if rows is None else self._rows[rows]

    def _read(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        from storage_schemas import zarr_objects

        path = f"{FOLDER}/{name}"
        if name not in self._metadata:
            self._metadata[name] = self._checked_object(f"{path}/zarr.json", whole=True)
        metadata = self._metadata[name]
        shape, dtype, span = zarr_objects.describe(metadata, path=f"{path}/zarr.json")
        out = np.empty((len(rows), *shape[1:]), dtype)
        for number in np.unique(rows // span):
            inside = np.flatnonzero(rows // span == number)
            start = int(number) * span
            stop = min(shape[0], start + span)
            key = zarr_objects.object_key(start, span, len(shape))
            data = self._checked_object(f"{path}/{key}")
            decoded = zarr_objects.decode_rows(
                metadata, {key: data}, start, stop, path=f"{path}/{key}"
            )
            out[inside] = decoded[rows[inside] - start]
        return out

    def _checked_object(self, path: str, *, whole: bool = False) -> bytes:
        """Read an object and compare its size; its checksum too where it has none inside."""
        return checked_object(self._objects, path, self.manifest.objects.get(path), whole=whole)


def _checked(
    blocks: Iterable[ObservationBlock], x_shape: tuple[int, ...]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Pass on the arrays of each block that is not empty; refuse what cannot be observed."""
    specs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] | None = None
    row = 0
    for block in blocks:
        arrays = block.arrays()
        count = len(arrays["sample"])
        found = {path: (a.shape[1:], a.dtype) for path, a in arrays.items()}
        specs = specs or found
        for path in sorted(found.keys() | specs.keys()):
            if found.get(path) != specs.get(path):
                raise BadObservations(
                    f"rows {row} to {row + count - 1}: `{path}` is {_spec(found.get(path))} but "
                    f"the rows before have {_spec(specs.get(path))}; make all samples alike"
                )
            if len(arrays[path]) != count:
                raise BadObservations(
                    f"`{path}` has {len(arrays[path])} rows for {count} samples; give one for each"
                )
        if "truth/clean" in found and found["truth/clean"][0] != x_shape:
            raise BadObservations(
                f"`x` has shape {found['truth/clean'][0]} but a clean sample has {x_shape}; set "
                "the channel's x_shape or reshape the samples"
            )
        for path, values in arrays.items():
            if values.dtype.kind not in "fc":
                continue
            bad = np.flatnonzero(~np.isfinite(values.reshape(count, -1)).all(axis=1))
            if len(bad):
                raise BadObservations(
                    f"sample {arrays['sample'][bad[0]]} (row {row + bad[0]}): `{path}` holds NaN "
                    f"or infinity, as do {len(bad)} of {count} samples; leave them out "
                    "or mask the pixels"
                )
        row += count
        if count:
            yield arrays


def _spec(spec: tuple[tuple[int, ...], np.dtype[Any]] | None) -> str:
    return "missing" if spec is None else f"{spec[1]} {spec[0]}"


def _rebuffered(
    first: dict[str, NDArray[Any]], rest: Iterator[dict[str, NDArray[Any]]], rows: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Cut a stream of blocks into pieces of `rows` rows; the last may be shorter.

    A piece is overwritten by the next one: new buffers for each would leave several times as much
    memory with the process.
    """
    buffers = {path: np.empty((rows, *a.shape[1:]), a.dtype) for path, a in first.items()}
    held = 0
    for block in chain([first], rest):
        used = 0
        while used < len(block["sample"]):
            take = min(len(block["sample"]) - used, rows - held)
            for path, values in block.items():
                buffers[path][held : held + take] = values[used : used + take]
            held, used = held + take, used + take
            if held == rows:
                yield buffers
                held = 0
    if held:
        yield {path: values[:held] for path, values in buffers.items()}


def _require_unique(sample: NDArray[np.int64]) -> None:
    values, counts = np.unique(sample, return_counts=True)
    if len(values) != len(sample):
        twice = values[counts > 1]
        raise BadObservations(
            f"sample {twice[0]} occurs {counts.max()} times ({len(twice)} ids repeat); give every "
            "sample an id of its own"
        )
