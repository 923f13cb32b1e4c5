"""Where Prefect keeps the records of stages: as JSON, beside the run, so that they go with it."""

from __future__ import annotations

import functools
import hashlib
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
        A folder, or a block that writes through fsspec, which the Prefect server knows by the
        run's URL alone; None for a run in memory, whose records Prefect keeps where it likes.
    """
    if objects.local_path is not None:
        return Path(objects.local_path).resolve() / FOLDER
    if objects.url.startswith("memory://"):
        return None
    from prefect.settings import get_current_settings

    # Saved once, not by every iteration; another server has to be told as well.
    return _saved(f"{objects.url.rstrip('/')}/{FOLDER}", str(get_current_settings().api.url))


@functools.cache
def _saved(basepath: str, server: str) -> Any:
    """Save the block of a place on the server: Prefect takes no other."""
    from prefect.filesystems import RemoteFileSystem

    block = RemoteFileSystem(basepath=basepath)
    name = f"diffem-{hashlib.sha256(basepath.encode()).hexdigest()[:12]}"
    block.save(name, overwrite=True)
    return block
