"""Requests fail, answers are lost or torn: the run ends with the bytes of one without faults."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage_schemas.objects import ObjectStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at, run_tiny
from tests.faults.faulty_proxy import FAULTS, Faults, Plan, at_random, faulty, once
from tests.storage.servers import Server, reached
from tests.storage.tiny_run import results, resume_run


@contextmanager
def through(server: Server, plan: Plan) -> Iterator[tuple[Server, Faults]]:
    """Reach a server through a proxy that injects faults."""
    with faulty(server.endpoint, plan) as faults:
        environment = {
            name: value.replace(server.endpoint, faults.endpoint)
            for name, value in server.environment.items()
        }
        proxied = dataclasses.replace(server, environment=environment)
        with reached(proxied):
            yield proxied, faults


def nothing(method: str, path: str) -> None:
    return None


def test_a_create_whose_answer_was_lost_recognises_its_object(moto: Server) -> None:
    with through(moto, nothing) as (_, faults):
        objects = ObjectStore(moto.url("lost"))
        objects.create("first", b"asks whether the server creates at most once")
        faults.plan = once("lost", "PUT", "/mine")
        objects.create("mine", b"mine")
        assert faults.injected == {"lost PUT": 1}
        assert objects.read("mine") == b"mine"
        # The same where another was quicker: its object is not taken for one's own.
        ObjectStore(moto.url("lost")).create("theirs", b"theirs")
        faults.plan = once("lost", "PUT", "/theirs")
        with pytest.raises(FileExistsError):
            objects.create("theirs", b"mine")
        assert faults.injected == {"lost PUT": 2}
        assert objects.read("theirs") == b"theirs"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_call_survives_each_fault(fault: str, moto: Server) -> None:
    with through(moto, nothing) as (_, faults):
        objects = ObjectStore(moto.url(f"each/{fault}"))
        objects.create("old", b"0123456789" * 100)
        calls = {
            "PUT": lambda: objects.write("new", b"1"),
            "GET": lambda: objects.read("old"),
            "HEAD": lambda: objects.size("old"),
            "GET list": lambda: objects.sizes(),
            "DELETE": lambda: objects.delete("new"),
        }
        answers = {name: call() for name, call in calls.items()}
        for name, call in calls.items():
            faults.plan = once(fault, name.split()[0])
            assert call() == answers[name]
        assert faults.injected.total() == len(calls)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_through_a_bad_network_ends_the_same(
    seed: int, moto: Server, tmp_path: Path
) -> None:
    expected = results(resume_run(str(tmp_path / "run")).objects)
    with through(moto, at_random(0.05, seed)) as (_, faults):
        store = resume_run(moto.url(f"random/{seed}"))
        assert results(store.objects) == expected
        assert verify(store).ok
    # About 400 requests: fewer than 8 faults of an expected 20 have a probability below 0.3 %.
    assert faults.injected.total() >= 8
    assert len(faults.kinds()) >= 4


@pytest.mark.slow
def test_the_command_line_through_a_bad_network_ends_the_same(
    moto: Server, home: dict[str, str], tiny_config: Path, undisturbed_run: dict[str, str]
) -> None:
    url = moto.url("cli")
    with through(moto, at_random(0.05, 2)) as (proxied, faults):
        done = run_tiny(tiny_config, url, {**home, **proxied.environment})
        assert "Traceback" not in done.stderr
    assert faults.injected.total() >= 8
    with reached(moto):
        assert results_at(url) == undisturbed_run
        assert verify(url).ok


def test_a_server_that_is_gone_is_named(moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage_schemas import remote_objects
    from storage_schemas.errors import StoreFailed

    monkeypatch.setattr(remote_objects, "_PATIENCE", 0.0)
    gone = dataclasses.replace(
        moto, environment={**moto.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    )
    with reached(gone):
        os.environ["AWS_MAX_ATTEMPTS"] = "1"
        try:
            with pytest.raises(StoreFailed, match=r"cannot read s3://runs/gone/a .*127.0.0.1:9"):
                ObjectStore(moto.url("gone")).read("a")
        finally:
            del os.environ["AWS_MAX_ATTEMPTS"]
