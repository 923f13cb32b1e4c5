"""A Prefect server of its own on loopback, as `prefect server start` gives it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.bench import loopback_prefect

__all__ = ["prefect_server"]


@contextlib.contextmanager
def prefect_server(folder: Path, *, ui: bool = False) -> Iterator[dict[str, str]]:
    """Serve on a free port; yields the environment of commands that use this server.

    `DIFFEM_TEST_SERVER` in it is its process, which leads a group of its own.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment = {**clean, "OMP_NUM_THREADS": "1"}
    with loopback_prefect.prefect_server(folder, environment, ui=ui) as served:
        yield {**served.environment, "DIFFEM_TEST_SERVER": str(served.pid)}
