"""A proxy before an object store on loopback that does to requests what networks do to them."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("500", "503", "refused", "lost", "torn", "slow")
"""What can happen to a request.

`500`, `503`: the server says so and does nothing. `refused`: the connection is reset before the
server sees the request. `lost`: the server does it, and the connection is reset before the answer.
`torn`: the connection is reset in the middle of the answer's body. `slow`: half a second late.
"""
_CODES = {"500": "InternalError", "503": "ServiceUnavailable", "403": "SignatureDoesNotMatch"}
SLOW = 0.5
_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}

Plan = Callable[[str, str], str | None]
"""Method and path with query of a request to what happens to it."""


@dataclass
class Faults:
    """What happened so far."""

    endpoint: str
    plan: Plan
    requests: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def choose(self, method: str, path: str) -> str | None:
        with self.lock:
            self.requests += 1
            fault = self.plan(method, path)
            if fault is not None:
                self.injected[f"{fault} {method}"] += 1
            return fault

    def kinds(self) -> set[str]:
        return {name.partition(" ")[0] for name in self.injected}


def at_random(probability: float, seed: int) -> Plan:
    """Let a fault happen to each request with a probability."""
    draw = random.Random(seed)

    def plan(method: str, path: str) -> str | None:
        # Two draws in any case: which fault comes next does not depend on who asks.
        happens, kind = draw.random() < probability, draw.choice(FAULTS)
        return kind if happens else None

    return plan


def once(fault: str, method: str, part: str = "") -> Plan:
    """Let a fault happen to the first request of a method whose path contains a part."""
    left = [fault]

    def plan(given: str, path: str) -> str | None:
        return left.pop() if left and given == method and part in path else None

    return plan


@contextlib.contextmanager
def faulty(upstream: str, plan: Plan) -> Iterator[Faults]:
    """Serve on a free port of loopback before the server at a URL."""
    target = urlsplit(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    faults = Faults(f"http://127.0.0.1:{server.server_port}", plan)
    _Handler.state[server.server_port] = (faults, f"{target.hostname}:{target.port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    state: dict[int, tuple[Faults, str]] = {}  # noqa: RUF012 - by port: handlers take no arguments

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        faults, upstream = self.state[self.server.server_address[1]]
        fault = faults.choose(self.command, self.path)
        if fault == "refused":
            self._reset()
        elif fault in _CODES:
            code = _CODES[fault]
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            self._answer(int(fault), [("Content-Type", "application/xml")], text)
        else:
            if fault == "slow":
                time.sleep(SLOW)
            connection = http.client.HTTPConnection(upstream, timeout=30)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                connection.request(self.command, self.path, body or None, headers)
                response = connection.getresponse()
                answer = response.read()
            finally:
                connection.close()
            if fault == "lost":
                self._reset()
            else:
                self._answer(response.status, response.getheaders(), answer, fault == "torn")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, torn: bool = False
    ) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if torn:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(0.02)  # a reset overtakes what the client has not read yet
            self._reset()
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        # A linger of 0 s makes `close` reset the connection; the socket object's own closing would
        # end it politely.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
