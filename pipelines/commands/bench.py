"""`diffem bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import JsonOption
from pipelines.commands.talking import MISTAKE, mistakes_end_here, print_json, say

__all__ = ["bench"]


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
        say(f"there is no benchmark {name!r}; known are: storage")
        raise typer.Exit(MISTAKE)
    from pipelines.bench_storage import bench_storage, print_storage

    with mistakes_end_here():
        result = bench_storage(url)
    if json_:
        print_json(result.model_dump(mode="json"))
    else:
        print_storage(result)
