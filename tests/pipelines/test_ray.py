"""Runs on a Ray cluster of two nodes on this machine: the bytes of one machine, a dead node."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.subprocesses import free_port, running
from storage_schemas.config import RayRunner
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at, run_command
from tests.prefect_server import prefect_server
from tests.ray_cluster import (
    QUIET,
    Cluster,
    kill_node,
    on_cluster,
    ray_cluster,
)

for needed in ("ray", "prefect_ray"):
    pytest.importorskip(needed, reason="needs the extra 'ray': pip install 'diffem[ray]'")

# Once PyTorch has been imported, a shard of these takes half a second.
SLOW = ["e_step.shard_size=10", "e_step.sampler.steps=60", "iterations=1"]
TIMEOUT = 480


@pytest.fixture(scope="module")
def quiet() -> dict[str, str]:
    """The environment of nodes and commands that reach no Prefect server."""
    return {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | QUIET


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, quiet: dict[str, str]
) -> Iterator[dict[str, str]]:
    """The environment of the command line, with a Prefect server that it reaches."""
    with prefect_server(tmp_path_factory.mktemp("server")) as served:
        yield {**served, **QUIET}


@pytest.fixture(scope="module")
def cluster(quiet: dict[str, str]) -> Iterator[Cluster]:
    """A cluster whose head is there; tests start the second node."""
    with ray_cluster(quiet) as made:
        yield made


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def run(command: list[str], environment: dict[str, str], *, status: int = 0) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def local(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, environment: dict[str, str]
) -> Path:
    """The same run on this machine alone."""
    url = tmp_path_factory.mktemp("local") / "run"
    run(run_command(tiny_config, str(url), *sets(SLOW)), environment)
    return url


@pytest.mark.slow
def test_a_cluster_computes_the_bytes_of_one_machine_also_when_a_node_dies(
    cluster: Cluster,
    local: Path,
    tiny_config: Path,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    url = tmp_path / "run"
    command = run_command(tiny_config, str(url), *sets(SLOW), *on_cluster(cluster))
    with cluster.second() as second:
        cluster.wait_for(2)
        with running(command, log=tmp_path / "log", environment=environment) as process:
            shards = url / "iterations/000/shards"
            deadline = time.monotonic() + TIMEOUT
            while len(list(shards.glob("*.json"))) < 4:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.02)
            kill_node(second)
            done = {path: path.stat().st_mtime_ns for path in shards.glob("*.json")}
            assert len(done) < 20, "the kill came too late to test anything"
            status = process.wait(TIMEOUT)
    if status != 0:  # Ray may have given up; then the same command goes on.
        print((tmp_path / "log").read_text())
        run(command, environment)
    print("first command ended with", status)
    assert results_at(str(url)) == results_at(str(local))
    assert {path: path.stat().st_mtime_ns for path in done} == done, "no shard was done again"
    assert verify(str(url)).ok


MAPPED = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from pipelines.prefect_settings import apply_defaults
apply_defaults()
from prefect import flow
from pipelines.flows import stage_task
from pipelines.runners.choice import open_runner, shard_resources, task_runner
from storage_schemas.config import RayRunner

config = RayRunner(address=sys.argv[1], gpus_per_shard=0.0)
def which(run_url, shard):
    return {"process": os.getpid()}
task = stage_task(which, "which", "shard {shard}")

@flow(task_runner=task_runner(config), result_storage=Path(sys.argv[2]))
def mapped():
    with shard_resources(config):
        shards = [task.submit(sys.argv[2], shard) for shard in range(12)]
    print("processes", *(shard.result()["process"] for shard in shards))

with open_runner(config):
    mapped()
"""


@pytest.mark.slow
def test_shards_share_the_processes_of_their_node(
    cluster: Cluster, tmp_path: Path, environment: dict[str, str]
) -> None:
    with cluster.second():
        cluster.wait_for(2)
        command = [sys.executable, "-c", MAPPED, cluster.address, str(tmp_path / "records")]
        said = run(command, environment)
    (line,) = (line for line in said.splitlines() if line.startswith("processes"))
    processes = line.split()[1:]
    assert len(processes) == 12
    # Where a shard waits for an answer in its main thread, Ray starts a process for the next one.
    assert len(set(processes)) <= 2, "one on each node of one processor"


@pytest.mark.slow
def test_an_m_step_of_two_processes_of_the_cluster(
    cluster: Cluster,
    local: Path,
    tiny_config: Path,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    url = tmp_path / "run"
    more = on_cluster(cluster, "runner.m_step_workers=2")
    with cluster.second():
        cluster.wait_for(2)
        run(run_command(tiny_config, str(url), *sets(SLOW), *more), environment)
    ours, theirs = (results_at(str(path)) for path in (url, local))
    same = {path for path in theirs if path.startswith("start/") or ".zarr/" in path}
    assert len(same) >= 20
    assert {path: ours[path] for path in same} == {path: theirs[path] for path in same}
    models = []
    for path in (url, local):
        tensors, _ = RunStore.open(str(path)).iteration(0).read_tensors("model")
        models.append(np.concatenate([tensors[name].ravel() for name in sorted(tensors)]))
    # The tolerance of tests/pipelines/test_distributed.py, for the same reason.
    difference = np.linalg.norm(models[0] - models[1]) / np.linalg.norm(models[1])
    assert 0 < difference < 1e-3


@pytest.mark.slow
def test_new_observations_are_restored_on_the_cluster_with_the_bytes_of_one_machine(
    cluster: Cluster, local: Path, tmp_path: Path, quiet: dict[str, str]
) -> None:
    observations = RunStore.open(str(local)).observations("train")
    y, mask = observations.y(slice(0, 200)), observations.params(slice(0, 200))["mask"]
    np.savez(tmp_path / "new.npz", y=np.tile(y, (6, 1, 1, 1)), mask=np.tile(mask, (6, 1, 1, 1)))
    command = [sys.executable, "-m", "pipelines.cli", "reconstruct", str(local)]
    command += [str(tmp_path / "new.npz"), "--draws", "2"]
    run([*command, str(tmp_path / "here")], quiet)
    with cluster.second():
        cluster.wait_for(2)
        # No Prefect server is needed for that.
        said = run([*command, str(tmp_path / "there"), *on_cluster(cluster), "--json"], quiet)
    assert "3 of 3 shards drawn" in said
    assert '"reused": 0' in said
    here, there = (
        {
            str(path.relative_to(tmp_path / place)): path.read_bytes()
            for path in (tmp_path / place / "draws.zarr").rglob("*")
            if path.is_file() and "/c/" in str(path)
        }
        for place in ("here", "there")
    )
    assert len(here) >= 9, "a shard of each of three arrays, at least"
    assert here == there


@pytest.mark.slow
def test_an_end_that_is_asked_for_comes_within_seconds(
    cluster: Cluster,
    local: Path,
    tiny_config: Path,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    url = tmp_path / "run"
    command = run_command(tiny_config, str(url), *sets(SLOW), *on_cluster(cluster))
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        shards = url / "iterations/000/shards"
        deadline = time.monotonic() + TIMEOUT
        while len(list(shards.glob("*.json"))) < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, _ = process.communicate(timeout=120)
        seconds = time.monotonic() - began
    finally:
        process.kill()
        process.wait()
    print(f"ended after {seconds:.1f} s with {process.returncode}")
    assert process.returncode != 0, out
    assert "Traceback" not in out
    done = {path: path.stat().st_mtime_ns for path in shards.glob("*.json")}
    assert 3 <= len(done) < 20
    run(command, environment)
    assert results_at(str(url)) == results_at(str(local))
    assert {path: path.stat().st_mtime_ns for path in done} == done


def connect(address: str, variables: dict[str, str]) -> tuple[str, float]:
    """What connecting with a cluster says in a process of its own, and how long it takes."""
    code = (
        "import sys; from pipelines.runners.ray import cluster; "
        "from storage_schemas.config import RayRunner\n"
        "with cluster(RayRunner(address=sys.argv[1])): pass"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, address],
        env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:4200/api", **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1], time.monotonic() - began


@pytest.mark.slow
def test_an_auto_that_leads_nowhere_is_told_with_a_remedy() -> None:
    port = free_port()
    said, seconds = connect("auto", {"RAY_ADDRESS": f"127.0.0.1:{port}"})
    assert re.search(rf"address is 'auto', which is [\d.]+:{port} here, but no Ray cluster", said)
    assert "ray start --head" in said
    assert seconds < 60  # Most of it imports Ray, on a busy machine.


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_says_so(tmp_path: Path, quiet: dict[str, str]) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    folder = Path(tempfile.mkdtemp(prefix="dr-", dir="/tmp"))
    more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    try:
        guarded = Cluster(folder, {**quiet, **more})
        with guarded.head():
            guarded.wait_for(1)
            said, _ = connect(guarded.address, {"RAY_AUTH_MODE": "disabled"})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert "asks for a token" in said
    assert "RAY_AUTH_MODE=token" in said


@pytest.mark.slow
def test_what_answers_but_is_no_cluster_is_given_one_try() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said, seconds = connect(address, {})
    assert f"runner.address is {address!r}, but no Ray cluster answers" in said
    assert "ray start --head" in said
    # Measured: 41 s; without a limit a quarter of an hour.
    assert seconds < 120


@pytest.mark.usefixtures("prefect_server")
def test_a_cluster_needs_a_prefect_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    from pipelines import embedded_server
    from pipelines.runners.ray import build_ray_task_runner

    refused = pytest.raises(ValueError, match="PREFECT_API_URL is not set")
    with temporary_settings(restore_defaults={PREFECT_API_URL}), refused:
        build_ray_task_runner(RayRunner())
    # The one that this process started is not reached by other nodes.
    own = SimpleNamespace(url=get_current_settings().api.url)
    monkeypatch.setattr(embedded_server, "_server", own)
    with refused:
        build_ray_task_runner(RayRunner())


@pytest.mark.usefixtures("prefect_server")
def test_shards_take_what_the_config_says_and_their_share_of_threads() -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect_ray.context import RemoteOptionsContext

    from pipelines.runners.ray import build_ray_task_runner, shard_resources

    config = RayRunner(address="10.0.0.7:6379", gpus_per_shard=0.5, cpus_per_shard=3)
    with temporary_settings({PREFECT_API_URL: "http://10.0.0.7:4200/api"}):
        runner = build_ray_task_runner(config)
    assert runner.duplicate() == runner
    given = runner.init_kwargs
    assert given["address"] == "10.0.0.7:6379"
    variables = given["runtime_env"]["env_vars"]
    assert variables["PREFECT_API_URL"] == "http://10.0.0.7:4200/api"
    assert variables["DIFFEM_THREADS"] == "3"
    with shard_resources(config):
        options = RemoteOptionsContext.get().current_remote_options
    # Ray's default for a task with a GPU is a new process, which imports PyTorch, for each.
    assert options == {"num_gpus": 0.5, "num_cpus": 3, "max_calls": 0}
