"""A Prefect server on loopback, for benchmarks and tests: started and stopped by this process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LoopbackPrefect", "end", "prefect_server"]

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--ui" if ui else "--no-ui"],
            env=own,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(f"{url}/health", process, home / "server.log")
        yield LoopbackPrefect({**own, "PREFECT_API_URL": url}, process.pid)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """End a process and everything that it started in its session.

    Arguments:
        process: The leader of a session.
        patience: Seconds that it has before it is killed.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
