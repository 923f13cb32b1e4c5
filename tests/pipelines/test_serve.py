"""`diffem serve` refuses mistakes before it serves anything."""

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

from pipelines.cli import app
from tests.pipelines.test_deployment import advance

NIGHTLY = ["--cron", "0 1 * * *"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --cron and --interval"),
        ([*NIGHTLY, "--interval", "1h"], "received both"),
        (["--cron", "every night"], "minute, hour, day of month"),
        (["--cron", "0 0 31 2 *"], "that come together"),  # the 31st of February
        (["--interval", "2"], "--interval: received '2' as a time"),
        ([*NIGHTLY, "--time-budget", "soon"], "--time-budget: received 'soon'"),
        ([*NIGHTLY, "--timezone", "Mars"], "such as UTC or Europe/Berlin"),
        ([*NIGHTLY, "--name", "a/b"], "no deployment has / % & < > in its name"),
        ([*NIGHTLY, "--set", "m_step.stepz=1"], "m_step.stepz: unknown key"),
        ([*NIGHTLY, "--store", "s3://user:pl4nted@bucket/run"], "--store holds a password"),
        (NIGHTLY, "prefect server start"),  # no server is configured
    ],
)
def test_a_mistake_ends_with_status_2(
    arguments: list[str], message: str, tiny_config: Path
) -> None:
    with temporary_settings(restore_defaults=[PREFECT_API_URL]):
        done = CliRunner().invoke(app, ["serve", str(tiny_config), *arguments])
    assert (done.exit_code, message in done.stderr) == (2, True), done.output
    assert "pl4nted" not in done.output


def test_a_server_that_does_not_answer(tiny_config: Path) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        done = CliRunner().invoke(app, ["serve", str(tiny_config), *NIGHTLY])
    assert done.exit_code == 1
    assert "no Prefect server answers at http://127.0.0.1:9/api" in done.stderr


@pytest.mark.usefixtures("prefect_server")
def test_a_run_with_another_config_and_one_that_cannot_run(
    tiny_config: Path, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    advance(tiny_config, store, iterations_per_flow_run=1)
    serve = ["serve", str(tiny_config), *NIGHTLY, "--store"]
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        other = CliRunner().invoke(app, [*serve, str(store), "--set", "seed=7"])
        unfit = CliRunner().invoke(
            app, [*serve, str(tmp_path / "new"), "--set", "network.attention={0: 3}"]
        )
    assert (other.exit_code, "seed: 0 -> 7" in other.stderr) == (2, True), other.output
    assert unfit.exit_code == 2, unfit.output
    assert "no Prefect server answers" not in unfit.stderr
    assert not (tmp_path / "new").exists()
