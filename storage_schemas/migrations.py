"""From an older schema version to the present one.

Every stored document carries `schema_version`. A change of a model that old documents do not
satisfy raises `SCHEMA_VERSION` by one and adds a function here that turns a document of the
version before into one of the new version. Reading applies all that are missing, in order; nothing
stored is rewritten by reading. A newer document is refused: this package cannot know its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from storage_schemas.errors import SchemaMismatch

__all__ = ["SCHEMA_VERSION", "migrated"]

SCHEMA_VERSION = 1
"""Version of everything that is stored."""

Migration = Callable[[str, dict[str, Any]], dict[str, Any]]

MIGRATIONS: dict[int, Migration] = {}
"""By the version from which they lead; called with the model's name and the document."""


def migrated(kind: str, data: dict[str, Any], *, path: str) -> dict[str, Any]:
    """Return a document in the present version.

    Arguments:
        kind: Name of the model, e.g. `RunManifest` or `RunConfig`.
        data: The document; not changed.
        path: Where it comes from, for messages.

    Raises:
        SchemaMismatch: If it was written by a newer version of this package.
    """
    version = data.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int):
        return data  # the model says what is wrong
    if version > SCHEMA_VERSION:
        raise SchemaMismatch(
            f"{path} has schema version {version} but this version of diffem reads up to "
            f"{SCHEMA_VERSION}; install a newer diffem (pip install --upgrade diffem)"
        )
    while version < SCHEMA_VERSION and version in MIGRATIONS:
        data = {**MIGRATIONS[version](kind, dict(data)), "schema_version": version + 1}
        version += 1
    return data
