"""A run that is killed with SIGKILL and started again ends with the bytes of one that was not."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.pipelines.test_run import results_of

# The M-step writes a checkpoint at every step, so that a kill inside it leaves one behind.
OVERRIDES = ["m_step.checkpoint_seconds=1e-9", "m_step.steps=150", "e_step.shard_size=16"]


def command(config: Path, url: Path, *overrides: str) -> list[str]:
    sets = [part for override in (*OVERRIDES, *overrides) for part in ("--set", override)]
    return [sys.executable, "-m", "pipelines.cli", "run", str(config), "--store", str(url), *sets]


@contextmanager
def running(
    config: Path,
    url: Path,
    environment: dict[str, str],
    *overrides: str,
    until: Callable[[Path], bool],
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run, wait for a moment in it, and kill it on leaving."""
    process = subprocess.Popen(
        command(config, url, *overrides),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not until(url):
            assert process.poll() is None, "the run ended before the moment came"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield process
    finally:
        # The whole group: the embedded server is the process's child.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(config: Path, url: Path, environment: dict[str, str], *overrides: str) -> str:
    done = subprocess.run(
        command(config, url, *overrides),
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {**os.environ, "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, environment: dict[str, str]
) -> dict[str, str]:
    url = tmp_path_factory.mktemp("runs") / "tiny"
    finish(tiny_config, url, environment)
    return results_of(url)


def some_shards(url: Path) -> bool:
    return len(list(url.glob("iterations/000/shards/*.json"))) >= 3


def inside_the_m_step(url: Path) -> bool:
    return (url / "iterations/000/checkpoint/state.safetensors").exists()


def second_iteration(url: Path) -> bool:
    return (url / "iterations/000/iteration.json").exists()


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "starting": lambda url: (url / "run.json").exists(),
    "observations": lambda url: (url / "observations.json").exists(),
    "E-step": some_shards,
    "M-step": inside_the_m_step,
    "second iteration": second_iteration,
}


# One moment stands for all in `make test`; the others take as long and make the same point.
@pytest.mark.parametrize(
    "moment",
    [m if m == "M-step" else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS],
)
def test_killed_and_run_again(
    moment: str,
    tmp_path: Path,
    tiny_config: Path,
    environment: dict[str, str],
    undisturbed: dict[str, str],
) -> None:
    url = tmp_path / "run"
    with running(tiny_config, url, environment, until=MOMENTS[moment]):
        pass

    store = RunStore.open(str(url))
    completed = len(store.completed())
    assert completed < store.config.iterations, "the kill came too late to test anything"
    out = finish(tiny_config, url, environment)
    assert results_of(url) == undisturbed
    assert verify(str(url)).ok
    if moment == "E-step":
        assert re.search(r"\d+/13 reused", out), out
    if moment == "M-step":
        assert "reused" in out, out
    if moment == "second iteration":
        assert re.search(r"000 .*reused", out), out


def test_a_second_process_is_refused_while_the_first_works(
    tmp_path: Path, tiny_config: Path, environment: dict[str, str]
) -> None:
    url = tmp_path / "run"
    with running(tiny_config, url, environment, until=some_shards) as first:
        second = subprocess.run(
            command(tiny_config, url), env=environment, capture_output=True, text=True, timeout=120
        )
        assert second.returncode == 2
        assert "is being written by" in second.stderr
        assert f"process {first.pid}" in second.stderr
        assert "Traceback" not in second.stderr
