"""Credentials that are planted are found nowhere: not in the run, not in what is shown or kept."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from storage_schemas.errors import UnusableStore
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import run_tiny
from tests.faults.faulty_proxy import faulty
from tests.storage.servers import Server, reached
from tests.storage.tiny_run import resume_run

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "pl4nted/Secret+KeyOfForty0Characters/abc",
    "AWS_SESSION_TOKEN": "pl4ntedSessionToken//0123456789+abcdefgh=",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2024&sig=pl4ntedSignature%3D",
}
LOUD = {
    "PREFECT_LOGGING_LEVEL": "DEBUG",
    "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "DEBUG",
}
TRACE = re.compile(rb"pl4nted", re.IGNORECASE)  # begins every planted value, however it is quoted


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str]) -> dict[str, str]:
    """A Prefect home that these tests alone have used."""
    return {**home, "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect-secrets"))}


def diffem(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def assert_nothing_planted(text: str | bytes, where: str) -> None:
    data = text.encode() if isinstance(text, str) else text
    found = TRACE.search(data)
    assert found is None, f"{where}: {data[max(0, found.start() - 200) : found.end() + 40]!r}"


def test_a_whole_run_keeps_no_credentials(
    moto: Server, own_home: dict[str, str], tiny_config: Path
) -> None:
    url = moto.url("secrets")
    environment = {**own_home, **moto.environment, **PLANTED, **LOUD}
    run = run_tiny(tiny_config, url, environment)
    shown = [run, diffem(environment, "status", url), diffem(environment, "verify", url)]
    shown += [diffem(environment, "status", url, "--json")]
    for done in shown:
        assert done.returncode == 0, done.stderr
        assert_nothing_planted(done.stdout, f"stdout of {done.args}")
        assert_nothing_planted(done.stderr, f"stderr of {done.args}")
    with reached(moto):
        objects = ObjectStore(url)
        contents = objects.read_many(objects.list())
        assert len(contents) > 50
        records = [path for path in contents if path.startswith("prefect/diffem-e_step-")]
        assert records, "Prefect's records of stages, which lie beside the run"
        for path, data in contents.items():
            assert_nothing_planted(path, path)
            assert_nothing_planted(data, path)
    kept = [path for path in Path(own_home["PREFECT_HOME"]).rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" and b"secrets" in path.read_bytes() for path in kept)
    for path in kept:
        assert_nothing_planted(path.read_bytes(), str(path))


@pytest.mark.slow
def test_a_failed_run_keeps_no_credentials(
    moto: Server, own_home: dict[str, str], tiny_config: Path
) -> None:
    """Requests are refused in the middle: tracebacks go into Prefect's database."""
    left = 150

    def plan(method: str, path: str) -> str | None:
        nonlocal left
        left -= 1
        return "403" if left < 0 else None

    with faulty(moto.endpoint, plan) as faults:
        environment = {**own_home, **moto.environment, **PLANTED, **LOUD}
        environment["AWS_ENDPOINT_URL"] = faults.endpoint
        command = [sys.executable, "-m", "pipelines.cli", "run", str(tiny_config), "--store"]
        done = subprocess.run(
            [*command, moto.url("failed")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode in (1, 2), done.stderr
    assert faults.injected.total() > 0
    assert "credentials" in done.stderr
    assert_nothing_planted(done.stdout + done.stderr, "output")
    for path in Path(own_home["PREFECT_HOME"]).rglob("*"):
        if path.is_file():
            assert_nothing_planted(path.read_bytes(), str(path))


def test_an_endpoint_with_a_password_is_not_shown(home: dict[str, str], tiny_config: Path) -> None:
    """botocore cannot use this one, and quotes it whole."""
    endpoint = "http://me:pl4nted/password@127.0.0.1:9"
    environment = {**home, **PLANTED, "AWS_ACCESS_KEY_ID": "AKIA", "AWS_ENDPOINT_URL": endpoint}
    environment |= {"AWS_MAX_ATTEMPTS": "1", "AWS_DEFAULT_REGION": "us-east-1"}
    done = diffem(environment, "run", str(tiny_config), "--store", "s3://runs/x")
    assert done.returncode in (1, 2)
    assert "cannot read s3://runs/x" in done.stderr
    assert_nothing_planted(done.stdout + done.stderr, "output")


@pytest.mark.parametrize("command", ["run", "status", "verify"])
@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:{secret}@runs/x",
        "s3://AKIA:{quoted}@runs/x",
        "az://runs/x?sv=2024&sig=pl4ntedSignature",
        "s3://runs/x#pl4nted",
    ],
)
def test_credentials_in_a_url_are_refused_unseen(
    command: str, url: str, home: dict[str, str], tiny_config: Path
) -> None:
    secret = PLANTED["AWS_SECRET_ACCESS_KEY"]
    url = url.format(secret=secret, quoted=quote(secret, safe=""))
    given = [str(tiny_config), "--store", url] if command == "run" else [url]
    done = diffem(home, command, *given)
    assert done.returncode == 2, done.stderr
    assert "URLs are shown and stored; leave it out" in done.stderr
    assert_nothing_planted(done.stdout + done.stderr, "output")


@pytest.mark.parametrize("command", ["status", "verify"])
def test_wrong_credentials_are_named_but_not_shown(
    command: str, moto: Server, home: dict[str, str]
) -> None:
    with faulty(moto.endpoint, lambda method, path: "403") as faults:
        environment = {**home, **moto.environment, **PLANTED, "AWS_ENDPOINT_URL": faults.endpoint}
        done = diffem(environment, command, moto.url("refused"))
    assert done.returncode == 2, done.stderr
    assert "check" in done.stderr
    assert "credentials" in done.stderr
    assert "Traceback" not in done.stderr
    assert_nothing_planted(done.stdout + done.stderr, "output")


def test_nothing_is_logged_at_debug(
    moto: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every logger there is at DEBUG; the cloud libraries log headers, with tokens, at DEBUG."""
    libraries = [n for n in logging.root.manager.loggerDict if n.startswith(("boto", "aioboto"))]
    for name in libraries:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    caplog.set_level(logging.DEBUG)
    with reached(moto):
        for name, value in PLANTED.items():
            monkeypatch.setenv(name, value)
        url = moto.url("logged")
        resume_run(url)
        assert verify(url).ok
        with pytest.raises(UnusableStore):
            ObjectStore(f"s3://AKIA:{PLANTED['AWS_SECRET_ACCESS_KEY']}@runs/x")
        run = RunStore.open(url)
        assert_nothing_planted(repr(run.objects) + repr(run.manifest), "repr")
    assert os.environ["AWS_SESSION_TOKEN"] == PLANTED["AWS_SESSION_TOKEN"]
    assert_nothing_planted(caplog.text, "log")
