"""A Prefect server of its own on loopback, as `prefect server start` gives it."""

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
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def prefect_server(folder: Path, *, ui: bool = False) -> Iterator[dict[str, str]]:
    """Serve on a free port; yields the environment of commands that use this server.

    `DIFFEM_TEST_SERVER` in it is its process, which leads a group of its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"},
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        # Else the page would ask port 4200.
        "PREFECT_SERVER_UI_API_URL": url,
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--ui" if ui else "--no-ui"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(f"{url}/health", process)
        yield {**environment, "PREFECT_API_URL": url, "DIFFEM_TEST_SERVER": str(process.pid)}
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """End a process and everything that it started in its session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the Prefect server ended"
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=2),
        ):
            return
        time.sleep(0.2)
    raise AssertionError(f"no Prefect server at {url} after {seconds:.0f} s")
