"""`diffem bench`: one command per benchmark."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import JsonOption, SetOption
from pipelines.commands.talking import mistakes_end_here, print_json

__all__ = ["bench"]

bench = typer.Typer(
    name="bench",
    help="Measure speed and memory on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command()
def storage(
    url: Annotated[
        str | None,
        typer.Option(help="Write here, and leave it there.  [default: a temporary folder]"),
    ] = None,
    s3: Annotated[
        bool,
        typer.Option(
            "--s3", help="Measure on an S3 server on loopback as well (needs moto[server], s3fs)."
        ),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Codecs, stores, waiting for data, memory."""
    from pipelines.bench.storage import bench_storage

    with mistakes_end_here():
        result = bench_storage(url, s3=s3)
    if json_:
        print_json(result.model_dump(mode="json"))
    else:
        from pipelines.bench.tables import print_storage

        print_storage(result)


@bench.command()
def orchestration(
    config: Annotated[
        str, typer.Option("--config", metavar="CONFIG", help="Experiment that is run twice.")
    ] = "deploy/experiments/digits.yaml",
    set_: SetOption = None,
    server: Annotated[
        bool, typer.Option(help="Measure shards on a Prefect server of its own as well.")
    ] = True,
    ray: Annotated[
        bool, typer.Option("--ray", help="Measure shards on Ray as well (needs the extra ray).")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """A run through Prefect against a plain loop, and what a shard costs."""
    from pipelines.bench.orchestration import bench_orchestration
    from pipelines.config_io import load_config

    with mistakes_end_here():
        load_config(config, set_ or [])
        result = bench_orchestration(config, tuple(set_ or ()), server=server, ray=ray)
    if json_:
        print_json(result.model_dump(mode="json"))
    else:
        from pipelines.bench.tables import print_orchestration

        print_orchestration(result)
