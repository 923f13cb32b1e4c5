"""`diffem bench`: one command per benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pipelines.commands.options import JsonOption, SetOption
from pipelines.commands.talking import mistakes_end_here, print_json

if TYPE_CHECKING:
    from storage_schemas._base import Record
    from storage_schemas.config import RunConfig

__all__ = ["bench"]

Result = TypeVar("Result", bound="Record")

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
    from pipelines.bench.tables import print_storage

    _tell(result, json_, print_storage)


@bench.command()
def orchestration(
    config: Annotated[
        str, typer.Option("--config", metavar="CONFIG", help="Experiment that is run twice.")
    ] = "deploy/experiments/digits.yaml",
    set_: SetOption = None,
    server: Annotated[
        bool, typer.Option(help="Measure on a Prefect server of its own as well.")
    ] = True,
    ray: Annotated[
        bool, typer.Option("--ray", help="Measure shards on Ray as well (needs the extra ray).")
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Measure each way so often, in turns.")
    ] = 1,
    json_: JsonOption = False,
) -> None:
    """A run through Prefect against a plain loop, and what a shard costs."""
    from pipelines.bench.orchestration import bench_orchestration
    from pipelines.config_io import load_config

    with mistakes_end_here():
        load_config(config, set_ or [])
        result = bench_orchestration(
            config, tuple(set_ or ()), server=server, ray=ray, rounds=rounds
        )
    from pipelines.bench.tables import print_orchestration

    _tell(result, json_, print_orchestration)


@bench.command()
def growth(json_: JsonOption = False) -> None:
    """Time and memory of the pipeline on 1,000, 10,000 and 100,000 small images."""
    from pipelines.bench.growth import bench_growth

    result = bench_growth()
    from pipelines.bench.growth import print_growth

    _tell(result, json_, print_growth)


_ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="Measure this experiment's network.  [default: the paper's U-Net and a small one]",
    ),
]
_SecondsOption = Annotated[
    float, typer.Option("--seconds", min=0.0, metavar="S", help="Measure each thing so long.")
]


@bench.command()
def core(
    config: _ConfigOption = None,
    set_: SetOption = None,
    seconds: _SecondsOption = 10.0,
    json_: JsonOption = False,
) -> None:
    """Networks, beside the machine's own ceilings."""
    with mistakes_end_here():
        given = _given(config, set_)
        from pipelines.bench.core import bench_core

        result = bench_core(given, seconds=seconds)
    from pipelines.bench.speed_tables import print_core

    _tell(result, json_, print_core)


@bench.command("e-step")
def e_step(
    config: _ConfigOption = None,
    set_: SetOption = None,
    seconds: _SecondsOption = 10.0,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch",
            min=1,
            metavar="N",
            help="Draw so many together; repeat it to see which is fastest.  "
            "[default: e_step.batch_size]",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Drawing reconstructions: sampler, noise and network."""
    with mistakes_end_here():
        given = _given(config, set_)
        from pipelines.bench.e_step import bench_e_step

        result = bench_e_step(given, seconds=seconds, batches=batch or ())
    from pipelines.bench.speed_tables import print_e_step

    _tell(result, json_, print_e_step)


@bench.command("m-step")
def m_step(
    config: _ConfigOption = None,
    set_: SetOption = None,
    seconds: _SecondsOption = 10.0,
    json_: JsonOption = False,
) -> None:
    """Gradient steps: examples, loss, gradient, optimizer, average."""
    with mistakes_end_here():
        given = _given(config, set_)
        from pipelines.bench.m_step import bench_m_step

        result = bench_m_step(given, seconds=seconds)
    from pipelines.bench.speed_tables import print_m_step

    _tell(result, json_, print_m_step)


def _tell(result: Result, json_: bool, print_table: Callable[[Result], None]) -> None:
    """Print what was measured: as one object, or as tables."""
    if json_:
        print_json(result.model_dump(mode="json"))
    else:
        print_table(result)


def _given(config: str | None, overrides: list[str] | None) -> RunConfig | None:
    """Load the config that is to be measured, if one is."""
    if config is None:
        if overrides:
            raise ValueError(
                f"--set {overrides[0]} changes a config but none was given; add --config CONFIG"
            )
        return None
    from pipelines.config_io import load_config

    return load_config(config, overrides or [])
