"""`diffem serve`: advance a run on a schedule, as long as this process lives."""

from __future__ import annotations

import asyncio
import datetime
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zoneinfo import available_timezones

import typer

from pipelines.commands.options import ConfigArgument, SetOption, StoreOption
from pipelines.commands.talking import DONE, FAILED, mistakes_end_here, say
from pipelines.durations import parse_duration
from storage_schemas.redaction import secret_part, without_secrets

if TYPE_CHECKING:
    from prefect.schedules import Schedule

    from storage_schemas.config import RunConfig

__all__ = ["serve"]


def serve(
    config: ConfigArgument,
    cron: Annotated[
        str | None,
        typer.Option(metavar="EXPR", help='When to advance the run, as cron says: "0 1 * * *".'),
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="How often instead: 90s, 15m, 2h, 1d."),
    ] = None,
    timezone: Annotated[
        str, typer.Option(metavar="ZONE", help="Time zone of --cron, such as Europe/Berlin.")
    ] = "UTC",
    store: StoreOption = None,
    set_: SetOption = None,
    iterations_per_flow_run: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="EM iterations after which a flow run stops.  [default: no limit]",
        ),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Time after which a flow run begins no iteration.  [default: no limit]",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the deployment.  [default: the run's]"),
    ] = None,
) -> None:
    """Advance a run on a schedule, until Ctrl-C; every flow run stops at a commit."""
    from pipelines.config_io import load_config
    from pipelines.prefect_settings import apply_defaults

    apply_defaults()
    with mistakes_end_here():
        schedule, when = _schedule(cron, interval, timezone)
        resolved = load_config(config, set_ or [])
        url = store or f"runs/{resolved.name}"
        budget = None if time_budget is None else _duration("--time-budget", time_budget)
        parameters: dict[str, object] = {
            "config": _shown("CONFIG", config),
            "store": _shown("--store", url),
            "overrides": list(set_ or []),
            "iterations_per_flow_run": iterations_per_flow_run,
            "time_budget_minutes": None if budget is None else budget.total_seconds() / 60,
        }
        name = _checked_name(name or resolved.name)
        _require_configured_server()
        _check(resolved, url)
    _require_answer()
    say(
        f"diffem: {resolved.name} advances {when}; at once: prefect deployment run "
        f"'diffem/{name}'; Ctrl-C ends this and pauses the schedule"
    )
    try:
        _wait(name, schedule, parameters, resolved)
    except Exception as error:
        say(
            f"diffem: serving ended: {without_secrets(f'{type(error).__name__}: {error}')}; what "
            "is done stays done. When the Prefect server is well, give the same command again"
        )
        raise typer.Exit(FAILED) from None
    say("diffem: stopped; the schedule is paused until the same command is given again")
    raise typer.Exit(DONE)


def _wait(name: str, schedule: Schedule, parameters: dict[str, object], config: RunConfig) -> None:
    """Register the deployment and start flow runs, each in its process, until Ctrl-C."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.types.entrypoint import EntrypointType

    from pipelines import watching
    from pipelines.deployment import scheduled_run

    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(watching.HEARTBEAT_SECONDS))
    scheduled_run.serve(
        name=name,
        schedule=schedule,
        # A flow run that comes while another works has nothing to do: the next one goes on.
        global_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
        ),
        parameters=parameters,
        description=config.description or None,
        tags=[watching.TAG, watching.run_tag(str(parameters["store"])), config.name],
        # Nobody would do what the schedule makes meanwhile.
        pause_on_shutdown=True,
        print_starting_message=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def _schedule(cron: str | None, interval: str | None, timezone: str) -> tuple[Schedule, str]:
    """Return the schedule, and the same in words.

    Raises:
        ValueError: If there is none, or it cannot be read, or it names no date.
    """
    from prefect.schedules import Cron, Interval

    if timezone not in available_timezones():
        raise ValueError(
            f"--timezone received {timezone!r} but expects a name such as UTC or Europe/Berlin"
        )
    if cron is None and interval is not None:
        every = _duration("--interval", interval)
        return Interval(every, timezone=timezone), f"every {interval}"
    if cron is None or interval is not None:
        given = "neither" if cron is None else "both"
        raise ValueError(
            f'give one of --cron and --interval, for example --cron "0 1 * * *"; received {given}'
        )
    try:
        schedule = Cron(cron, timezone=timezone)
        next_time = _next_time(cron, timezone)
    except ValueError:
        raise ValueError(
            f"--cron received {cron!r} but expects minute, hour, day of month, month and day of "
            'week that come together, for example "0 1 * * *" for every night at one'
        ) from None
    return schedule, f"at {cron!r}, next {next_time:%Y-%m-%d %H:%M %Z}"


def _duration(option: str, text: str) -> datetime.timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _next_time(cron: str, timezone: str) -> datetime.datetime:
    from prefect.server.schemas.schedules import CronSchedule

    return asyncio.run(CronSchedule(cron=cron, timezone=timezone).get_dates(1))[0]


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[^/%&><]+", name):
        raise ValueError(f"--name received {name!r} but no deployment has / % & < > in its name")
    return name


def _shown(option: str, url: str) -> str:
    """Return what opens a path or URL from any folder, and may be shown in the UI.

    Raises:
        ValueError: If it holds a secret.
    """
    secret = secret_part(url)
    if secret is not None:
        raise ValueError(
            f"{option} holds {secret}, but a deployment's parameters are stored and shown; leave "
            "it out, credentials come from the environment"
        )
    return url if "://" in url else str(Path(url).resolve())


def _check(config: RunConfig, url: str) -> None:
    """Refuse now what every flow run would refuse: nothing is written."""
    from pipelines.launch import require_runnable
    from pipelines.sources import require_source
    from storage_schemas.objects import ObjectStore

    require_source(config.data)
    require_runnable(config, ObjectStore(url))


def _require_configured_server() -> None:
    from pipelines.embedded_server import has_server

    if not has_server():
        raise ValueError(
            "no Prefect server is configured, and a schedule needs one; start it in another "
            "terminal:\n  prefect server start\nthen say where it is and give the same command "
            "again:\n  export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )


def _require_answer() -> None:
    from prefect.client.orchestration import get_client

    client = get_client(sync_client=True)
    error = client.api_healthcheck()
    if error is not None:
        say(
            f"diffem: no Prefect server answers at {client.api_url} ({error}); start it (prefect "
            "server start), or correct PREFECT_API_URL"
        )
        raise typer.Exit(FAILED)
