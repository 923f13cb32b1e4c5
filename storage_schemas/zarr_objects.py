"""Zarr objects as bytes: arrays are encoded and decoded in memory and written by `ObjectStore`.

Zarr does the encoding, on a memory store that holds the array's metadata; the resulting objects
are written like every other object of a run: atomically, synced, with a known checksum, by the
same code on a disk and in a bucket. Reading goes the same way back, so that a failing request and
damaged bytes cannot be confused: after the bytes have arrived, whatever goes wrong is damage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore, StorePath

from storage_schemas.errors import DamageError, LayoutMismatch
from storage_schemas.layout import ArrayLayout, StoreLayout

__all__ = [
    "decode_rows",
    "describe",
    "encode_metadata",
    "encode_rows",
    "object_key",
    "require_same_layout",
]

METADATA_KEY = "zarr.json"


def encode_metadata(layout: StoreLayout) -> dict[str, bytes]:
    """Return the metadata objects of a hierarchy, the root's with all of them (consolidated).

    Arguments:
        layout: Groups and arrays.

    Returns:
        Bytes by key, arrays before the groups that hold them, the root last.
    """
    objects: dict[str, Buffer] = {}
    store = MemoryStore(objects)
    for path, attributes in layout.groups.items():
        zarr.create_group(store, path=path, attributes=attributes)
    for path, array in layout.arrays.items():
        zarr.create_array(
            store,
            name=path,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunks,
            shards=array.shards,
            compressors=_compressors(array),
            fill_value=array.fill,
            attributes=array.attributes,
            dimension_names=array.dims,
        )
    found = {key: objects[key].to_bytes() for key in sorted(objects, key=_deepest_first)}
    return {**found, METADATA_KEY: _with_everything_below(found)}


def object_key(start: int, object_rows: int, rank: int) -> str:
    """Return the key, below its array, of the object that begins at a row."""
    return "/".join(["c", str(start // object_rows), *["0"] * (rank - 1)])


def encode_rows(metadata: bytes, start: int, rows: NDArray[Any]) -> dict[str, bytes]:
    """Return the objects that hold some rows of an array, by key below the array.

    Arguments:
        metadata: The array's metadata object.
        start: The first row; where an object begins.
        rows: Values, shape (n, ...); they end where an object or the array ends.
    """
    objects: dict[str, Buffer] = {}
    array = _open(metadata, objects)
    span = (array.shards or array.chunks)[0]
    stop = start + len(rows)
    assert start % span == 0, f"row {start} is inside an object of {span} rows"
    assert stop % span == 0 or stop == array.shape[0], f"row {stop} is inside an object"
    assert rows.shape[1:] == array.shape[1:], f"rows {rows.shape} for an array {array.shape}"
    array[start:stop] = rows
    return {key: objects[key].to_bytes() for key in sorted(objects)}


def decode_rows(
    metadata: bytes, objects: Mapping[str, bytes], start: int, stop: int, *, path: str
) -> NDArray[Any]:
    """Return some rows of an array from the objects that hold them.

    Arguments:
        metadata: The array's metadata object.
        objects: Bytes by key below the array; all that the rows touch.
        start: First row.
        stop: Row after the last.
        path: Where the objects come from, for messages.

    Raises:
        DamageError: If they cannot be decoded, checksums included.
    """
    buffers = {key: _buffer(data) for key, data in objects.items()}
    if not all(len(data) for data in objects.values()):
        raise DamageError(path, "is empty")  # Zarr would read it as fill values
    try:
        return np.asarray(_open(metadata, buffers)[start:stop])
    except Exception as error:  # everything is in memory: whatever fails here is in the bytes
        raise DamageError(path, f"cannot be decoded ({error})") from error


def describe(metadata: bytes, *, path: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return an array's shape, type and rows per object from its metadata.

    Arguments:
        metadata: The array's metadata object.
        path: Where it comes from, for messages.

    Raises:
        DamageError: If it describes no array.
    """
    try:
        array = _open(metadata, {})
    except Exception as error:  # in memory: whatever fails here is in the bytes
        raise DamageError(path, f"does not describe an array ({error})") from error
    return array.shape, array.dtype, (array.shards or array.chunks)[0]


def require_same_layout(path: str, *, stored: bytes, given: bytes) -> None:
    """Raise LayoutMismatch if two arrays' metadata differ in more than their attributes."""
    ours, theirs = (_metadata_fields(data) for data in (stored, given))
    differences = {
        key: (ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    }
    if differences:
        raise LayoutMismatch.at(path, differences)


def _metadata_fields(metadata: bytes) -> dict[str, object]:
    array = _open(metadata, {})
    return {
        "shape": array.shape,
        "dtype": str(array.dtype),
        "chunks": array.chunks,
        "shards": array.shards,
        "codecs": str(array.metadata.to_dict()["codecs"]),
        "fill": str(array.fill_value),
        "dims": getattr(array.metadata, "dimension_names", None),
    }


def _open(metadata: bytes, objects: dict[str, Buffer]) -> zarr.Array[Any]:
    # Chunks that hold nothing but the fill value are written too, so that a missing object is
    # never a legitimate one. The setting is not stored: it is given at every opening.
    return zarr.Array(
        zarr.AsyncArray(
            metadata=json.loads(metadata),
            store_path=StorePath(MemoryStore(objects)),
            config={"write_empty_chunks": True},
        )
    )


def _buffer(data: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(data)


def _compressors(layout: ArrayLayout) -> list[Any]:
    if layout.compression is None:
        return [Crc32cCodec()]
    blosc = BloscCodec(
        typesize=np.dtype(layout.dtype).itemsize,
        cname=layout.compression.cname,
        clevel=layout.compression.level,
        shuffle=layout.compression.shuffle,
    )
    return [blosc, Crc32cCodec()]


def _with_everything_below(objects: Mapping[str, bytes]) -> bytes:
    """Return the root's metadata with all other metadata in it, as `consolidate_metadata` does.

    xarray then opens the store with one request and without a warning. Nothing is ever added to
    these hierarchies, so the copy cannot fall behind.
    """
    below = {}
    for key in sorted(objects, key=lambda key: (key.count("/"), key)):
        node = json.loads(objects[key])
        if node["node_type"] == "group":
            node["consolidated_metadata"] = _consolidated({})
        below[key.removesuffix(f"/{METADATA_KEY}")] = node
    root = below.pop(METADATA_KEY)
    root["consolidated_metadata"] = _consolidated(below)
    return json.dumps(root, indent=2).encode()


def _consolidated(metadata: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": metadata}


def _deepest_first(key: str) -> tuple[int, str]:
    return -key.count("/"), key
