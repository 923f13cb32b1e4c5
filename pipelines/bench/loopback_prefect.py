"""A Prefect server on loopback, for benchmarks: started and stopped by this process."""

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
from pathlib import Path

__all__ = ["prefect_server"]

_START_SECONDS = 120.0
_END_SECONDS = 20.0


@contextlib.contextmanager
def prefect_server(home: Path, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Serve Prefect on a free port of loopback.

    Arguments:
        home: Existing folder for its database and its log.
        environment: Variables of its process.

    Yields:
        The variables of processes that are to use it.

    Raises:
        RuntimeError: It does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        **environment,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--no-ui"],
            env=own,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}/api"
        _wait_for(f"{url}/health", process, home / "server.log")
        yield {**own, "PREFECT_API_URL": url}
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_END_SECONDS)
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
