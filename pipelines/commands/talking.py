"""How commands end and speak: exit status, messages to standard error, JSON to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

__all__ = [
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "MISTAKE",
    "mistakes_end_here",
    "print_json",
    "say",
    "with_progress",
]

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


@contextmanager
def mistakes_end_here(again: str | None = None) -> Iterator[None]:
    """Turn what ends a command early into one message and an exit status.

    A caller's mistake, and a run that another process writes, are 2; a failing store or device,
    damage, what is not complete, numbers that are not finite and a lease that was lost are 1.

    Arguments:
        again: What repeating the command does after Ctrl-C, which is 130 then; None leaves it to
            the caller.
    """
    from pipelines.faults import is_fault
    from storage_schemas.errors import DamageError, IncompleteError
    from storage_schemas.lease import LeaseHeld, LeaseLost

    try:
        yield
    except (ValueError, LeaseHeld) as error:
        say(f"diffem: {error}")
        raise typer.Exit(MISTAKE) from None
    except (DamageError, IncompleteError, LeaseLost, FloatingPointError) as error:
        say(f"diffem: {error}")
        raise typer.Exit(FAILED) from None
    except OSError as error:
        from storage_schemas.redaction import without_secrets

        say(f"diffem: {without_secrets(str(error))}")
        raise typer.Exit(FAILED) from None
    except RuntimeError as error:
        if not is_fault(error):
            raise
        say(f"diffem: {error}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        if again is None:
            raise
        say(f"diffem: interrupted; {again}")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def with_progress() -> Iterator[None]:
    """Show progress on standard error: bars on a terminal, lines elsewhere."""
    from rich.console import Console

    from pipelines.progress import reporter_on, use_reporter

    with use_reporter(reporter_on(Console(stderr=True))):
        yield


def say(text: str) -> None:
    """Print a message to standard error."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON object to standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))
