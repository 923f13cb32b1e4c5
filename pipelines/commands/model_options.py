"""Options of the commands that use a model of a run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

__all__ = ["DeviceOption", "IterationOption", "StepsOption", "parse_iteration"]

IterationOption = Annotated[
    str,
    typer.Option(
        metavar="K", help="EM iteration whose model is used; negative numbers count from the last."
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(help="Steps of the sampler.  [default: e_step.sampler.steps of the run]"),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:N or auto.  [default: runner.device of the run]"),
]


def parse_iteration(text: str) -> int | Literal["best"]:
    """Read an iteration's number, or `best`.

    Raises:
        ValueError: It is neither.
    """
    if text == "best":
        return "best"
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"--iteration is {text!r}; give a number, such as 3, or -1 for the last"
        ) from None
