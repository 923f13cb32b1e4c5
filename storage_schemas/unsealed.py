"""Observations that nobody has sealed yet: what a writer that was interrupted left behind.

    ingest.json             before the first shard: what is being written, and from what
    observations.zarr/      shards, in order; each object is whole or absent
    observations.json       the seal; `ingest.json` is deleted after it

Whoever writes the same from the same reads the shards that are there instead of their source. A
shard counts if all its objects are there and can be decoded, the checksums inside compared. The
first that does not ends what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from numpy.typing import NDArray

from storage_schemas._base import Record
from storage_schemas.documents import read_json, write_json
from storage_schemas.errors import DamageError, SchemaMismatch
from storage_schemas.layout import StoreLayout
from storage_schemas.manifests import Digest, ObjectRecord
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import FOLDER

__all__ = ["PROGRESS", "IngestProgress", "UnsealedShards", "read_progress"]

PROGRESS = "ingest.json"


class IngestProgress(Record):
    """`ingest.json`: what is being written."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    request: Digest
    """Digest of all that decides what the numbers are, apart from the source's own content."""
    source: Digest | None
    """Digest of the source's state: names, sizes, times and tags of its files, or their content;
    None where it cannot be told whether the source has changed."""


def read_progress(objects: ObjectStore) -> IngestProgress | None:
    """Return `ingest.json`, None if there is none that can be used."""
    try:
        return read_json(objects, PROGRESS, IngestProgress)
    except (DamageError, SchemaMismatch):
        return None


class UnsealedShards:
    """The shards that are there, from the first one on.

    Arguments:
        objects: The store.
        layout: Layout of all observations, as they are going to be.
    """

    def __init__(self, objects: ObjectStore, layout: StoreLayout) -> None:
        self._objects = objects
        self._layout = layout
        self._arrays = [p for p in layout.arrays if p not in ("sample", "split")]
        array = layout.arrays["observation"]
        self._samples, self._span = array.shape[0], array.object_rows
        self.rows = 0
        """Rows that `read` has given so far."""
        self.kept: dict[str, ObjectRecord] = {}
        """The objects that hold these rows."""

    def begin(self, progress: IngestProgress) -> None:
        """Delete everything, and say what is going to be written."""
        self._objects.delete(PROGRESS)
        self._objects.delete_folder(FOLDER)
        write_json(self._objects, PROGRESS, progress)

    def tidy(self) -> None:
        """Delete what is no shard: metadata, and what lies beyond the last row."""
        wanted = {
            path
            for start in range(0, self._samples, self._span)
            for path in self._paths(start).values()
        }
        for path in self._objects.list(FOLDER):
            if path not in wanted:
                self._objects.delete(path)

    def read(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the arrays of each whole shard by path, `sample` and `split` left out."""
        from storage_schemas import zarr_objects

        metadata = zarr_objects.encode_metadata(self._layout)
        while self.rows < self._samples:
            start, stop = self.rows, min(self._samples, self.rows + self._span)
            found: dict[str, NDArray[Any]] = {}
            records: dict[str, ObjectRecord] = {}
            for array, path in self._paths(start).items():
                key = path.removeprefix(f"{FOLDER}/{array}/")
                try:
                    data = self._objects.read(path)
                    found[array] = zarr_objects.decode_rows(
                        metadata[f"{array}/zarr.json"], {key: data}, start, stop, path=path
                    )
                except (FileNotFoundError, DamageError):
                    return
                records[path] = ObjectRecord.of(data)
            self.kept |= records
            self.rows = stop
            yield found

    def _paths(self, start: int) -> Mapping[str, str]:
        """Return the paths of the objects that begin at a row, by array."""
        from storage_schemas import zarr_objects

        return {
            path: f"{FOLDER}/{path}/"
            + zarr_objects.object_key(start, self._span, len(self._layout.arrays[path].shape))
            for path in self._arrays
        }
