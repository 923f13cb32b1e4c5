"""The flow that deployments run: advance one run by a few iterations, and stop at a commit.

    diffem (a flow run per schedule or click)
      em_iteration k, k+1, ...     until the run, `iterations_per_flow_run` or the budget ends

Its parameters are the form that Prefect's UI shows. The run's config is no part of that form: it
is named by path or URL, with overrides, since a form of unions keeps the keys of the variant that
was chosen before. Each flow run reads the config anew, so that a raised `iterations` is picked up.

How a flow run ends:

    Completed    the run is complete, or stopped at a commit because its limit was reached
    Cancelled    another process holds the run's lease, or an end was asked for
    Failed       a caller's mistake, told by its message; or the work failed
    Crashed      the process died

None of them is tried again at once: what is done stays done, and the next flow run goes on.
"""

# Annotations are evaluated here, not kept as text: `serve` sends the flow to its process pickled
# by value, where names that only its annotations use would be missing.
import datetime
from collections.abc import Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger
from prefect.exceptions import CancelledRun
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    get_current_settings,
    temporary_settings,
)
from prefect.states import Cancelled, Completed, Failed
from pydantic import PositiveFloat, PositiveInt
from rich.console import Console

from pipelines.config_io import ConfigError, load_config
from pipelines.progress import LineReporter, use_reporter
from pipelines.signals import ending_softly
from pipelines.status import RunStatus, read_status
from pipelines.watching import HEARTBEAT_SECONDS, TAG
from storage_schemas.config import RunConfig
from storage_schemas.lease import LeaseHeld
from storage_schemas.redaction import redact_url

__all__ = ["scheduled_run"]


def _flow_run_name() -> str:
    """Name a flow run after the run; after the config's file where that cannot be read."""
    parameters = flow_run.parameters
    try:
        name = load_config(parameters["config"], parameters["overrides"]).name
    except ConfigError:
        name = Path(redact_url(parameters["config"])).stem
    return f"{name} · scheduled"


@flow(name="diffem", flow_run_name=_flow_run_name, persist_result=False)
def scheduled_run(
    config: str,
    store: str = "",
    overrides: Sequence[str] = (),
    iterations_per_flow_run: PositiveInt | None = None,
    time_budget_minutes: PositiveFloat | None = None,
    take_over: bool = False,
) -> State[Any]:
    """Advance a run of DiffEM: create or resume it, do some iterations, stop at a commit.

    The next flow run goes on. A complete run ends at once, until its config asks for more
    iterations. Cancelling or killing a flow run loses nothing that is done.

    Arguments:
        config: YAML file that describes the run: a URL, or a path on the machine that works.
        store: Where the run lives: a path or fsspec URL, such as s3://bucket/runs/digits. Empty:
            runs/NAME in the folder of the work.
        overrides: Values of the config to override, one an entry: iterations=24.
        iterations_per_flow_run: EM iterations after which this flow run stops. Empty: no limit.
        time_budget_minutes: Minutes after which no iteration is begun. Empty: no limit.
        take_over: Take the run over from a writer that seems alive but is known to be dead. For
            one flow run, never for a schedule.

    Returns:
        How it ended: complete, stopped at a commit, held by another process, a mistake.
    """
    try:
        _require_heartbeats()
        state = _advance(
            load_config(config, overrides),
            store,
            iterations_per_flow_run=iterations_per_flow_run,
            time_budget=_minutes(time_budget_minutes),
            take_over=take_over,
        )
    except ValueError as error:
        state = Failed(message=str(error))
    except LeaseHeld as error:
        # As when two flow runs of one deployment collide: somebody is at work on the run, so
        # nothing is wrong and nothing to repair; but this flow run has not done its work either.
        state = Cancelled(message=str(error))
    except CancelledRun as error:
        state = Cancelled(message=f"{error}; what is done stays done, the next flow run goes on")
    get_run_logger().log(INFO if state.is_completed() else WARNING, state.message)
    return state


def _advance(
    config: RunConfig,
    store: str,
    *,
    iterations_per_flow_run: int | None,
    time_budget: datetime.timedelta | None,
    take_over: bool,
) -> State[Any]:
    from pipelines.launch import prepare_run

    run = prepare_run(config, store or f"runs/{config.name}", take_over=take_over)
    before = read_status(run)
    if before.state == "complete":
        return Completed(message=f"{_words(before)}; nothing to do")
    from pipelines.flows import advance_run

    beat = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: HEARTBEAT_SECONDS}
    with (
        ending_softly(),
        use_reporter(LineReporter(Console(stderr=True))),
        temporary_settings(beat),
    ):
        advance_run(
            run.address,
            take_over=take_over,
            iterations_per_flow_run=iterations_per_flow_run,
            time_budget=time_budget,
        )
    after = read_status(run)
    here = f"{after.complete - before.complete} of them in this flow run"
    if after.state == "complete":
        return Completed(message=f"{_words(after)}, {here}")
    return Completed(message=f"stopped at a commit: {_words(after)}, {here}")


def _require_heartbeats() -> None:
    """Refuse to work where the server would take the silence between heartbeats for a crash.

    Raises:
        ValueError: If heartbeats are too rare; only this process's environment sets them.
    """
    beat = get_current_settings().flows.heartbeat_frequency
    if TAG in flow_run.tags and (beat is None or beat > HEARTBEAT_SECONDS):
        raise ValueError(
            f"this flow run is tagged {TAG!r}, so it counts as crashed when it is silent for "
            f"{3 * HEARTBEAT_SECONDS} s, but PREFECT_FLOWS_HEARTBEAT_FREQUENCY is {beat}; set it "
            f"to {HEARTBEAT_SECONDS} in the deployment's environment (job variable env)"
        )


def _words(status: RunStatus) -> str:
    done = "is complete, " if status.state == "complete" else "has "
    return f"{status.name} {done}{status.complete} of {status.iterations} iterations"


def _minutes(value: float | None) -> datetime.timedelta | None:
    return None if value is None else datetime.timedelta(minutes=value)
