"""Prefect flows and tasks, the `diffem` command line, and the way from a config to its objects.

`open_run` opens a run for use in Python; it is imported when it is first used, so that importing
the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.using.run import open_run

__all__ = ["open_run"]


def __getattr__(name: str) -> Any:
    if name == "open_run":
        from pipelines.using.run import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
