"""`diffem export`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.model_options import IterationOption, parse_iteration
from pipelines.commands.options import JsonOption, RunArgument
from pipelines.commands.talking import mistakes_end_here, print_json, say

__all__ = ["export"]


def export(
    run: RunArgument,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder to write: path or fsspec URL.")
    ],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="safetensors, torch-export, onnx (extra `export`) or diffusers (networks of that "
            "kind).",
        ),
    ] = "safetensors",
    what: Annotated[
        str,
        typer.Option(
            metavar="posterior|prior", help="The conditional model, or that of clean data alone."
        ),
    ] = "posterior",
    iteration: IterationOption = "-1",
    license_: Annotated[
        str,
        typer.Option("--license", metavar="ID", help="Licence of the weights, for the card."),
    ] = "unknown",
    json_: JsonOption = False,
) -> None:
    """Write a model as a folder that other tools load, with a model card."""
    with mistakes_end_here("the same command begins anew"):
        from pipelines.export.write import ExportRequest
        from pipelines.export.write import export as export_model

        done = export_model(
            ExportRequest(
                run=run,
                out=out,
                format=format_,
                what=what,
                iteration=parse_iteration(iteration),
                licence=license_,
            )
        )
    verb = "holds the same already:" if done.complete_before else "now holds"
    say(
        f"{done.out} {verb} the {done.what} of iteration {done.iteration} as {done.format}: "
        f"{', '.join(done.files)}"
    )
    if json_:
        print_json(done.model_dump(mode="json"))
