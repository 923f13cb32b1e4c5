"""An S3 server on loopback, and a Prefect home for runs from the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cli import results_at, run_tiny
from tests.storage.servers import KINDS, Server, object_store, require_server


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """moto, not yet reached: tests say how."""
    require_server("moto")
    with object_store("moto", tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Each server that can be started, not yet reached."""
    require_server(request.param)
    with object_store(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of the command line: a Prefect home of its own, and no credentials."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "AZURE_"))}
    return {**clean, "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}


@pytest.fixture(scope="session")
def undisturbed_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, home: dict[str, str]
) -> dict[str, str]:
    """Checksums of what the tiny run computes on a disk where nothing goes wrong."""
    url = str(tmp_path_factory.mktemp("runs") / "tiny")
    run_tiny(tiny_config, url, home)
    return results_at(url)
