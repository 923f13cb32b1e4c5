"""How the commands that use a run end: like others, and with a message for damage and leases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from pipelines.commands.talking import FAILED, INTERRUPTED, MISTAKE, mistakes_end_here, say

__all__ = ["use_ends_here", "with_progress"]


@contextmanager
def use_ends_here(again: str) -> Iterator[None]:
    """Turn mistakes, damage, a lease and an interruption into one message and an exit status.

    Arguments:
        again: What repeating an interrupted command does.
    """
    from storage_schemas.errors import DamageError, IncompleteError
    from storage_schemas.lease import LeaseHeld, LeaseLost

    try:
        with mistakes_end_here():
            yield
    except (DamageError, IncompleteError, LeaseLost, FloatingPointError) as error:
        say(f"diffem: {error}")
        raise typer.Exit(FAILED) from None
    except LeaseHeld as error:
        say(f"diffem: {error}")
        raise typer.Exit(MISTAKE) from None
    except KeyboardInterrupt:
        say(f"diffem: interrupted; {again}")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def with_progress() -> Iterator[None]:
    """Show progress on standard error: bars on a terminal, lines elsewhere."""
    from rich.console import Console

    from pipelines.progress import LineReporter, TerminalReporter, use_reporter

    console = Console(stderr=True)
    with use_reporter(TerminalReporter(console) if console.is_terminal else LineReporter(console)):
        yield
