"""What a flow run of a deployment does and how it ends, in this process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from prefect.client.orchestration import get_client
from prefect.states import State
from prefect.utilities.callables import parameter_schema

from pipelines.deployment import scheduled_run
from pipelines.status import read_status
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore

pytestmark = pytest.mark.usefixtures("prefect_server")


def advance(config: Path, store: Path, **parameters: Any) -> State[Any]:
    state = scheduled_run(str(config), str(store), return_state=True, **parameters)
    assert isinstance(state, State)
    return state


@pytest.fixture(scope="module")
def one_iteration(
    prefect_server: None, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    store = tmp_path_factory.mktemp("one") / "run"
    assert advance(tiny_config, store, iterations_per_flow_run=1).type.value == "COMPLETED"
    return store


@pytest.fixture
def begun(one_iteration: Path, tmp_path: Path) -> Path:
    """A run of its own with one of two iterations."""
    return shutil.copytree(one_iteration, tmp_path / "run")


@pytest.mark.slow
def test_a_flow_run_stops_at_a_commit_and_the_next_one_goes_on(
    tiny_config: Path, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    first = advance(tiny_config, store, iterations_per_flow_run=1)
    assert (first.type.value, first.message) == (
        "COMPLETED",
        "stopped at a commit: tiny has 1 of 2 iterations, 1 of them in this flow run",
    )
    status = read_status(RunStore.open(str(store)))
    assert (status.complete, status.state, status.writer) == (1, "incomplete", None)
    assert len(status.history) == 1, "nothing of the next iteration was begun"
    second = advance(tiny_config, store, iterations_per_flow_run=1)
    assert second.message == "tiny is complete, 2 of 2 iterations, 1 of them in this flow run"
    third = advance(tiny_config, store)
    assert (third.type.value, third.message) == (
        "COMPLETED",
        "tiny is complete, 2 of 2 iterations; nothing to do",
    )
    # The config is read anew at every flow run.
    more = advance(tiny_config, store, overrides=["iterations=3"], time_budget_minutes=1e-9)
    assert more.message == "tiny is complete, 3 of 3 iterations, 1 of them in this flow run"


def test_the_time_budget_begins_no_second_iteration(tiny_config: Path, tmp_path: Path) -> None:
    state = advance(tiny_config, tmp_path / "run", time_budget_minutes=1e-9)
    assert state.message == (
        "stopped at a commit: tiny has 1 of 2 iterations, 1 of them in this flow run"
    )


def test_flow_runs_are_named_after_the_run(tiny_config: Path, tmp_path: Path) -> None:
    names = set()
    for config in (tiny_config, tmp_path / "gone.yaml"):
        state = advance(config, tmp_path / "run", overrides=["name=other", "iterations=zero"])
        assert state.type.value == "FAILED"
        with get_client(sync_client=True) as client:
            assert state.state_details.flow_run_id is not None
            names.add(client.read_flow_run(state.state_details.flow_run_id).name)
    # Neither can be read, so the file gives the name.
    assert names == {"tiny · scheduled", "gone · scheduled"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["m_step.stepz=3"], "m_step.stepz: unknown key"),
        (["channel={kind: denoising, sigma: 1.0}", "method=em-mmpz"], "method: received"),
    ],
)
def test_a_mistake_fails_with_its_message_and_writes_nothing(
    overrides: list[str], message: str, tiny_config: Path, tmp_path: Path
) -> None:
    state = advance(tiny_config, tmp_path / "run", overrides=overrides)
    assert state.type.value == "FAILED"
    assert message in str(state.message)
    assert not (tmp_path / "run").exists()
    with get_client(sync_client=True) as client:
        assert state.state_details.flow_run_id is not None
        flow_run = client.read_flow_run(state.state_details.flow_run_id)
    assert flow_run.run_count == 1, "not tried again"


def test_another_config_fails_with_the_difference(tiny_config: Path, begun: Path) -> None:
    state = advance(tiny_config, begun, overrides=["seed=7"])
    assert state.type.value == "FAILED"
    assert "seed: 0 -> 7" in str(state.message)


def test_a_run_that_is_held_is_left_alone(tiny_config: Path, begun: Path) -> None:
    code = (
        "import sys; from storage_schemas.lease import RunLease; "
        "from storage_schemas.objects import ObjectStore; "
        "lease = RunLease(ObjectStore(sys.argv[1]), owner='somebody'); lease.acquire(); "
        "print('held', flush=True); sys.stdin.readline(); lease.release()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(begun)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        state = advance(tiny_config, begun)
        holder.communicate("\n", timeout=20)
    assert state.type.value == "CANCELLED"
    assert f"is being written by somebody (process {holder.pid}" in str(state.message)
    assert read_status(RunStore.open(str(begun))).complete == 1


def test_take_over_is_passed_on(tiny_config: Path, begun: Path) -> None:
    with RunLease(ObjectStore(str(begun)), owner="a writer that is known to be dead"):
        assert advance(tiny_config, begun, take_over=True).type.value == "COMPLETED"
    assert read_status(RunStore.open(str(begun))).complete == 2


def test_the_form_explains_every_parameter() -> None:
    schema = parameter_schema(scheduled_run)
    assert schema.required == ["config"]
    assert list(schema.properties) == [
        "config",
        "store",
        "overrides",
        "iterations_per_flow_run",
        "time_budget_minutes",
        "take_over",
    ]
    for name, field in schema.properties.items():
        assert len(field["description"]) > 20, name
    assert not schema.definitions, "fields, no nested forms"


def test_the_flow_goes_to_its_process_pickled(tmp_path: Path) -> None:
    """As `serve` sends it: by value, into a process that has not imported its module."""
    path = tmp_path / "flow.pickle"
    path.write_bytes(cloudpickle.dumps(scheduled_run))
    code = (
        "import sys, pathlib, cloudpickle; "
        "flow = cloudpickle.loads(pathlib.Path(sys.argv[1]).read_bytes()); "
        "print(flow.validate_parameters({'config': 'c', 'overrides': ['a=1'], "
        "'iterations_per_flow_run': 2})['overrides'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PREFECT_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "a=1" in done.stdout
