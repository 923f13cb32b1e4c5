"""Places for small runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage_schemas.run_store import RunStore
from tests.storage.servers import KINDS, Server, object_store, reached, require_server
from tests.storage.tiny_run import resume_run


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `test_objects` is about syncing; elsewhere it costs 10 ms an object."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def complete_run(tmp_path: Path) -> RunStore:
    """A run of two iterations on the disk."""
    return resume_run(str(tmp_path / "run"))


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A folder of fsspec's memory file system, emptied afterwards."""
    import fsspec

    yield "memory://storage-tests/run"
    file_system = fsspec.filesystem("memory")
    if file_system.exists("/storage-tests"):
        file_system.rm("/storage-tests", recursive=True)


@pytest.fixture(params=["local", "file", "memory"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL of each kind that needs no server."""
    if request.param == "memory":
        url: str = request.getfixturevalue("memory_url")
        return url
    path = str(tmp_path / "run")
    return f"file://{path}" if request.param == "file" else path


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """An object store on loopback, reached through the environment of this process."""
    require_server(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    with object_store(request.param, folder) as server, reached(server):
        yield server


@pytest.fixture
def bucket(server: Server, request: pytest.FixtureRequest) -> str:
    """A place of its own for each test."""
    return server.url(request.node.name.partition("[")[0])
