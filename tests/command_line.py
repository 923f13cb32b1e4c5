"""`diffem` in this process: what it says as JSON, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from pipelines.cli import app


def diffem(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def json_of(*arguments: object) -> dict[str, Any]:
    """Run a command with --json, and return what it says: standard output holds nothing else."""
    result = diffem(*arguments, "--json")
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def refused(*arguments: object) -> str:
    """Run a command that is a mistake, and return its message."""
    result = diffem(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("diffem: ")
    return str(result.stderr)
