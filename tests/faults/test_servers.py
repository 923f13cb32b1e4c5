"""The tiny run from the command line in a bucket of every object store that can be started."""

from pathlib import Path

import pytest

from storage_schemas.remote_objects import SINGLE_WRITER
from storage_schemas.verify import verify
from tests.faults.cli import results_at, run_tiny
from tests.storage.servers import Server, reached


@pytest.mark.slow
def test_the_command_line_in_a_bucket(
    server: Server, tiny_config: Path, home: dict[str, str], undisturbed_run: dict[str, str]
) -> None:
    url = server.url("tiny")
    environment = {**home, **server.environment}
    if not server.atomic:
        refused = run_tiny(tiny_config, url, environment, status=2)
        assert f"{SINGLE_WRITER}=1" in refused.stderr
        environment[SINGLE_WRITER] = "1"
    run_tiny(tiny_config, url, environment)
    with reached(server):
        assert results_at(url) == undisturbed_run
        assert verify(url).ok
    again = run_tiny(tiny_config, url, environment)
    assert "is complete" in again.stderr
