"""Does an object answer to its manifest?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from storage_schemas.errors import DamageError
from storage_schemas.manifests import ObjectRecord
from storage_schemas.objects import ObjectStore

__all__ = ["checked_object", "is_whole", "joined", "problem_of"]


def joined(prefix: str, path: str) -> str:
    """Return a path below a folder; the empty folder is the store itself."""
    return f"{prefix}/{path}" if prefix else path


def checked_object(
    objects: ObjectStore,
    path: str,
    record: ObjectRecord | None,
    *,
    whole: bool,
    prefix: str = "",
) -> bytes:
    """Return an object that a manifest names.

    Arguments:
        objects: The store.
        path: Path in the manifest.
        record: What the manifest says, None if it does not name the object.
        whole: Compare the checksum; else only the size (for objects with checksums inside).
        prefix: Folder of the manifest.

    Raises:
        DamageError: If the object is missing or differs.
    """
    place = joined(prefix, path)
    if record is None:
        raise DamageError(place, "is not named by its manifest")
    try:
        data = objects.read(place)
    except FileNotFoundError:
        raise DamageError(place, "is missing") from None
    if problem := problem_of(data, record, whole=whole):
        raise DamageError(place, problem)
    return data


def problem_of(data: bytes, record: ObjectRecord, *, whole: bool = True) -> str | None:
    """Say how an object's bytes differ from what was written, None if they do not."""
    if len(data) != record.bytes:
        return f"has {len(data)} bytes but {record.bytes} were written"
    if whole and hashlib.sha256(data).hexdigest() != record.sha256:
        return "does not answer to its checksum"
    return None


def is_whole(
    objects: ObjectStore,
    records: Mapping[str, ObjectRecord],
    *,
    prefix: str,
    checksum: bool,
    sizes: Mapping[str, int] | None = None,
) -> bool:
    """Tell whether all objects of a manifest exist with the right size, or checksum.

    Arguments:
        objects: The store.
        records: Objects by path in the manifest's folder.
        prefix: The manifest's folder.
        checksum: Compare checksums too.
        sizes: Sizes by path in the store, where they have been listed already.
    """
    for path, record in records.items():
        place = joined(prefix, path)
        size = objects.size(place) if sizes is None else sizes.get(place)
        if size != record.bytes:
            return False
        if checksum and problem_of(objects.read(place), record) is not None:
            return False
    return True
