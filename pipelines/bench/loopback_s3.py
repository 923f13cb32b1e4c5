"""An S3 server on loopback, for measuring: moto's, in a process of its own that ends with us."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipelines.subprocesses import free_port, running

__all__ = ["LoopbackS3", "loopback_s3"]

_PATIENCE = 60.0
"""Seconds within which the server has to answer."""


@dataclass(frozen=True)
class LoopbackS3:
    """A server that runs."""

    url: str
    """URL of an empty bucket."""
    environment: dict[str, str]
    """What a process needs to reach it, by that URL alone."""
    log: Path
    """Where it notes every request."""

    def requests(self) -> int:
        """Return how many requests it has answered so far."""
        return sum(" HTTP/1.1" in line for line in self.log.read_text().splitlines())


@contextlib.contextmanager
def loopback_s3(folder: Path) -> Iterator[LoopbackS3]:
    """Start a server, with one bucket, and stop it on leaving.

    Arguments:
        folder: Where its log goes.

    Raises:
        ValueError: moto's server, or s3fs, is not installed.
        OSError: It does not start.
    """
    for package in ("moto", "flask", "s3fs"):
        if find_spec(package) is None:
            raise ValueError(
                f"an S3 server on loopback was asked for, but {package} is not installed; run pip "
                "install 'moto[server]' s3fs, or give --url s3://... on a server of your own"
            )
    port = free_port()
    # The server must not inherit the credentials of whatever this machine uses.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    endpoint = f"http://127.0.0.1:{port}"
    log = folder / "moto.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, log=log, environment=clean, folder=folder) as process:
        deadline = time.monotonic() + _PATIENCE
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"moto's server did not start: {log.read_text()[-500:].strip()}")
            time.sleep(0.05)
        request = urllib.request.Request(f"{endpoint}/bench", method="PUT")
        urllib.request.urlopen(request, timeout=_PATIENCE).close()
        environment = {
            **clean,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield LoopbackS3(url="s3://bench", environment=environment, log=log)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
