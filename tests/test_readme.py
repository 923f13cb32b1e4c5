"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app

README = Path("README.md").read_text()


def test_the_lines_of_plain_python_run_and_restore_what_was_seen() -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    statements = [line for line in code.splitlines() if line.strip()]
    assert len(statements) <= 30
    scope: dict[str, object] = {}
    exec(code, scope)
    restored, x = scope["restored"], scope["x"]
    assert isinstance(restored, torch.Tensor)
    assert isinstance(x, torch.Tensor)
    seen = scope["params"]["mask"][:10] > 0.5  # type: ignore[index]
    # Seen pixels carry noise of 0.4 grey levels out of 16; after two short iterations the network
    # copies them to about a level, while a network that has learned nothing is off by about six.
    assert (restored - x[:10])[seen].abs().mean() < 2


COMMANDS = sorted(set(re.findall(r"^diffem (\w+)", README, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert Path(link).exists(), link
