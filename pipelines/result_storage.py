"""Where Prefect keeps the records of stages: as JSON, beside the run, so that they go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage_schemas.objects import ObjectStore

__all__ = ["FOLDER", "result_storage"]

FOLDER = "prefect"
"""Folder of the records in a run. Nothing in it is a part of the run: it may be deleted."""


def result_storage(objects: ObjectStore) -> Any:
    """Return what Prefect takes for the storage of results.

    Arguments:
        objects: The run. Of a bucket, credentials come from the environment, as for the run.

    Returns:
        A folder, or an (unsaved) block that writes through fsspec; None for a run in memory,
        whose records Prefect keeps where it likes.
    """
    if objects.local_path is not None:
        return Path(objects.local_path).resolve() / FOLDER
    if objects.url.startswith("memory://"):
        return None
    from prefect.filesystems import RemoteFileSystem

    return RemoteFileSystem(basepath=f"{objects.url.rstrip('/')}/{FOLDER}")
