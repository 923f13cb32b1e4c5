"""The `diffem` command line.

Exit status: 0 done, 1 failed or damaged, 2 the caller's mistake. Results go to standard output,
progress and messages to standard error. Heavy packages (torch, deepinv, Prefect, Zarr) are
imported inside the commands that use them.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable

import typer

from pipelines.commands.bench import bench
from pipelines.commands.check import check
from pipelines.commands.compare import compare
from pipelines.commands.export import export
from pipelines.commands.ingest import ingest
from pipelines.commands.reconstruct import reconstruct
from pipelines.commands.report import report
from pipelines.commands.run import run
from pipelines.commands.sample import sample
from pipelines.commands.serve import serve
from pipelines.commands.status import status
from pipelines.commands.verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="diffem",
    help="Learn diffusion models from corrupted data by expectation maximization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    run,
    check,
    compare,
    serve,
    status,
    report,
    verify,
    ingest,
    reconstruct,
    sample,
    export,
)
for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(bench)


def main() -> None:
    """Run the command line.

    With Prefect and PyTorch imported, Python takes two seconds and more to free every object at
    the end of a process, which the system does at once. All that is registered for the end of the
    process is still called before.
    """
    status: int | None = None

    def leave() -> None:
        if status is not None:
            _leave(status)

    atexit.register(leave)  # Called last: whatever is imported from now on comes earlier.
    try:
        app()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status = end.code or 0
        raise


def _leave(status: int) -> None:
    """End the process at once; if what was printed cannot be written, Python has its say."""
    logging.shutdown()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(status)


if __name__ == "__main__":
    main()
