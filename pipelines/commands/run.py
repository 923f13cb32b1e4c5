"""`diffem run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipelines.commands.options import ConfigArgument, SetOption, StoreOption
from pipelines.commands.talking import DONE, FAILED, MISTAKE, mistakes_end_here, say

if TYPE_CHECKING:
    from storage_schemas.config import RunConfig

__all__ = ["run"]


def run(
    config: ConfigArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved config, the plan and its cost, measured here for some "
            "seconds; write nothing.",
        ),
    ] = False,
    calibration: Annotated[
        bool,
        typer.Option(help="Measure this machine for the cost that --dry-run prints."),
    ] = True,
    json_: Annotated[
        bool, typer.Option("--json", help="Print what --dry-run finds as one JSON object.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Take the run over from an owner that seems alive but is known to be dead.",
        ),
    ] = False,
    iterations_per_flow_run: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Do at most so many EM iterations, then stop."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Begin no EM iteration after this time, such as 90m."),
    ] = None,
    json_logs: Annotated[
        bool,
        typer.Option("--json-logs", help="Report progress as one JSON object per line."),
    ] = False,
) -> None:
    """Start a run, or resume it where it stopped."""
    from pipelines.config_io import load_config
    from pipelines.durations import parse_duration

    with mistakes_end_here():
        resolved = load_config(config, set_ or [])
        budget = None if time_budget is None else parse_duration(time_budget)
    url = store or f"runs/{resolved.name}"
    if dry_run:
        from pipelines.plan import print_plan

        with mistakes_end_here():
            print_plan(resolved, url, calibrate=calibration, as_json=json_)
        return
    if json_:
        say("diffem: --json goes with --dry-run; see --json-logs, and `diffem status --json`")
        raise typer.Exit(MISTAKE)
    _execute(
        resolved,
        url,
        take_over=take_over,
        iterations_per_flow_run=iterations_per_flow_run,
        time_budget=budget,
        json_logs=json_logs,
    )


def _execute(config: RunConfig, url: str, **options: Any) -> NoReturn:
    """Create or open the run, start Prefect, and let `em_run` do the work."""
    from pipelines.launch import Interrupted, RunFailed, launch
    from storage_schemas.objects import redact_url

    with mistakes_end_here(f"the same command resumes {redact_url(url)}"):
        try:
            launch(config, url, **options)
        except Interrupted:
            raise KeyboardInterrupt from None
        except RunFailed as error:
            say(f"diffem: {error}")
            raise typer.Exit(FAILED) from None
    raise typer.Exit(DONE)
