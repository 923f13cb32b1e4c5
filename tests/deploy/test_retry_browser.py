"""*Retry* in the Prefect UI, in a real browser, on a flow run of a deployment that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun

from pipelines.subprocesses import end
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at, run_tiny
from tests.faults.test_schedules import flow_process, until
from tests.prefect_server import prefect_server

pytestmark = pytest.mark.slow


@contextmanager
def served(
    config: Path, run: Path, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Serve a deployment of which no flow run begins by itself."""
    command = [sys.executable, "-m", "pipelines.cli", "serve", str(config), "--store", str(run)]
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, "--cron", "0 0 29 2 *"],
            env={**environment, "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def click_retry(browser: Any, server: str, flow_run: FlowRun) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(f"{server}/runs/flow-run/{flow_run.id}")
    page.get_by_text("Crashed").first.wait_for()
    page.get_by_role("button", name="Retry").first.click()
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    dialog.get_by_role("button", name="Retry").click()
    dialog.wait_for(state="hidden")
    page.close()


def test_retry_on_the_page_of_a_crashed_flow_run_resumes_it(
    browser: Any, tmp_path: Path, tiny_config: Path
) -> None:
    run = tmp_path / "run"
    (tmp_path / "server").mkdir()
    with (
        prefect_server(tmp_path / "server", ui=True) as environment,
        SyncPrefectClient(environment["PREFECT_API_URL"]) as client,
        served(tiny_config, run, environment, tmp_path / "said") as process,
    ):

        def deployment() -> Any:
            found = client.read_deployments()
            return found[0] if found else None

        def ended_as(flow_run: FlowRun) -> str | None:
            found = client.read_flow_run(flow_run.id).state
            return found.name if found is not None and found.is_final() else None

        until("the deployment", deployment)
        flow_run = client.create_flow_run_from_deployment(deployment().id)
        # The second iteration's E-step: the first one's flow run is complete, and stays so.
        until("two shards", lambda: len(list(run.glob("iterations/001/shards/*.json"))) >= 2)
        os.kill(flow_process(process.pid), signal.SIGKILL)
        done = {path: path.stat().st_mtime_ns for path in run.glob("iterations/*/shards/*.json")}
        until("crashed", lambda: ended_as(flow_run) == "Crashed")
        click_retry(browser, environment["PREFECT_API_URL"].removesuffix("/api"), flow_run)
        until("the second end", lambda: ended_as(flow_run) not in (None, "Crashed"))
        ended = client.read_flow_run(flow_run.id)
        print((tmp_path / "said").read_text())
        assert ended.state_name == "Completed", ended.state
        assert ended.run_count == 2
        assert ended.state is not None
        assert "tiny is complete, 2 of 2 iterations" in str(ended.state.message)
        # By the environment of the served run: threads, and no server of its own.
        run_tiny(tiny_config, str(tmp_path / "other"), environment)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "no shard was done again"
    assert results_at(str(run)) == results_at(str(tmp_path / "other"))
    assert verify(RunStore.open(str(run))).ok
