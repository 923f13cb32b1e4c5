"""A Prefect server on loopback, for benchmarks and tests: started and stopped by this process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.subprocesses import free_port, running

__all__ = ["LoopbackPrefect", "prefect_server"]

_START_SECONDS = 300.0


@dataclass(frozen=True)
class LoopbackPrefect:
    """A server that runs."""

    environment: dict[str, str]
    """Variables of processes that are to use it."""
    pid: int
    """Its process, which leads a group of its own."""


@contextlib.contextmanager
def prefect_server(
    home: Path, environment: Mapping[str, str], *, ui: bool = False
) -> Iterator[LoopbackPrefect]:
    """Serve Prefect on a free port of loopback, and stop it on leaving.

    Arguments:
        home: Existing folder for its database and its log.
        environment: Variables of its process.
        ui: Whether it serves its pages as well.

    Raises:
        RuntimeError: It does not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    own = {
        **environment,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Else its pages would ask port 4200.
        "PREFECT_SERVER_UI_API_URL": url,
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--ui" if ui else "--no-ui"]
    log = home / "server.log"
    with running(command, log=log, environment=own) as process:
        _wait_for(f"{url}/health", process, log)
        yield LoopbackPrefect({**own, "PREFECT_API_URL": url}, process.pid)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=2),
        ):
            return
        time.sleep(0.2)
    raise RuntimeError(f"no Prefect server answers at {url}: {log.read_text()[-500:]}")
