"""How commands end and speak: exit status, messages to standard error, JSON to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

__all__ = ["DONE", "FAILED", "INTERRUPTED", "MISTAKE", "mistakes_end_here", "print_json", "say"]

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


@contextmanager
def mistakes_end_here() -> Iterator[None]:
    """Turn a caller's mistake into one message and exit status 2, a failing store into 1."""
    try:
        yield
    except ValueError as error:
        say(f"diffem: {error}")
        raise typer.Exit(MISTAKE) from None
    except OSError as error:
        from storage_schemas.redaction import without_secrets

        say(f"diffem: {without_secrets(str(error))}")
        raise typer.Exit(FAILED) from None


def say(text: str) -> None:
    """Print a message to standard error."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON object to standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))
