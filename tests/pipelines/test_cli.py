"""The command line: what a caller's mistake gets, and what light commands cost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config_io import load_config
from storage_schemas.run_store import RunStore

DIGITS = "deploy/experiments/digits.yaml"


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.yaml"], "no config at nowhere.yaml"),
        ([DIGITS, "--set", "m_step.stepz=3"], "m_step.stepz: unknown key"),
        ([DIGITS, "--set", "data.holdout=1797"], "data.holdout is 1797 but there are only 1797"),
        ([DIGITS, "--set", "runner.device=cuda:99"], "runner.device is 'cuda:99'"),
        ([DIGITS, "--set", "schedule.sigma_min=1e3"], "noise must grow"),
        ([DIGITS, "--store", "nosuchscheme://bucket/run"], "nosuchscheme"),
        ([DIGITS, "--store", "/proc/diffem"], "/proc/diffem"),
        ([DIGITS, "--store", "{tmp}/a-file/run"], "a-file"),
        ([DIGITS, "--store", "{tmp}/foreign"], "is not empty and not a run"),
    ],
)
def test_a_mistake_ends_with_one_message_and_writes_nothing(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("")
    before = contents(tmp_path)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--store" not in arguments:
        arguments += ["--store", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("diffem: ")
    assert expected in result.stderr
    assert "Traceback" not in result.output
    assert contents(tmp_path) == before


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    url = tmp_path / "run"
    RunStore.create(str(url), load_config(DIGITS))
    before = contents(tmp_path)
    result = CliRunner().invoke(
        app, ["run", DIGITS, "--store", str(url), "--set", "channel.keep=0.25"]
    )
    assert result.exit_code == 2
    assert "channel.keep: 0.5 -> 0.25" in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["status", "verify"])
def test_what_is_no_run_is_refused(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 2
    assert "is not a run" in result.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    store = str(tmp_path / "run")
    options = ["--store", store, "--dry-run", "--no-calibration", "--set", "seed=7"]
    result = CliRunner().invoke(app, ["run", DIGITS, *options])
    assert result.exit_code == 0, result.output
    assert "seed: 7" in result.stdout
    assert "shards per E-step" in result.stdout
    assert "(new)" in result.stdout
    assert contents(tmp_path) == []


def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", DIGITS, "--dry-run", "--set", "data.holdout=5000"])
    assert result.exit_code == 2
    assert "data.holdout is 5000" in result.stderr


def test_the_status_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    url = tmp_path / "run"
    RunStore.create(str(url), load_config(DIGITS))
    result = CliRunner().invoke(app, ["status", str(url), "--json"])
    assert result.exit_code == 0
    status = json.loads(result.stdout)
    assert (status["state"], status["complete"], status["history"]) == ("incomplete", 0, [])
    assert CliRunner().invoke(app, ["status", str(url)]).exit_code == 0


def test_status_imports_nothing_heavy(tmp_path: Path) -> None:
    url = tmp_path / "run"
    RunStore.create(str(url), load_config(DIGITS))
    code = (
        "import sys; from pipelines.cli import app\n"
        f"app(['status', {str(url)!r}, '--json'], standalone_mode=False)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stderr.split())
    assert not modules & {"torch", "deepinv", "prefect", "zarr", "xarray", "matplotlib"}


def test_the_console_script_is_installed() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "diffem"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("run", "status", "verify"):
        assert command in done.stdout


def test_an_unknown_benchmark_is_a_mistake() -> None:
    result = CliRunner().invoke(app, ["bench", "storge"])
    assert result.exit_code == 2
    assert "No such command 'storge'" in result.stderr


ENDING = """
import atexit, sys
from pipelines import cli

class Large:
    def __del__(self):
        print("taken apart")

large = Large()

def command():
    atexit.register(print, "told of the end")
    print("worked")
    {ending}

cli.app = command
cli.main()
"""


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("raise SystemExit(0)", 0, ["worked", "told of the end"]),
        ("raise SystemExit(3)", 3, ["worked", "told of the end"]),
        ("raise SystemExit", 0, ["worked", "told of the end"]),
        # These are left to Python, which has something to say about them.
        ("raise SystemExit('a reason')", 1, ["worked", "told of the end", "taken apart"]),
        ("raise RuntimeError('a reason')", 1, ["worked", "told of the end", "taken apart"]),
    ],
)
def test_the_process_ends_without_being_taken_apart(
    ending: str, status: int, said: list[str]
) -> None:
    code = ENDING.format(ending=ending)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (status, said)
    assert ("a reason" in done.stderr) == ("a reason" in ending)


def test_what_was_printed_and_cannot_be_written_is_no_success() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    code = ENDING.format(ending="raise SystemExit(0)")
    # Else the first line would fail at once, and not what is left to be written at the end.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 120, "Python's own status"
    assert "No space left on device" in done.stderr
