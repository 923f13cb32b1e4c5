"""Flow runs that nobody ends: crashed ones are marked, cancelled ones are noticed.

A process that is killed cannot say so, and its flow runs stay `Running` for ever. Whoever holds a
run's lease knows that no other process works on it: flow runs of the same run that claim to be
running are marked as crashed. On a server that stays, an automation does the same for a process
whose heartbeats cease. A flow run that is cancelled in the UI while no worker looks after it is
only *marked* by the server; its own process has to look.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect import State, get_client
from prefect.automations import Automation
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import PrefectException
from prefect.states import Crashed

from pipelines import cancellation

__all__ = ["HEARTBEAT_SECONDS", "mark_abandoned", "noticing_cancellation", "run_tag", "watch"]

TAG = "diffem"
"""Tag of every flow run of this package."""
HEARTBEAT_SECONDS = 30
"""Seconds between heartbeats on a server that stays."""
_LOOK_SECONDS = 3.0
_AUTOMATION = "diffem: without heartbeats, crashed"


def run_tag(run_url: str) -> str:
    """Return the tag of a run's flow runs: short, and without anything secret of its URL."""
    return f"run-{hashlib.sha256(run_url.encode()).hexdigest()[:12]}"


def mark_abandoned(run_url: str) -> int:
    """Mark the flow runs of a run as crashed that claim to be running; the caller has the lease.

    Arguments:
        run_url: The run.

    Returns:
        How many there were.
    """
    own = FlowRunContext.get()
    assert own is not None
    assert own.flow_run is not None
    found = 0
    with get_client(sync_client=True) as client:
        running = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[TAG, run_tag(run_url)]),
                state=FlowRunFilterState(
                    type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
                ),
            )
        )
        for flow_run in running:
            if flow_run.id == own.flow_run.id:
                continue
            crashed: State[Any] = Crashed(
                message="Its process ended without a word; another one goes on."
            )
            client.set_flow_run_state(flow_run.id, crashed, force=True)
            found += 1
    return found


def watch() -> None:
    """Have the server mark flow runs of this package as crashed when their heartbeats cease.

    One automation for all runs is made where there is none.
    """
    silent = timedelta(seconds=3 * HEARTBEAT_SECONDS)
    with get_client(sync_client=True) as client:
        if client.read_automations_by_name(_AUTOMATION):
            return
    # A server without automations goes without.
    with suppress(httpx.HTTPError, PrefectException):
        Automation(
            name=_AUTOMATION,
            description="A flow run tagged diffem whose process has been silent for "
            f"{silent.total_seconds():.0f} s is marked as crashed.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={
                    "prefect.flow-run.heartbeat",
                    "prefect.flow-run.Completed",
                    "prefect.flow-run.Failed",
                    "prefect.flow-run.Cancelled",
                    "prefect.flow-run.Crashed",
                },
                match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                match_related=ResourceSpecification(
                    {
                        "prefect.resource.role": ["tag"],
                        "prefect.resource.id": [f"prefect.tag.{TAG}"],
                    }
                ),
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=silent,
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED,
                    message="No heartbeat: its process has probably been killed. Run it again.",
                )
            ],
        ).create()


@contextmanager
def noticing_cancellation() -> Iterator[None]:
    """Ask the work to stop when its flow run is cancelled on the server."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    done = threading.Event()
    arguments = (context.flow_run.id, done)
    thread = threading.Thread(
        target=_look, args=arguments, name="diffem-cancellation", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _look(flow_run: UUID, done: threading.Event) -> None:
    with get_client(sync_client=True) as client:
        while not done.wait(_LOOK_SECONDS):
            # A server that cannot be reached is no reason to stop; it is asked again.
            with suppress(httpx.HTTPError, PrefectException):
                state = client.read_flow_run(flow_run).state
                if state is not None and state.type in {StateType.CANCELLING, StateType.CANCELLED}:
                    cancellation.request("cancelled in Prefect")
                    return
