"""Prefect's embedded server: begun early, waited for late, ended with this process.

Where no server is configured, Prefect starts one as a child when the first flow runs, and waits
for it. Here the same server begins as soon as a run is wanted, and starts while this process
imports PyTorch and checks the config. It has a session of its own, since a terminal or a service
manager sends its signal to the whole process group, and the server would be gone before the run's
last states are reported. And a parent that is killed does not leave it behind: a watcher, which
waits for the end of a pipe that only this process holds, stops it then.
"""

from __future__ import annotations

import atexit
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.subprocesses import end, free_port

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["application", "begin_embedded_server", "embedded_server", "has_server"]

# Ends when a line comes (all is well), or when the pipe breaks: then it stops the process $1.
# That may be setting up its database, and gets a while to end by itself.
_WATCH = """
read -r line && exit
kill -TERM "$1" || exit
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do sleep 1; kill -0 "$1" || exit; done
kill -KILL "$1"
"""
_PACKAGES = Path(__file__).parents[1]
_HOST = "127.0.0.1"
_PORT_IS_TAKEN = 3  # uvicorn's exit status where it could not start
_LOOK_SECONDS = 0.05
_END_SECONDS = 5.0

_lock = threading.Lock()
_server: _Server | None = None
_left: list[subprocess.Popen[bytes]] = []
"""Processes that end by themselves after this one, or before."""


def application() -> FastAPI:
    """Make the application that the server's process serves."""
    from prefect.server.api.server import create_app

    return create_app(ephemeral=True, final=True)


def has_server() -> bool:
    """Tell whether the environment or the active Prefect profile names a server to run on."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url not in (None, _server and _server.url)


def begin_embedded_server() -> None:
    """Begin to start Prefect's embedded server, unless a server is configured or this one runs.

    It is stopped when this process exits, after the last records have been sent.
    """
    global _server
    with _lock:
        if _server is None and not has_server():
            _server = _Server()
            atexit.register(_end)


@contextmanager
def embedded_server() -> Iterator[None]:
    """Run the flows inside on the embedded server, unless a server is configured.

    Raises:
        RuntimeError: It does not start.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    begin_embedded_server()
    if has_server() or _server is None:
        yield
        return
    try:
        _server.wait()
    except RuntimeError:
        _end()
        raise
    with temporary_settings({PREFECT_API_URL: _server.url}):
        yield


def _end() -> None:
    global _server
    with _lock:
        if _server is not None:
            _server.end()
        _server = None


class _Server:
    """The server's process and its watcher; it begins when this is made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._ready = False
        self._start()

    @property
    def url(self) -> str:
        """Address of its API."""
        return f"http://{_HOST}:{self._port}/api"

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: It does not, or its process ends.
        """
        from prefect.settings import get_current_settings

        allowed = get_current_settings().server.ephemeral.startup_timeout_seconds
        while not self._ready:
            status = self._process.poll()
            if status == _PORT_IS_TAKEN and not _is_free(self._port):
                self._dismiss()
                self._said.close()
                self._start()
            elif status is not None:
                raise RuntimeError(f"its process ended with status {status}{self._last_words()}")
            self._ready = self._answers()
            if not self._ready and time.monotonic() - self._began > allowed:
                raise RuntimeError(f"it did not answer in {allowed:g} s")
            time.sleep(_LOOK_SECONDS)

    def end(self) -> None:
        """Stop it, and its watcher; one that does not answer yet is left to its watcher."""
        self._said.close()
        if not self._ready:
            assert self._watcher.stdin is not None
            self._watcher.stdin.close()
            _left.extend((self._process, self._watcher))
            return
        self._dismiss()
        end(self._process, _END_SECONDS)

    def _start(self) -> None:
        self._port = free_port()
        # Not what the current folder holds: -P for Python, --app-dir for uvicorn.
        command = [sys.executable, "-P", "-m", "uvicorn", "--app-dir", str(_PACKAGES)]
        address = ["--host", _HOST, "--port", str(self._port)]
        options = ["--log-level", "error", "--lifespan", "on", "--factory"]
        # Whoever reads what this process says is not to wait for the end of the server.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, *address, *options, f"{__name__}:application"],
            env={**os.environ, "PREFECT_SERVER_UI_ENABLED": "false"},
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,
        )
        self._watcher = subprocess.Popen(
            ["sh", "-c", _WATCH, "sh", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        return next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=5)
        try:
            connection.request("GET", "/api/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _dismiss(self) -> None:
        assert self._watcher.stdin is not None
        with suppress(BrokenPipeError), self._watcher.stdin:
            self._watcher.stdin.write(b"done\n")
        self._watcher.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True
