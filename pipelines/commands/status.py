"""`diffem status`."""

from __future__ import annotations

from pipelines.commands.options import JsonOption, RunArgument
from pipelines.commands.talking import mistakes_end_here, print_json

__all__ = ["status"]


def status(run: RunArgument, json_: JsonOption = False) -> None:
    """Show what a run has done, iteration by iteration."""
    from pipelines.status import read_status
    from storage_schemas.run_store import RunStore

    with mistakes_end_here():
        report = read_status(RunStore.open(run))
    if json_:
        print_json(report.model_dump(mode="json"))
    else:
        from pipelines.table import print_status

        print_status(report)
