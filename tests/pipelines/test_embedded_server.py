"""The embedded server's process: its port, its end, and how long it is waited for."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
    temporary_settings,
)

from pipelines import embedded_server as module
from tests.processes import alive

Start = Callable[[list[str]], subprocess.Popen[bytes]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start sleeping processes in the place of servers; the watchers are real."""
    real, servers = subprocess.Popen, []

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if command[0] != sys.executable:
            return real(command, **options)
        servers.append(real(["sleep", "60"], **options))
        return servers[-1]

    monkeypatch.setattr(module.subprocess, "Popen", start)
    yield servers
    module._end()
    for process in (*servers, *module._left):
        process.kill()
        process.wait()
    module._left.clear()


@pytest.fixture(autouse=True)
def unconfigured() -> Iterator[None]:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def test_one_server_serves_the_process_and_is_no_configured_one(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Server, "_answers", lambda self: True)
    assert not module.has_server()
    module.begin_embedded_server()
    for _ in range(2):
        with module.embedded_server():
            url = get_current_settings().api.url
            assert url is not None
            assert url.startswith("http://127.0.0.1:")
            assert not module.has_server(), "this process started it"
        assert get_current_settings().api.url is None
    assert len(started) == 1


def test_where_a_server_is_configured_none_begins(
    started: list[subprocess.Popen[bytes]],
) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert module.has_server()
        with module.embedded_server():
            assert get_current_settings().api.url == "http://127.0.0.1:4200/api"
    assert started == []


def test_a_server_that_does_not_answer_in_time_is_given_up(
    started: list[subprocess.Popen[bytes]],
) -> None:
    with (
        temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 1}),
        pytest.raises(RuntimeError, match="it did not answer in 1 s"),
        module.embedded_server(),
    ):
        pass
    assert module._server is None, "the next run tries again"
    started[0].wait(10)  # Its watcher ends it.


def test_what_speaks_another_language_there_does_not_answer(
    started: list[subprocess.Popen[bytes]],
) -> None:
    module.begin_embedded_server()
    assert module._server is not None
    with socket.create_server(("127.0.0.1", 0)) as other:
        module._server._port = other.getsockname()[1]

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"220 mail ready\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert not module._server._answers()


def test_a_server_that_ends_is_not_waited_for(
    started: list[subprocess.Popen[bytes]],
) -> None:
    module.begin_embedded_server()
    started[0].terminate()
    started[0].wait()
    with (
        pytest.raises(RuntimeError, match=f"its process ended with status {-signal.SIGTERM}"),
        module.embedded_server(),
    ):
        pass


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_another_port_is_taken_where_the_first_was_lost(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        HTTPServer(("127.0.0.1", 0), _Healthy) as taken,
        HTTPServer(("127.0.0.1", 0), _Healthy) as own,
    ):
        ports = [taken.server_port, own.server_port]
        monkeypatch.setattr(module, "free_port", lambda: ports.pop(0))
        module.begin_embedded_server()
        monkeypatch.setattr(started[0], "poll", lambda: 3)  # as uvicorn ends
        threading.Thread(target=own.serve_forever, daemon=True).start()
        with module.embedded_server():
            assert get_current_settings().api.url == f"http://127.0.0.1:{own.server_port}/api"
        assert len(started) == 2
        own.shutdown()


def test_the_end_stops_server_and_watcher(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Server, "_answers", lambda self: True)
    with module.embedded_server():
        assert module._server is not None
        watcher = module._server._watcher
        assert alive(started[0].pid)
        assert alive(watcher.pid)
    module._end()
    assert not alive(started[0].pid)
    assert watcher.returncode == 0, "it was told, and killed nothing"
