"""A Ray cluster that is not there: told at once, with a remedy, and before anything is written."""

from __future__ import annotations

import importlib.util
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.runners import reachable
from storage_schemas.config import RayRunner
from tests.command_line import diffem


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of the extra 'ray' seem to be there; nothing here imports them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.usefixtures("installed")
def test_no_cluster_at_the_address_ends_the_command_within_seconds_and_writes_nothing(
    tiny_config: Path, tmp_path: Path, closed_port: int
) -> None:
    url, began = tmp_path / "run", time.monotonic()
    more = ("--set", "runner.kind=ray", "--set", f"runner.address=127.0.0.1:{closed_port}")
    result = diffem("run", tiny_config, "--store", url, *more)
    # Ray itself tries for a quarter of an hour.
    assert time.monotonic() - began < 15
    assert result.exit_code == 1, result.output
    assert f"runner.address is '127.0.0.1:{closed_port}', but no Ray cluster" in result.stderr
    assert "Connection refused" in result.stderr
    assert "ray start --head" in result.stderr
    assert not url.exists()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_what_answers_is_left_to_ray(form: str, open_port: int) -> None:
    reachable.require_cluster(RayRunner(address=form.format(open_port)))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("address", ["head", "head:", "head:port", "ray://head", ":6379", ""])
def test_an_address_without_host_or_port_is_a_mistake(address: str) -> None:
    with pytest.raises(ValueError, match=r"runner\.address is .*expected 'auto', HOST:PORT"):
        reachable.require_cluster(RayRunner(address=address))


@pytest.mark.usefixtures("installed")
def test_auto_is_found_by_ray() -> None:
    reachable.require_cluster(RayRunner(address="auto"))


def test_without_the_extra_the_remedy_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ray and prefect_ray cannot .*pip install 'diffem\[ray"):
        reachable.require_cluster(RayRunner())
