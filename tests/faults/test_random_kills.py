"""SIGKILL at 30 random instants: of runs, workers, Prefect servers, Ray nodes. Minutes long.

Whatever dies, the same command run again ends with the bytes of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at, run_command, run_tiny
from tests.prefect_server import prefect_server
from tests.processes import children_of, in_session
from tests.ray_cluster import QUIET, Cluster, kill_node, on_cluster, ray_cluster

pytestmark = pytest.mark.slow

MORE = (
    *("--set", "m_step.checkpoint_seconds=1e-9"),
    *("--set", "m_step.steps=100"),
    *("--set", "e_step.shard_size=16"),
    *("--set", "e_step.sampler.steps=30"),
)
"""Thirteen shards and an M-step with checkpoints: several seconds of work to be killed in."""

WORKERS = ("--set", "runner.workers=2")
"""Each has one thread, as the process of the run has without workers: the bytes are the same."""


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, home: dict[str, str]
) -> tuple[dict[str, str], int]:
    """Checksums of the undisturbed run, and how many events it reports."""
    url = tmp_path_factory.mktemp("runs") / "tiny"
    with working(tiny_config, url, home) as process:
        assert process.wait(timeout=600) == 0
    return results_at(str(url)), events(url)


@dataclass(frozen=True)
class Scene:
    """What is to be killed, and what it has to end with."""

    folder: Path
    config: Path
    environment: dict[str, str]
    expected: dict[str, str]
    """Checksums of the undisturbed run."""
    events: int
    """How many events that one reported."""

    @property
    def url(self) -> Path:
        """The run."""
        return self.folder / "run"

    def working(
        self, *more: str, environment: dict[str, str] | None = None
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Start the run, or go on with it; see `working`."""
        return working(self.config, self.url, environment or self.environment, *more)

    def finish(self, *more: str, environment: dict[str, str] | None = None) -> None:
        """Let the run come to its end, which has to be that of the undisturbed one."""
        run_tiny(self.config, str(self.url), environment or self.environment, *MORE, *more)
        assert results_at(str(self.url)) == self.expected
        assert verify(RunStore.open(str(self.url))).ok

    def at_some_instant(
        self, rng: random.Random, total: int, process: subprocess.Popen[bytes]
    ) -> bool:
        """Wait for a random event and a moment more; tell whether the run is still at work."""
        wanted = rng.randrange(1, total)
        while events(self.url) < wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        return process.poll() is None


@pytest.fixture
def scene(
    tmp_path: Path,
    tiny_config: Path,
    home: dict[str, str],
    undisturbed: tuple[dict[str, str], int],
) -> Scene:
    return Scene(tmp_path, tiny_config, home, *undisturbed)


def events(url: Path) -> int:
    """Count what a run has reported: shards, M-steps, evaluations that ended."""
    return sum(" in " in line for line in url.with_suffix(".log").read_text().splitlines())


@contextmanager
def working(
    config: Path, url: Path, environment: dict[str, str], *more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run in a session of its own, and wait until its first stage begins, or it ends."""
    log = url.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(
            run_command(config, str(url), *MORE, *more),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 600
        while "checking the run" not in log.read_text() and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("seed", range(4))
def test_the_process_of_the_run(seed: int, scene: Scene) -> None:
    rng = random.Random(f"flow {seed}")
    killed = 0
    for _ in range(3):
        with scene.working() as process:
            if scene.at_some_instant(rng, scene.events // 2, process):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
    scene.finish()
    assert killed, "every run ended before its kill: nothing was tested"


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the process ids of a run's workers."""
    found = children_of(process.pid)
    return [child.pid for child in found if b"pipelines.runners.worker" in child.command]


@pytest.mark.parametrize("seed", range(4))
def test_a_worker(seed: int, scene: Scene) -> None:
    rng = random.Random(f"worker {seed}")
    killed = 0
    with scene.working(*WORKERS) as process:
        for half in (1, 2):
            working_still = scene.at_some_instant(rng, half * scene.events // 2, process)
            workers = workers_of(process)
            if working_still and workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
                killed += 1
        assert process.wait(timeout=600) == 0, "the run goes on with another worker"
        assert not in_session(process.pid)
    assert killed
    assert results_at(str(scene.url)) == scene.expected


@pytest.mark.parametrize("seed", range(6))
def test_the_prefect_server(seed: int, scene: Scene) -> None:
    rng = random.Random(f"server {seed}")
    (scene.folder / "server").mkdir()
    with (
        prefect_server(scene.folder / "server") as served,
        scene.working(environment=served) as process,
    ):
        assert scene.at_some_instant(rng, scene.events * 3 // 4, process)
        os.killpg(int(served["DIFFEM_TEST_SERVER"]), signal.SIGKILL)
        status = process.wait(timeout=600)
        assert status in (0, 1), "it ends by itself: done, or failed with a message"
        said = scene.url.with_suffix(".log").read_text()
        assert status == 0 or "no Prefect server answers there; start it" in said
        assert "Traceback" not in said
        assert "failed to process item" not in said, "every event that was not told, in full"
    scene.finish()


@pytest.mark.parametrize("seed", range(4))
def test_a_node_of_the_cluster(seed: int, scene: Scene) -> None:
    for needed in ("ray", "prefect_ray"):
        pytest.importorskip(needed, reason="needs the extra 'ray': pip install 'diffem[ray]'")
    rng = random.Random(f"node {seed}")
    (scene.folder / "server").mkdir()
    url = scene.url
    with (
        prefect_server(scene.folder / "server") as served,
        ray_cluster(scene.environment | QUIET) as cluster,
    ):
        there = served | QUIET
        with (
            cluster.second() as second,
            cluster_of_two(cluster),
            scene.working(*on_cluster(cluster), environment=there) as process,
        ):
            shards = rng.randrange(1, 20)
            while process.poll() is None and shards_of(url) < shards:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            assert process.poll() is None, "the run ended before its kill: nothing was tested"
            kill_node(second)
            status = process.wait(timeout=600)
            said = url.with_suffix(".log").read_text()
            print(
                f"killed after {shards} of 26 shards; the run ended with {status}\n{said[-2000:]}"
            )
            assert status in (0, 1), "it ends by itself: done, or failed with a message"
            assert "Traceback" not in said
        scene.finish(*on_cluster(cluster), environment=there)


@contextmanager
def cluster_of_two(cluster: Cluster) -> Iterator[None]:
    """Wait until both nodes answer."""
    cluster.wait_for(2)
    yield


def shards_of(url: Path) -> int:
    """Count the shards that a run has written, in all iterations."""
    return len(list(url.glob("iterations/*/shards/*.json")))
