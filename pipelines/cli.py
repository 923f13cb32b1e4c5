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
    from pipelines.ingest.request import IngestRequest
    from pipelines.ingest.write import IngestSummary
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


@app.command()
def ingest(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help=".npy, .npz, HDF5 or NetCDF file, Zarr array or group, folder of images (png, "
            "jpg, tiff): path or fsspec URL; hf://NAME; bundled:digits, mnist5k, manifold or "
            "photos.",
        ),
    ],
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Where the observations go: path or fsspec URL.")
    ],
    y: Annotated[
        str | None,
        typer.Option("--y", metavar="NAME", help="Array of observations, corrupted already."),
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(
            "--x",
            metavar="NAME",
            help="Array of clean samples: --corrupt corrupts them; kept for evaluation only.",
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=ARRAY]",
            help="Array of an operator parameter, such as mask; may be repeated.",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="Array of classes, for evaluation only.")
    ] = None,
    corrupt: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG", help="Run config whose channel and seed corrupt clean samples once."
        ),
    ] = None,
    x_shape: Annotated[
        str | None,
        typer.Option(
            metavar="C,H,W",
            help="Shape of a clean sample, or D for vectors, where none is known.  [default: that "
            "of an observation]",
        ),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Images are (n, H, W, C), not (n, C, H, W).")
    ] = False,
    holdout: Annotated[
        str, typer.Option(metavar="N", help="Samples kept for evaluation: a number or a fraction.")
    ] = "0.1",
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the choice of held-out samples.  [default: 0, or CONFIG's]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many samples.")] = None,
    units: Annotated[str | None, typer.Option(help="Unit of the values.")] = None,
    range_: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="LOW HIGH", help="Refuse samples with values outside."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Bring data of your own into a store that runs read."""
    from pipelines.config_io import load_config
    from pipelines.ingest.base import IngestError
    from pipelines.ingest.request import (
        IngestRequest,
        parse_holdout,
        parse_params,
        parse_shape,
    )

    with _mistakes_end_here():
        if corrupt is not None and seed is not None:
            raise IngestError("--seed is given but the seed is CONFIG's; leave one out")
        request = IngestRequest(
            source=source,
            url=url,
            y=y,
            x=x,
            params=parse_params(param or []),
            label=label,
            corruption=None if corrupt is None else load_config(corrupt),
            x_shape=None if x_shape is None else parse_shape(x_shape),
            channels_last=channels_last,
            holdout=parse_holdout(holdout),
            seed=seed or 0,
            limit=limit,
            units=units,
            value_range=range_,
        )
        summary = _ingested(request)
    verb = "holds the same already:" if summary.complete_before else "now holds"
    _say(
        f"{summary.url} {verb} {summary.samples:,} observations, {summary.holdout:,} held "
        f"out, values {summary.smallest:g} to {summary.largest:g}; digest "
        f"{summary.data_digest[:12]}"
    )
    if json_:
        _print_json(summary.model_dump(mode="json"))
    else:
        print(summary.yaml())


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to measure: storage.")],
    url: Annotated[
        str | None,
        typer.Option(help="Write here, and leave it there.  [default: a temporary folder]"),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Measure speed and memory on this machine."""
    if name != "storage":
        _say(f"there is no benchmark {name!r}; known are: storage")
        raise typer.Exit(MISTAKE)
    from pipelines.bench_storage import bench_storage, print_storage

    with _mistakes_end_here():
        result = bench_storage(url)
    if json_:
        _print_json(result.model_dump(mode="json"))
    else:
        print_storage(result)


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


def _ingested(request: IngestRequest) -> IngestSummary:
    """Ingest with a progress bar on standard error."""
    from rich.console import Console

    from pipelines.ingest.write import ingest
    from pipelines.progress import LineReporter, TerminalReporter, use_reporter

    console = Console(stderr=True)
    reporter = TerminalReporter(console) if console.is_terminal else LineReporter(console)
    try:
        with use_reporter(reporter):
            return ingest(request)
    except KeyboardInterrupt:
        _say("diffem: interrupted; nothing counts until the end: the same command begins anew")
        raise typer.Exit(130) from None


@contextmanager
def _mistakes_end_here() -> Iterator[None]:
    """Turn a caller's mistake into one message and exit status 2, a failing store into 1."""
    try:
        yield
    except ValueError as error:
        _say(f"diffem: {error}")
        raise typer.Exit(MISTAKE) from None
    except OSError as error:
        from storage_schemas.redaction import without_secrets

        _say(f"diffem: {without_secrets(str(error))}")
        raise typer.Exit(FAILED) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
