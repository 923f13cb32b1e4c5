"""`diffem ingest`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import JsonOption
from pipelines.commands.talking import mistakes_end_here, print_json, say, with_progress

__all__ = ["ingest"]


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
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add to the observations that are there, for training only; runs with "
            "data.follow: true pick them up at their next iteration.",
        ),
    ] = False,
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
    from pipelines.ingest.memory import return_large_blocks
    from pipelines.ingest.request import (
        IngestRequest,
        parse_holdout,
        parse_params,
        parse_shape,
    )
    from pipelines.ingest.write import ingest as ingest_all

    with mistakes_end_here("the same command goes on where this one stopped"):
        if append and holdout != "0.1":
            raise IngestError(
                "--holdout is given but what is added is for training only: the held-out samples "
                "are those of the first ingest; leave it out"
            )
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
            append=append,
            seed=seed or 0,
            limit=limit,
            units=units,
            value_range=range_,
        )
        return_large_blocks()
        with with_progress():
            summary = ingest_all(request)
    verb = "holds the same already:" if summary.complete_before else "now holds"
    say(
        f"{summary.url} {verb} {summary.samples:,} observations, {summary.holdout:,} held "
        f"out, values {summary.smallest:g} to {summary.largest:g}; digest "
        f"{summary.data_digest[:12]}"
    )
    if json_:
        print_json(summary.model_dump(mode="json"))
    else:
        print(summary.yaml())
