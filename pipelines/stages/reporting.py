"""The run's report, written beside it: what `diffem report` writes, for whoever looks at a UI."""

from __future__ import annotations

from typing import Any

from storage_schemas.run_store import RunStore

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"
"""Name of the page in the run; no manifest names it, and nothing depends on it."""


def write_report(run_url: str) -> dict[str, Any]:
    """Write the report of what is there into the run, in the place of an earlier one.

    Arguments:
        run_url: The run.

    Returns:
        The page's name and size in bytes.
    """
    from pipelines.report import read_report, render_report
    from pipelines.report.spectra import read_spectra

    store = RunStore.open(run_url)
    page = render_report(read_report(store), read_spectra(store)).encode("utf-8")
    store.objects.write(REPORT, page)
    return {"name": REPORT, "bytes": len(page)}
