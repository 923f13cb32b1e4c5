"""`deploy/prefect.yaml` is deployed on a Prefect server, and a worker runs what it says once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient

from storage_schemas.run_store import RunStore
from tests.deploy.test_manifests import DEPLOY, DEPLOYMENTS
from tests.prefect_server import prefect_server

pytestmark = pytest.mark.slow


class Prefect:
    """Prefect's command line in a folder, on a server of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as environment:
        prefect = Prefect(tmp_path_factory.mktemp("work"), environment)
        template = str(DEPLOY / "kubernetes/gpu-job-template.json")
        for kind, more in {
            "process": (),
            "docker": (),
            "kubernetes": ("--base-job-template", template),
        }.items():
            prefect("work-pool", "create", f"diffem-{kind}", "--type", kind, *more)
        prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOY / "prefect.yaml"))
        yield prefect


def test_every_deployment_is_there_as_written(deployed: Prefect) -> None:
    with SyncPrefectClient(deployed.environment["PREFECT_API_URL"]) as client:
        for name, written in DEPLOYMENTS.items():
            found = client.read_deployment_by_name(f"diffem/{name}")
            assert found.parameters == written["parameters"]
            assert sorted(found.tags) == sorted(written["tags"])
            assert found.work_pool_name == written["work_pool"]["name"]
            assert found.concurrency_options is not None
            assert found.concurrency_options.collision_strategy.value == "CANCEL_NEW"
            assert found.global_concurrency_limit is not None
            assert found.global_concurrency_limit.limit == 1
            (schedule,) = found.schedules
            assert schedule.active
            assert getattr(schedule.schedule, "cron", None) == "0 1 * * *"


def test_a_worker_advances_the_run_by_one_iteration(deployed: Prefect, tiny_config: Path) -> None:
    changed = {"config": str(tiny_config), "iterations_per_flow_run": 1}
    parameters = [f"{name}={json.dumps(value)}" for name, value in changed.items()]
    given = [part for parameter in parameters for part in ("--param", parameter)]
    deployed("deployment", "run", "diffem/digits-process", *given)
    pool = ["--pool", "diffem-process", "--type", "process", "--limit", "1"]
    said = deployed("worker", "start", *pool, "--run-once")
    # Where the store of the deployment leads from the folder in which it was deployed.
    run = RunStore.open(
        str(deployed.folder / DEPLOYMENTS["digits-process"]["parameters"]["store"])
    )
    assert [manifest.iteration for manifest in run.completed()] == [0], said
    with SyncPrefectClient(deployed.environment["PREFECT_API_URL"]) as client:
        ended = [r for r in client.read_flow_runs() if r.name == "tiny · scheduled"]
    assert [r.state.message for r in ended if r.state] == [
        "stopped at a commit: tiny has 1 of 2 iterations, 1 of them in this flow run"
    ]
    assert "iteration 000 · M-step: 12 of 12 steps" in said, "progress in the worker's output"
