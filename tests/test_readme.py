"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.using.run import Run
from tests.pipelines.used_run import observed, run, used  # noqa: F401

README = Path("README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_lines_of_plain_python_run_and_restore_what_was_seen() -> None:
    code = CODE[0]
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


@pytest.mark.usefixtures("prefect_server")
def test_the_lines_that_use_a_run_draw_from_it(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are run on a run of the tests, under the name that the README gives it."""
    (code,) = (block for block in CODE if "open_run" in block)
    new = observed(run, 3)
    np.savez(tmp_path / "new.npz", **new)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(run.url)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(code, scope)
    draws, summary = scope["draws"], scope["summary"]
    assert isinstance(draws, torch.Tensor)
    assert draws.shape == (16, 3, 1, 8, 8)
    expected = run.posterior(-1).sample(new["y"], {"mask": new["mask"]}, draws=16)
    torch.testing.assert_close(draws, expected, atol=0, rtol=0)
    torch.testing.assert_close(summary.mean, draws.mean(dim=0), atol=1e-4, rtol=0)  # type: ignore[attr-defined]


COMMANDS = sorted(set(re.findall(r"^diffem (\w+)", README, re.MULTILINE)))


def test_the_readme_shows_how_a_run_is_made_and_used() -> None:
    assert {"run", "status", "verify", "report", "check", "ingest"} <= {*COMMANDS}
    assert {"reconstruct", "sample", "export"} <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
