"""Prefect's embedded server, which ends when this process does, and not before.

Without a server configured, Prefect starts one as a child process and stops it at exit. That
leaves two gaps. A terminal or a service manager sends its signal to the whole process group, so
that the server would be gone before the run's last states are reported: it gets a session of its
own. And a parent that is killed leaves the server behind: a watcher, which waits for the end of a
pipe that only this process holds, stops it then.
"""

from __future__ import annotations

import atexit
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.prefect_settings import has_server

__all__ = ["start_embedded_server"]

# Ends when a line comes (all is well), or when the pipe breaks: then it stops the process $1.
_WATCH = 'read -r line || { kill -TERM "$1"; sleep 3; kill -KILL "$1"; } 2>/dev/null'


def start_embedded_server() -> None:
    """Start Prefect's embedded server, unless a server is configured or this one runs already.

    Prefect stops it when this process exits, after the last records have been sent.

    Raises:
        RuntimeError: It does not start.
    """
    if has_server():
        return
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    if server.running:
        return
    with _sessions_of_their_own():
        server.start()
    assert server.server_process is not None
    watcher = subprocess.Popen(
        ["sh", "-c", _WATCH, "sh", str(server.server_process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Runs before Prefect's own stop of the server, which was registered earlier.
    atexit.register(_dismiss, watcher)


@contextmanager
def _sessions_of_their_own() -> Iterator[None]:
    """Start the processes of this context in sessions of their own: Prefect has no such option."""
    plain: Any = subprocess.Popen

    class InSession(plain):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "start_new_session": True})

    subprocess.Popen = InSession  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = plain  # type: ignore[misc]


def _dismiss(watcher: subprocess.Popen[bytes]) -> None:
    assert watcher.stdin is not None
    with watcher.stdin:
        watcher.stdin.write(b"done\n")
    watcher.wait()
