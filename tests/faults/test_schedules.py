"""A run on a schedule: stopped at commits, killed, resumed, never twice at once, ended by Ctrl-C.

One `diffem serve` on a Prefect server of its own tells the whole story once; each test reads its
part of it.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse

from pipelines.subprocesses import end
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at
from tests.prefect_server import prefect_server
from tests.processes import in_session

pytestmark = pytest.mark.slow

PATIENCE = 480.0
"""Seconds to wait for anything: a loaded machine takes a minute to import PyTorch."""


@dataclass
class Story:
    """What happened."""

    url: str
    flow_runs: list[FlowRun] = field(default_factory=list)
    """Flow runs of the deployment that were begun or refused, in order."""
    crashed_after: float = 0.0
    """Seconds between the kill and the state `Crashed`."""
    collided: FlowRun | None = None
    """The flow run that was asked for while another one worked."""
    shards_before: dict[str, int] = field(default_factory=dict)
    """Shards that were there when the process was killed, with their time of writing."""
    status: int | None = None
    """Exit status after Ctrl-C."""
    ended_after: float = 0.0
    """Seconds that took."""
    left: list[int] = field(default_factory=list)
    """Processes that were left then."""
    deployment: DeploymentResponse | None = None
    """The deployment then."""
    said: str = ""
    """What `diffem serve` printed."""


def until(what: str, ask: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not ask():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


def session_of(leader: int) -> list[int]:
    """Live processes of a session, without its leader."""
    return [process.pid for process in in_session(leader) if process.pid != leader]


def flow_process(leader: int) -> int:
    """The process of the flow run that is served now."""
    for process in in_session(leader):
        if b"multiprocessing.spawn" in process.command and process.parent == leader:
            return process.pid
    raise AssertionError("no flow run is going on")


def shards(run: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_mtime_ns for path in run.glob("iterations/000/shards/*.json")
    }


def parents(client: SyncPrefectClient) -> list[FlowRun]:
    """Flow runs of the deployment that have left `Scheduled`, oldest first."""
    found = [run for run in client.read_flow_runs(limit=200) if run.deployment_id]
    begun = [run for run in found if run.state and not run.state.is_scheduled()]
    return sorted(begun, key=lambda run: run.start_time or run.expected_start_time)


def states(client: SyncPrefectClient, word: str) -> list[FlowRun]:
    return [r for r in parents(client) if r.state and word in f"{r.state_name} {r.state.message}"]


def those_that_worked(story: Story) -> list[FlowRun]:
    """Flow runs that were not refused, oldest first."""
    return [run for run in story.flow_runs if run.state_name != "Cancelled"]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("schedule")
    run = folder / "run"
    command = [sys.executable, "-m", "pipelines.cli", "serve", str(tiny_config)]
    command += ["--store", str(run), "--interval", "15s", "--iterations-per-flow-run", "1"]
    with (
        prefect_server(tmp_path_factory.mktemp("prefect")) as environment,
        (folder / "said").open("w") as said,
    ):
        # Ctrl-C is ignored by what a shell starts in the background, and by its children.
        served = subprocess.Popen(
            command,
            env={**environment, "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        story = Story(url=str(run))
        try:
            with SyncPrefectClient(environment["PREFECT_API_URL"]) as client:
                tell(story, run, served, client)
        finally:
            end(served)
            story.said = (folder / "said").read_text()
            print(story.said)
            print(
                f"crashed after {story.crashed_after:.1f} s, ended after {story.ended_after:.1f} s"
            )
        yield story


def tell(
    story: Story, run: Path, served: subprocess.Popen[bytes], client: SyncPrefectClient
) -> None:
    # The first flow run is killed in the middle of its E-step.
    until("two shards", lambda: served.poll() is not None or len(shards(run)) >= 2)
    os.kill(flow_process(served.pid), signal.SIGKILL)
    killed = time.monotonic()
    story.shards_before = shards(run)
    until("crashed", lambda: states(client, "Crashed"), 60.0)
    story.crashed_after = time.monotonic() - killed
    # The next one resumes it; while it works, another one is asked for.
    until("the next one", lambda: states(client, "Running"))
    deployment = client.read_deployment_by_name("diffem/tiny")
    asked = client.create_flow_run_from_deployment(deployment.id)

    def collided() -> bool:
        story.collided = client.read_flow_run(asked.id)
        return bool(story.collided.state and story.collided.state.is_final())

    until("the collision", collided, 60.0)
    until("complete", lambda: states(client, "is complete, 2 of 2 iterations, 1 of them"))
    until("nothing to do", lambda: states(client, "nothing to do"))
    began = time.monotonic()
    os.killpg(served.pid, signal.SIGINT)  # as a terminal does
    story.status = served.wait(timeout=90)
    story.ended_after = time.monotonic() - began
    # Python's own tracker of shared resources ends when it sees that its parent has.
    gone = time.monotonic() + 5.0
    while (left := session_of(served.pid)) and time.monotonic() < gone:
        time.sleep(0.1)
    story.left = left
    story.deployment = client.read_deployment_by_name("diffem/tiny")
    story.flow_runs = parents(client)


def test_each_flow_run_does_one_iteration_and_the_next_goes_on(story: Story) -> None:
    messages = [run.state.message for run in story.flow_runs if run.state_name == "Completed"]
    assert messages[:3] == [
        "stopped at a commit: tiny has 1 of 2 iterations, 1 of them in this flow run",
        "tiny is complete, 2 of 2 iterations, 1 of them in this flow run",
        "tiny is complete, 2 of 2 iterations; nothing to do",
    ]
    assert {run.name for run in story.flow_runs if run.state_name == "Completed"} == {
        "tiny · scheduled"
    }


def test_never_two_at_once(story: Story) -> None:
    worked = those_that_worked(story)
    assert len(worked) >= 4
    for earlier, later in itertools.pairwise(worked):
        assert earlier.end_time is not None
        assert later.start_time is not None
        assert earlier.end_time <= later.start_time


def test_one_that_is_asked_for_meanwhile_is_cancelled(story: Story) -> None:
    assert story.collided is not None
    assert story.collided.state is not None
    assert story.collided.state_name == "Cancelled"
    assert story.collided.state.message == "Deployment concurrency limit reached."


def test_a_killed_flow_run_is_shown_as_crashed_within_seconds(story: Story) -> None:
    first, *others = those_that_worked(story)
    assert (first.state_name, {run.state_name for run in others}) == ("Crashed", {"Completed"})
    assert first.state is not None
    assert "-9" in str(first.state.message)
    # Measured: 0.5 s on an idle machine.
    assert story.crashed_after < 30


def test_what_was_done_before_the_kill_is_kept_and_the_end_is_the_same(
    story: Story, undisturbed_run: dict[str, str]
) -> None:
    after = shards(Path(story.url))
    assert len(story.shards_before) >= 2
    assert story.shards_before.items() <= after.items(), "no finished shard was written again"
    assert results_at(story.url) == undisturbed_run
    assert verify(RunStore.open(story.url)).ok


def test_ctrl_c_ends_it_and_pauses_the_schedule(story: Story) -> None:
    assert story.status == 0
    assert story.ended_after < 45
    assert story.left == []
    assert story.deployment is not None
    assert story.deployment.paused
    assert "Traceback" not in story.said
    assert "stopped; the schedule is paused" in story.said
