"""Whether a Ray cluster is at an address, asked without Ray: its own tries last for minutes."""

from __future__ import annotations

import importlib.util
import socket
from urllib.parse import urlsplit

from storage_schemas.config import RayRunner

__all__ = ["require_answer", "require_cluster", "unreachable"]

_SECONDS = 5.0
_FOUND_BY_RAY = ("auto", "local")
_PACKAGES = ("ray", "prefect_ray")


def require_cluster(config: RayRunner) -> None:
    """Refuse what could not work, before anything is started; `auto` is left to Ray.

    Raises:
        ValueError: Ray is not installed, or the address is none.
        ConnectionError: Nothing answers at the address.
    """
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f"runner.kind is 'ray', but {' and '.join(absent)} cannot be imported here; install "
            "the extra on every node (pip install 'diffem[ray]'), or set runner.kind to 'local'"
        )
    if config.address not in _FOUND_BY_RAY:
        require_answer(config.address, config.address)


def require_answer(address: str, given: str) -> None:
    """Ask once whether anything answers at an address.

    Arguments:
        address: `HOST:PORT` or `ray://HOST:PORT`.
        given: What the config says.

    Raises:
        ValueError: The address is none.
        ConnectionError: Nothing answers.
    """
    host, port = _parts(address)
    try:
        with socket.create_connection((host, port), timeout=_SECONDS):
            return
    except OSError as error:
        raise unreachable(given, address, error) from error


def unreachable(given: str, address: str | None, why: object) -> ConnectionError:
    """Say that there is no cluster, and how to start one.

    Arguments:
        given: What the config says.
        address: What that stands for, where it is known.
        why: How it is known.
    """
    meant = f", which is {address} here" if address not in (None, given) else ""
    return ConnectionError(
        f"runner.address is {given!r}{meant}, but no Ray cluster answers there ({why}); start one "
        "with `ray start --head --port 6379`, join it with `ray start --address HOST:6379`, set "
        "runner.address to HOST:6379, and run this command on one of its nodes"
    )


def _parts(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ValueError(
            f"runner.address is {address!r}; expected 'auto', HOST:PORT (6379 where `ray start "
            "--head` chose it) or ray://HOST:PORT"
        )
    return host, port
