"""`diffem sample`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.model_options import DeviceOption, StepsOption
from pipelines.commands.options import JsonOption, RunArgument
from pipelines.commands.talking import mistakes_end_here, print_json, say, with_progress

__all__ = ["sample"]


def sample(
    run: RunArgument,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Where the samples go: path or fsspec URL.")
    ],
    n: Annotated[int, typer.Option("-n", "--samples", help="How many samples.")],
    png: Annotated[
        str | None,
        typer.Option(
            "--png", metavar="FILE", help="Draw the first of them (256 at most) as a picture."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all samples.")] = 0,
    steps: StepsOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Samples per network call.  [default: e_step.batch_size of the run]"),
    ] = None,
    device: DeviceOption = None,
    json_: JsonOption = False,
) -> None:
    """Draw clean samples from the prior that a run learned."""
    with mistakes_end_here("the same command goes on where it stopped"), with_progress():
        from pipelines.using import sample as work

        done = work.sample(
            work.SampleRequest(
                run=run,
                out=out,
                n=n,
                png=png,
                seed=seed,
                steps=steps,
                batch_size=batch_size,
                device=device,
            )
        )
    verb = "holds the same already:" if done.reused == done.shards else "now holds"
    say(f"{done.out}/draws.zarr {verb} {done.samples:,} samples, in {done.seconds:.1f} s")
    if json_:
        print_json(done.model_dump(mode="json"))
