"""`diffem verify`."""

from __future__ import annotations

import typer

from pipelines.commands.options import JsonOption, RunArgument
from pipelines.commands.talking import DONE, FAILED, mistakes_end_here, print_json

__all__ = ["verify"]


def verify(run: RunArgument, json_: JsonOption = False) -> None:
    """Check every object of a run; exit status 1 if any is missing or damaged."""
    from storage_schemas.run_store import RunStore
    from storage_schemas.verify import verify as verify_run

    with mistakes_end_here():
        report = verify_run(RunStore.open(run))
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        from pipelines.table import print_verification

        print_verification(run, report)
    raise typer.Exit(DONE if report.ok else FAILED)
