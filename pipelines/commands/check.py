"""`diffem check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.options import JsonOption, SetOption
from pipelines.commands.talking import mistakes_end_here, print_json

if TYPE_CHECKING:
    from pipelines.identifiability import IdentifiabilityReport

__all__ = ["check"]


def check(
    source: Annotated[
        str,
        typer.Argument(metavar="CONFIG_OR_RUN", help="YAML file (path or URL), or a run."),
    ],
    set_: SetOption = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Operators to look at.")] = 512,
    json_: JsonOption = False,
    pictures: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Draw NAME-identifiability.png here: any path or fsspec URL."
        ),
    ] = None,
) -> None:
    """Tell how much of x the observations show, before anything is trained.

    What every operator hides cannot be learned, by no method. Nothing is written without
    --pictures; the exit status is 0 whatever the verdict.
    """
    from pipelines.identifiability import check_source

    with mistakes_end_here():
        subject, found, report = check_source(source, set_ or [], samples=samples)
        if pictures is not None:
            from pipelines.identifiability_picture import draw_identifiability
            from storage_schemas.objects import ObjectStore

            name = f"{report.name}-identifiability.png"
            title = f"{report.name}  ·  {subject.config.description or report.channel}"
            picture = draw_identifiability(found, title=title, summary=report.summary)
            ObjectStore(pictures).write(name, picture)
            report = report.model_copy(update={"pictures": (name,)})
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        _print(report, pictures)


def _print(report: IdentifiabilityReport, pictures: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    colour = {"identifiable": "green", "partly": "yellow", "not": "red", "undetermined": "cyan"}
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.title = f"{report.name}: what the channel {report.channel!r} shows of x"
    table.add_column()
    table.add_column(justify="right")
    for name, value in _rows(report):
        table.add_row(name, value)
    console.print(table)
    for line in report.findings:
        console.print(Text(f"- {line}"))
    console.print()
    console.print(Text(report.summary, style=f"bold {colour[report.verdict]}"))
    for line in report.advice:
        console.print(Text(f"  -> {line}"))
    for name in report.pictures:
        console.print(Text(f"Picture: {str(pictures).rstrip('/')}/{name}"), soft_wrap=True)


def _rows(report: IdentifiabilityReport) -> list[tuple[str, str]]:
    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    rows = [
        ("samples", " x ".join(map(str, report.x_shape)) + f" = {report.size:,} entries"),
        ("operators", f"{report.operators:,} ({'all the same' if report.fixed else 'varying'})"),
    ]
    if report.seen_once is not None:
        rows.append(("one observation sees", percent(report.seen_once)))
    if report.method != "none":
        rows += [
            ("all of them see", f"{percent(1 - report.hidden_share)} (rank {report.rank:,})"),
            (
                "never seen: directions, variance",
                f"{percent(report.hidden_share)}, {percent(report.hidden_energy)}",
            ),
            (
                "under the noise: directions, variance",
                f"{percent(report.drowned_share)}, {percent(report.drowned_energy)}",
            ),
        ]
    if report.pairs is not None:
        unseen = report.pairs.unseen / max(report.pairs.count, 1)
        rows.append(("pairs never seen together", percent(unseen)))
    rows.append(("noise, in the data's units", f"{report.noise_std:.3g}"))
    prior = "fitted Gaussian start" if report.prior == "gaussian_start" else "stand-in"
    rows.append(("prior", prior))
    return rows
