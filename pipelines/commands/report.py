"""`diffem report`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipelines.commands.options import RunArgument
from pipelines.commands.talking import mistakes_end_here

__all__ = ["report"]


def report(
    run: RunArgument,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Where the page goes: any path or fsspec URL.  [default: report.html in a local "
            "run, else NAME-report.html here]",
        ),
    ] = None,
    open_nothing: Annotated[
        bool, typer.Option("--open-nothing", help="Do not show the page in a browser.")
    ] = False,
) -> None:
    """Write what a run has learned as one HTML page that opens anywhere, also offline.

    A run that goes on can be reported on: the page shows what is there.
    """
    from pipelines.report import read_report, render_report
    from pipelines.report.spectra import read_spectra
    from storage_schemas.objects import ObjectStore, redact_url
    from storage_schemas.run_store import RunStore

    with mistakes_end_here("nothing was written"):
        store = RunStore.open(run)
        local = store.objects.local_path
        if out is None:
            out = f"{store.config.name}-report.html" if local is None else f"{local}/report.html"
        folder, slash, name = out.rpartition("/")
        if not name:
            raise ValueError(f"--out is {out!r}, a folder; name a file, such as {out}report.html")
        target = ObjectStore(folder or (slash or "."))
        page = render_report(read_report(store), read_spectra(store))
        target.write(name, page.encode("utf-8"))
    print(redact_url(out))
    if target.local_path is not None and not open_nothing and sys.stdout.isatty():
        typer.launch((target.local_path / name).resolve().as_uri())
