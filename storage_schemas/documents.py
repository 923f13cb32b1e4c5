"""JSON documents that notice when they were changed: every manifest of a run is one.

A document is the model's JSON plus a last key `sha256`, the SHA-256 of the rest in canonical form
(sorted keys, no spaces). A flipped bit, a truncation and an edit by hand are all found at reading.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import ValidationError

from storage_schemas._base import Record
from storage_schemas.errors import DamageError, SchemaMismatch
from storage_schemas.migrations import migrated
from storage_schemas.objects import ObjectStore

__all__ = [
    "canonical_json",
    "create_json",
    "decode_json",
    "digest_of",
    "encode_json",
    "read_json",
    "write_json",
]

_Model = TypeVar("_Model", bound=Record)


def canonical_json(data: Any) -> bytes:
    """Return the one text that stands for JSON-able data: sorted keys, no spaces, ASCII."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def digest_of(data: Any) -> str:
    """Return the SHA-256 of JSON-able data in canonical form, in hexadecimal."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def encode_json(model: Record) -> bytes:
    """Return a model as a document, checksum included."""
    data = model.model_dump(mode="json")
    return (json.dumps({**data, "sha256": digest_of(data)}, indent=2) + "\n").encode("ascii")


def decode_json(content: bytes, model: type[_Model], *, path: str) -> _Model:
    """Return the model in a document.

    Arguments:
        content: The document.
        model: The model's class.
        path: The document's path, for messages.

    Raises:
        DamageError: If the document is not what was written.
        SchemaMismatch: If it was written by another version, which this one cannot read.
    """
    try:
        data = json.loads(content)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise DamageError(path, f"is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise DamageError(path, "is not a JSON object")
    checksum = data.pop("sha256", None)
    if checksum != digest_of(data):
        raise DamageError(path, "does not answer to its checksum: damaged, or edited by hand")
    data = migrated(model.__name__, data, path=path)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SchemaMismatch(
            f"{path} is whole but does not hold what this version of diffem expects ({error}); "
            "read it with the version that wrote the run (`code_version` in run.json)"
        ) from error


def read_json(objects: ObjectStore, path: str, model: type[_Model]) -> _Model | None:
    """Return the model in a document of a store, None if there is no such object."""
    try:
        content = objects.read(path)
    except FileNotFoundError:
        return None
    return decode_json(content, model, path=path)


def write_json(objects: ObjectStore, path: str, model: Record) -> None:
    """Write a model as a document, replacing the one that exists."""
    objects.write(path, encode_json(model))


def create_json(objects: ObjectStore, path: str, model: Record) -> None:
    """Write a model as a document; FileExistsError if there is one."""
    objects.create(path, encode_json(model))
