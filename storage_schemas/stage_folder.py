"""A folder of one EM stage sequence: its model, metrics, pictures, stage records and commit.

Both `start/` and `iterations/000/` are such folders. Objects come first, then the record of the
stage that wrote them, then the commit: create-only, naming every object with its checksum, and
alone in meaning 'complete'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from numpy.typing import NDArray

from storage_schemas.documents import create_json, encode_json, read_json, write_json
from storage_schemas.errors import DamageError
from storage_schemas.integrity import is_whole, joined, problem_of
from storage_schemas.manifests import ObjectRecord, PriorManifest, StageRecord, StartManifest
from storage_schemas.metrics import Metrics
from storage_schemas.objects import ObjectStore

__all__ = ["StageFolder"]

_Commit = TypeVar("_Commit", StartManifest, PriorManifest)

METRICS = "metrics.json"
CHECKPOINT = "checkpoint/state.safetensors"


class StageFolder:
    """Objects of one folder of a run.

    Arguments:
        objects: The run's store.
        prefix: Path of the folder.
    """

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self.objects = objects
        self.prefix = prefix

    def path(self, name: str) -> str:
        """Return the path in the run of something in this folder."""
        return joined(self.prefix, name)

    # ------------------------------------------------------------------------------------ tensors

    def write_tensors(
        self,
        name: str,
        tensors: Mapping[str, NDArray[Any]],
        metadata: Mapping[str, Any] | None = None,
    ) -> ObjectRecord:
        """Write named arrays as `NAME.safetensors`; equal input gives equal bytes.

        Returns:
            The object's size and SHA-256: the digest of the model, where it is one.
        """
        from storage_schemas.tensors import encode_tensors

        return self.write_bytes(f"{name}.safetensors", encode_tensors(tensors, metadata))

    def read_tensors(
        self, name: str, *, digest: str | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the arrays and metadata in `NAME.safetensors`.

        Arguments:
            name: Name without ending.
            digest: SHA-256 that the file must have. Its content is checked in any case.

        Raises:
            DamageError: If it is missing or not what was written.
        """
        from storage_schemas.tensors import decode_tensors

        path = self.path(f"{name}.safetensors")
        try:
            data = self.objects.read(path)
        except FileNotFoundError:
            raise DamageError(path, "is missing") from None
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise DamageError(path, f"does not have the digest {digest}")
        return decode_tensors(data, path=path, checked=digest is not None)

    def write_checkpoint(
        self, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]
    ) -> None:
        """Write the M-step's resumable state, replacing the one before."""
        from storage_schemas.tensors import encode_tensors

        self.write_bytes(CHECKPOINT, encode_tensors(tensors, metadata))

    def read_checkpoint(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """Return the M-step's resumable state; None if there is none or if it is damaged."""
        from storage_schemas.tensors import decode_tensors

        path = self.path(CHECKPOINT)
        try:
            return decode_tensors(self.objects.read(path), path=path)
        except (FileNotFoundError, DamageError):
            return None  # a checkpoint only saves time: without it the M-step begins anew

    def delete_checkpoint(self) -> None:
        """Delete the M-step's resumable state."""
        self.objects.delete(self.path(CHECKPOINT))

    # ------------------------------------------------------------------------- bytes and metrics

    def write_bytes(self, name: str, data: bytes) -> ObjectRecord:
        """Write an object atomically, replacing the one that exists."""
        self.objects.write(self.path(name), data)
        return ObjectRecord.of(data)

    def read_bytes(self, name: str) -> bytes:
        """Return an object; FileNotFoundError if it does not exist."""
        return self.objects.read(self.path(name))

    def write_metrics(self, metrics: Metrics) -> ObjectRecord:
        """Write `metrics.json`."""
        return self.write_bytes(METRICS, encode_json(metrics))

    def metrics(self) -> Metrics | None:
        """Return `metrics.json`, None if it does not exist."""
        return read_json(self.objects, self.path(METRICS), Metrics)

    # -------------------------------------------------------------------------------------- stages

    def write_stage(self, record: StageRecord) -> None:
        """Write a stage's record, after the objects that it names."""
        write_json(self.objects, self.path(f"stages/{record.stage}.json"), record)

    def stage(
        self, name: str, *, parent_digest: str | None = None, checksum: bool = True
    ) -> StageRecord | None:
        """Return a stage's record if the stage is complete.

        Arguments:
            name: Name of the stage.
            parent_digest: Digest of what the stage must have worked from; None accepts any.
            checksum: Compare the checksums of its objects, else only their sizes.

        Returns:
            None unless the record exists, is whole, names that parent, and every object that it
            names is what was written.
        """
        try:
            record = read_json(self.objects, self.path(f"stages/{name}.json"), StageRecord)
        except DamageError:
            return None  # the stage is done again
        if record is None or parent_digest not in (None, record.parent_digest):
            return None
        whole = is_whole(self.objects, record.objects, prefix=self.prefix, checksum=checksum)
        return record if whole else None

    # -------------------------------------------------------------------------------------- commit

    def _records(
        self, known: Mapping[str, ObjectRecord], *, without: tuple[str, ...]
    ) -> dict[str, ObjectRecord]:
        """Describe every object of the folder; those that are known are not read again."""
        start = len(self.prefix) + 1
        found: dict[str, ObjectRecord] = {}
        sizes = self.objects.sizes(self.prefix)
        # The small and many are asked for together: one after the other, each waits for the last.
        many = self.objects.read_many(path for path in sizes if path[start:].startswith("shards/"))
        for path in sizes:
            name = path[start:]
            if name.startswith(without):
                continue
            if name in known:
                found[name] = known[name]
            else:
                content = many[path] if path in many else self.objects.read(path)
                found[name] = ObjectRecord.of(content)
        for name, record in known.items():
            if name not in found:
                raise DamageError(self.path(name), "is missing")
            size = sizes[self.path(name)]
            if size != record.bytes:
                raise DamageError(
                    self.path(name), f"has {size} bytes but {record.bytes} were written"
                )
        return found

    def _committed_once(self, name: str, manifest: _Commit) -> _Commit:
        """Write a commit, or return the one that is there if it is of the same model.

        Raises:
            DamageError: If it is committed already with another model.
        """
        try:
            create_json(self.objects, self.path(name), manifest)
        except FileExistsError:
            committed = read_json(self.objects, self.path(name), type(manifest))
            assert committed is not None
            if committed.model_digest != manifest.model_digest:
                raise DamageError(self.path(name), "is committed with another model") from None
            return committed
        return manifest

    def _require_unchanged(self, name: str, data: bytes, committed: ObjectRecord | None) -> None:
        """Refuse to replace an object of a commit by a different one."""
        if committed is not None and problem_of(data, committed) is not None:
            raise DamageError(
                self.path(name),
                "was computed anew with another result than the one committed (another machine, "
                "device or library version?); delete this iteration and all later ones to compute "
                "them anew",
            )


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)
