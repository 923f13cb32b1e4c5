"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["ConfigArgument", "JsonOption", "RunArgument", "SetOption", "StoreOption"]

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
