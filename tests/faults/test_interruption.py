"""Ctrl-C, termination, and death: how soon a run ends, what it leaves, and what goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage_schemas.lease import read_lease
from storage_schemas.run_store import RunStore
from tests.faults.cli import results_at, run_command, run_tiny
from tests.processes import alive, children_of, in_session

# An M-step of some ten seconds, whose checkpoints are written only when an end is asked for.
LONG = ("--set", "m_step.steps=800", "--set", "m_step.checkpoint_seconds=1000")


def embedded_server_of(pid: int) -> int:
    """Return the process id of the embedded server that a run has started."""
    found = [
        child.pid for child in children_of(pid) if b"pipelines.embedded_server" in child.command
    ]
    assert found, "the run has no embedded server"
    return found[0]


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def learning(
    config: Path, url: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """Start a run in a session of its own, and wait until it is inside its first M-step."""
    process = subprocess.Popen(
        run_command(config, str(url), *LONG, "--json-logs"),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if '"event": "begin"' in line and '"stage": "m-step"' in line:
                break
        assert process.poll() is None, "the run ended before its M-step"
        time.sleep(0.5)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, home: dict[str, str]
) -> dict[str, str]:
    url = str(tmp_path_factory.mktemp("runs") / "tiny")
    run_tiny(tiny_config, url, home, *LONG)
    return results_at(url)


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGTERM)]
)
def test_an_end_that_is_asked_for_comes_soon_and_loses_nothing(
    number: signal.Signals,
    tmp_path: Path,
    tiny_config: Path,
    home: dict[str, str],
    undisturbed: dict[str, str],
) -> None:
    url = tmp_path / "run"
    with learning(tiny_config, url, home) as process:
        server = embedded_server_of(process.pid)
        os.killpg(process.pid, number)  # as a terminal does, or a service manager
        _, messages = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "interrupted; the same command resumes" in messages
        assert "Traceback" not in messages
        assert not in_session(process.pid)
        assert within(5, lambda: not alive(server))

    store = RunStore.open(str(url))
    lease = read_lease(store.objects)
    assert lease is not None
    assert lease.released
    assert store.iteration(0).read_checkpoint() is not None, "written because of the end"
    done = run_tiny(tiny_config, str(url), home, *LONG)
    assert "steps reused" in done.stdout or "/800 reused" in done.stdout
    assert results_at(str(url)) == undisturbed


def test_a_killed_run_leaves_no_process_behind(
    tmp_path: Path, tiny_config: Path, home: dict[str, str]
) -> None:
    with learning(tiny_config, tmp_path / "run", home) as process:
        server = embedded_server_of(process.pid)
        assert alive(server)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert within(15, lambda: not alive(server)), "nobody stopped the embedded server"
        assert not in_session(process.pid)


@pytest.mark.slow
def test_no_server_where_one_is_named_is_told_with_the_remedy(
    tmp_path: Path, tiny_config: Path, home: dict[str, str]
) -> None:
    environment = {**home, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = run_tiny(tiny_config, str(tmp_path / "run"), environment, status=1)
    assert "no Prefect server answers there; start it" in done.stderr
    assert "Traceback" not in done.stderr
    run_tiny(tiny_config, str(tmp_path / "run"), home)


def test_an_embedded_server_that_does_not_start_is_told_with_the_remedy(
    tmp_path: Path, tiny_config: Path, home: dict[str, str]
) -> None:
    nowhere = {"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/prefect.db"}
    done = run_tiny(tiny_config, str(tmp_path / "run"), {**home, **nowhere}, status=1)
    last = done.stderr.strip().splitlines()[-1]
    assert "embedded server did not start (its process ended with status 3)" in last
    assert "or start one that stays (prefect server start) and set PREFECT_API_URL" in last
    assert "Traceback" not in last


def test_a_mistake_ends_the_server_that_began_meanwhile(
    tmp_path: Path, tiny_config: Path, home: dict[str, str]
) -> None:
    process = subprocess.Popen(
        run_command(tiny_config, str(tmp_path / "run"), "--set", "start.rank=1000"),
        env=home,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen: set[int] = set()
    while process.poll() is None:
        seen |= {child.pid for child in children_of(process.pid)}
        time.sleep(0.02)
    # At once: the server does not hold what its parent was given to write to.
    _, message = process.communicate(timeout=2)
    assert process.returncode == 2
    assert "diffem: " in message
    assert seen, "nothing began meanwhile, or the mistake was found before"
    assert within(30, lambda: not any(alive(pid) for pid in seen))
    assert not (tmp_path / "run").exists()


def test_the_current_folder_has_no_say_in_what_the_server_is(
    tmp_path: Path, tiny_config: Path, home: dict[str, str]
) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").write_text("raise SystemExit('of another project')")
    command = [sys.executable, "-P", *run_command(tiny_config, str(tmp_path / "run"))[1:]]
    environment = {**home, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
