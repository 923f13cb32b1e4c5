"""The `diffem` command line.

Exit status: 0 done, 1 failed or damaged, 2 the caller's mistake. Results go to standard output,
progress and messages to standard error. Heavy packages (torch, deepinv, Prefect, Zarr) are
imported inside the commands that use them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from storage_schemas.config import RunConfig

__all__ = ["app", "main"]

DONE, FAILED, MISTAKE = 0, 1, 2

app = typer.Typer(
    name="diffem",
    help="Learn diffusion models from corrupted data by expectation maximization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file (path or URL) that describes the run.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Path or URL of a run.")]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where the run lives: any path or fsspec URL.  [default: runs/NAME]",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value of the config; may be repeated."
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object to standard output and nothing else there."
    ),
]


@app.command()
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

    with _mistakes_end_here():
        resolved = load_config(config, set_ or [])
    url = store or f"runs/{resolved.name}"
    if dry_run:
        from pipelines.plan import print_plan

        with _mistakes_end_here():
            print_plan(resolved, url)
        return
    _execute(resolved, url, take_over=take_over)


@app.command()
def status(run: RunArgument, json_: JsonOption = False) -> None:
    """Show what a run has done, iteration by iteration."""
    from pipelines.status import read_status
    from storage_schemas.run_store import RunStore

    with _mistakes_end_here():
        report = read_status(RunStore.open(run))
    if json_:
        _print_json(report.model_dump(mode="json"))
    else:
        from pipelines.table import print_status

        print_status(report)


@app.command()
def verify(run: RunArgument, json_: JsonOption = False) -> None:
    """Check every object of a run; exit status 1 if any is missing or damaged."""
    from storage_schemas.run_store import RunStore
    from storage_schemas.verify import verify as verify_run

    with _mistakes_end_here():
        report = verify_run(RunStore.open(run))
    if json_:
        _print_json(report.model_dump(mode="json"))
    else:
        from pipelines.table import print_verification

        print_verification(run, report)
    raise typer.Exit(DONE if report.ok else FAILED)


def _execute(config: RunConfig, url: str, *, take_over: bool) -> NoReturn:
    """Create or open the run, start Prefect, and let `em_run` do the work."""
    from pipelines.launch import RunFailed, launch
    from storage_schemas.lease import LeaseHeld

    try:
        with _mistakes_end_here():
            launch(config, url, take_over=take_over)
    except LeaseHeld as error:
        _say(f"diffem: {error}")
        raise typer.Exit(MISTAKE) from None
    except RunFailed as error:
        _say(f"diffem: {error}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        _say(f"diffem: interrupted; the same command resumes {url}")
        raise typer.Exit(130) from None
    raise typer.Exit(DONE)


@contextmanager
def _mistakes_end_here() -> Iterator[None]:
    """Turn a caller's mistake into one message and exit status 2."""
    try:
        yield
    except ValueError as error:
        _say(f"diffem: {error}")
        raise typer.Exit(MISTAKE) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
