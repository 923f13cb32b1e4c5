"""`diffem run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pipelines.commands.options import ConfigArgument, SetOption, StoreOption
from pipelines.commands.talking import DONE, FAILED, INTERRUPTED, MISTAKE, mistakes_end_here, say

if TYPE_CHECKING:
    from storage_schemas.config import RunConfig

__all__ = ["run"]


def run(
    config: ConfigArgument,
    store: StoreOption = None,
    set_: SetOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved config and the plan; write nothing."),
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Take the run over from an owner that seems alive but is known to be dead.",
        ),
    ] = False,
) -> None:
    """Start a run, or resume it where it stopped."""
    from pipelines.config_io import load_config

    with mistakes_end_here():
        resolved = load_config(config, set_ or [])
    url = store or f"runs/{resolved.name}"
    if dry_run:
        from pipelines.plan import print_plan

        with mistakes_end_here():
            print_plan(resolved, url)
        return
    _execute(resolved, url, take_over=take_over)


def _execute(config: RunConfig, url: str, *, take_over: bool) -> NoReturn:
    """Create or open the run, start Prefect, and let `em_run` do the work."""
    from pipelines.launch import RunFailed, launch
    from storage_schemas.lease import LeaseHeld

    try:
        with mistakes_end_here():
            launch(config, url, take_over=take_over)
    except LeaseHeld as error:
        say(f"diffem: {error}")
        raise typer.Exit(MISTAKE) from None
    except RunFailed as error:
        say(f"diffem: {error}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        say(f"diffem: interrupted; the same command resumes {url}")
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(DONE)
