"""`diffem compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.options import ConfigArgument, JsonOption, SetOption
from pipelines.commands.talking import FAILED, mistakes_end_here, print_json, say

if TYPE_CHECKING:
    from pipelines.compare import Method

__all__ = ["compare"]


def compare(
    config: ConfigArgument,
    methods: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="What is compared: diffem, em-mmps, gaussian, clean (a ceiling, trained on clean "
            "samples).",
        ),
    ] = "diffem,em-mmps,gaussian,clean",
    seeds: Annotated[
        str, typer.Option(metavar="0,1,...", help="Seeds; each is a run of each method.")
    ] = "0,1,2",
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="URL",
            help="Folder of the runs: any path or fsspec URL.  [default: runs/NAME-compare]",
        ),
    ] = None,
    set_: SetOption = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Take runs over from an owner that seems alive but is known to be dead.",
        ),
    ] = False,
    json_: JsonOption = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
) -> None:
    """Compare DiffEM with EM-MMPS, the Gaussian posterior and training on clean samples.

    Each method and seed is a run like any other, in FOLDER/METHOD-SEED: what is there is
    collected, what is missing is done, and the same command goes on where it ended.
    """
    from pipelines.config_io import load_config

    with mistakes_end_here():
        if json_ and markdown:
            raise ValueError("received --json and --markdown, but there is one output; give one")
        names, numbers = _methods(methods), _seeds(seeds)
        resolved = load_config(config, set_ or [])
        url = store or f"runs/{resolved.name}-compare"
    with mistakes_end_here("the same command goes on"):
        from pipelines.compare import compare as compare_runs
        from pipelines.launch import Interrupted, RunFailed

        try:
            found = compare_runs(
                resolved, url, methods=names, seeds=numbers, take_over=take_over, say=say
            )
        except Interrupted:
            raise KeyboardInterrupt from None
        except RunFailed as error:
            say(f"diffem: {error}")
            raise typer.Exit(FAILED) from None
    if json_:
        print_json(found.model_dump(mode="json"))
        return
    from pipelines.compare.table import as_markdown, print_comparison

    if markdown:
        print(as_markdown(found))
    else:
        print_comparison(found)


def _methods(text: str) -> list[Method]:
    from pipelines.compare.contenders import METHODS

    given = [part.strip() for part in text.split(",") if part.strip()]
    known = {str(method): method for method in METHODS}
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise ValueError(
            f"--methods is {text!r}, with unknown {', '.join(unknown) or 'nothing'}; known are "
            f"{', '.join(METHODS)}, separated by commas"
        )
    return [known[name] for name in dict.fromkeys(given)]


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) < 2**63 for part in parts):
        raise ValueError(
            f"--seeds is {text!r}; give whole numbers from 0, separated by commas, such as 0,1,2"
        )
    return list(dict.fromkeys(map(int, parts)))
