"""`diffem reconstruct`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.model_options import (
    DeviceOption,
    IterationOption,
    StepsOption,
    parse_iteration,
)
from pipelines.commands.options import JsonOption, RunArgument
from pipelines.commands.talking import mistakes_end_here, print_json, say, with_progress

__all__ = ["reconstruct"]


def reconstruct(
    run: RunArgument,
    observations: Annotated[
        str,
        typer.Argument(
            metavar="OBSERVATIONS",
            help="What `diffem ingest` reads (.npy, .npz, HDF5, NetCDF, Zarr, folder of images, "
            "hf://NAME), or the URL of a store that it wrote.",
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Where the draws go: path or fsspec URL.")
    ],
    draws: Annotated[int, typer.Option(help="Draws from the posterior of each observation.")] = 16,
    steps: StepsOption = None,
    summary: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What is kept beside the draws: mean, std, quantiles (comma-separated), or none."
            "  [default: mean,std]",
        ),
    ] = None,
    no_draws: Annotated[
        bool, typer.Option("--no-draws", help="Keep the summaries only, not the draws.")
    ] = False,
    iteration: IterationOption = "-1",
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Draws per network call.  [default: e_step.batch_size of the run]"),
    ] = None,
    y: Annotated[
        str | None, typer.Option("--y", metavar="NAME", help="Array of observations.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=ARRAY]",
            help="Array of an operator parameter, such as mask; may be repeated. Arrays that have "
            "the parameter's own name are found without.",
        ),
    ] = None,
    x_shape: Annotated[
        str | None,
        typer.Option(metavar="C,H,W", help="Shape of a clean sample: compared with the run's."),
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Images are (n, H, W, C), not (n, C, H, W).")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first so many observations.")
    ] = None,
    using: Annotated[
        str,
        typer.Option(
            metavar="posterior|prior",
            help="The run's posterior, or its prior with another channel (--channel).",
        ),
    ] = "posterior",
    channel: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="With --using prior: a run config whose channel, linear with Gaussian noise, "
            "made the observations.",
        ),
    ] = None,
    solver_iterations: Annotated[
        int | None,
        typer.Option(
            help="With --using prior: iterations of conjugate gradients per step.  [default: 3]"
        ),
    ] = None,
    device: DeviceOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="runner.KEY=VALUE",
            help="Draw elsewhere than the run was made, such as runner.workers=2 or "
            "runner.kind=ray; may be repeated.",
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Restore new observations, with their uncertainty."""
    with mistakes_end_here("the same command goes on where it stopped"), with_progress():
        from pipelines.config_io import load_config
        from pipelines.ingest.request import parse_params, parse_shape
        from pipelines.using import reconstruct as work
        from pipelines.using.request import ReconstructRequest

        if using not in ("posterior", "prior"):
            raise ValueError(f"--using is {using!r}; give posterior or prior")
        if (using == "prior") != (channel is not None):
            raise ValueError(
                "--using prior and --channel CONFIG belong together: the prior says what clean "
                "samples are, CONFIG's channel what made the observations of them; give both, or "
                "none for the run's own channel"
            )
        request = ReconstructRequest(
            run=run,
            observations=observations,
            out=out,
            draws=draws,
            steps=steps,
            summaries=None if summary is None else work.parse_summaries(summary),
            keep_draws=not no_draws,
            iteration=parse_iteration(iteration),
            seed=seed,
            batch_size=batch_size,
            device=device,
            overrides=tuple(set_ or ()),
            y=y,
            params=parse_params(param or []),
            x_shape=None if x_shape is None else parse_shape(x_shape),
            channels_last=channels_last,
            limit=limit,
            channel=None if channel is None else load_config(channel),
            solver_iterations=solver_iterations,
        )
        done = work.reconstruct(request)
    verb = "holds the same already:" if done.reused == done.shards else "now holds"
    say(
        f"{done.out}/draws.zarr {verb} {done.samples:,} observations with {done.draws} draws each "
        f"({', '.join(done.arrays)}); {done.shards - done.reused} of {done.shards} shards drawn "
        f"in {done.seconds:.1f} s"
    )
    if json_:
        print_json(done.model_dump(mode="json"))
