"""What Prefect is told and makes of it: cached stages, retries, ends that were asked for."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import CancelledRun
from prefect.states import Cancelling, Running

from pipelines import artifacts, cancellation, flows, watching
from pipelines.config_io import load_config
from pipelines.faults import StageFailed, is_fault
from pipelines.flows import em_run
from pipelines.stages import iterations
from storage_schemas.errors import NoSpace, StoreFailed
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.pipelines.test_run import results_of

pytestmark = pytest.mark.usefixtures("prefect_server")


def create(url: Path, config: Path, *overrides: str) -> str:
    RunStore.create(str(url), load_config(str(config), overrides))
    return str(url)


def flow_runs(url: str) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[watching.run_tag(url)]))
        )


def latest(url: str, name: str) -> FlowRun:
    """The flow run of a name that began last."""
    found = [run for run in flow_runs(url) if run.name == name and run.start_time]
    return max(found, key=lambda run: str(run.start_time))


def states_of_tasks(flow_run: FlowRun, *, at_least: int) -> dict[str, str | None]:
    """States of a flow run's tasks by name, when the server has recorded that they ended."""
    from prefect.client.schemas.filters import FlowRunFilterId

    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
            runs = client.read_task_runs(flow_run_filter=wanted)
            ended = [run for run in runs if run.state is not None and run.state.is_final()]
            if len(ended) >= at_least or time.monotonic() > deadline:
                return {run.name: run.state_name for run in runs}
            time.sleep(0.1)


def run_tagged(url: str, **arguments: Any) -> Any:
    """Run as the command line does, with the tags by which flow runs of a run are found."""
    from prefect import tags

    with tags(watching.TAG, watching.run_tag(url)):
        return em_run(url, **arguments)


@pytest.fixture
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("task_e_step", "task_m_step", "task_evaluate", "task_recover"):
        monkeypatch.setattr(getattr(flows, name), "retry_delay_seconds", [0.05])


def failing(
    function: Callable[..., Any], error: BaseException, *, times: int, when: Callable[..., bool]
) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    """Return `function`, which raises `error` the first `times` times that it is called `when`."""
    failed: list[tuple[Any, ...]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs) and len(failed) < times:
            failed.append(args)
            raise error
        return function(*args, **kwargs)

    return call, failed


def second_shard(folder: Any, shard: int, *_: Any, **__: Any) -> bool:
    return shard == 1 and folder.iteration == 0


def fail_writing(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, *, times: int
) -> list[tuple[Any, ...]]:
    from storage_schemas.iteration_store import IterationStore

    call, failed = failing(IterationStore.write_shard, error, times=times, when=second_shard)
    monkeypatch.setattr(IterationStore, "write_shard", call)
    return failed


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.usefixtures("quick_pauses")
def test_a_shard_that_fails_twice_and_then_works_changes_nothing(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    em_run(create(tmp_path / "plain", tiny_config))
    failed = fail_writing(monkeypatch, StoreFailed(5, "the server answered 503"), times=2)
    em_run(create(tmp_path / "shaky", tiny_config, "runner.retries=2"))
    assert len(failed) == 2
    assert results_of(tmp_path / "shaky") == results_of(tmp_path / "plain")


@pytest.mark.usefixtures("quick_pauses")
def test_a_shard_that_always_fails_is_named_and_the_others_are_finished(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = create(tmp_path / "run", tiny_config, "runner.retries=2")
    failed = fail_writing(monkeypatch, StoreFailed(5, "the server answered 503"), times=99)
    with pytest.raises(StageFailed, match=r"iteration 000: 1 of 4 .* shard 00001: .* 503"):
        em_run(url)
    assert len(failed) == 3, "once, and two repetitions"
    assert sorted(RunStore.open(url).iteration(0).shards()) == [0, 2, 3]


@pytest.mark.usefixtures("quick_pauses")
def test_a_mistake_is_not_tried_again(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = create(tmp_path / "run", tiny_config)
    failed = fail_writing(monkeypatch, ValueError("received 3, expected 4"), times=99)
    with pytest.raises(ValueError, match="received 3, expected 4"):
        em_run(url)
    assert len(failed) == 1


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (StoreFailed(5, "503"), True),
        (ConnectionResetError(104, "reset"), True),
        (TimeoutError("slow"), True),
        (RuntimeError("CUDA error: an illegal memory access"), True),
        (type("WorkerDied", (RuntimeError,), {})("killed"), True),
        (NoSpace(28, "No space left on device", "/"), False),
        (PermissionError(13, "Permission denied"), False),
        (FloatingPointError("diverged"), False),
        (ValueError("wrong"), False),
        (RuntimeError("shapes differ"), False),
        (AssertionError("an invariant"), False),
    ],
)
def test_only_faults_of_storage_and_devices_are_worth_another_try(
    error: Exception, fault: bool
) -> None:
    assert is_fault(error) is fault


# ------------------------------------------------------------ what the UI is told


def test_flow_runs_are_named_tagged_and_shown(tmp_path: Path, tiny_config: Path) -> None:
    url = create(tmp_path / "run", tiny_config)
    run_tagged(url)
    runs = {run.name: run for run in flow_runs(url)}
    assert {"tiny · iteration 000", "tiny · iteration 001"} < set(runs)
    for run in runs.values():
        assert run.state_type == StateType.COMPLETED
        assert {watching.TAG, watching.run_tag(url)} <= set(run.tags)
    iteration = runs["tiny · iteration 001"]
    with get_client(sync_client=True) as client:
        from prefect.client.schemas.filters import (
            ArtifactFilter,
            ArtifactFilterFlowRunId,
            FlowRunFilterId,
            TaskRunFilter,
        )

        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[iteration.id])
            )
        )
        shown = {artifact.key: artifact for artifact in found}
        # Task runs are recorded by the server when it comes to it.
        deadline = time.monotonic() + 60
        names: set[str] = set()
        while "E-step, shard 00003" not in names:
            assert time.monotonic() < deadline, names
            tasks = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[iteration.id])),
                task_run_filter=TaskRunFilter(),
            )
            names = {run.name for run in tasks}
            time.sleep(0.1)
    assert set(shown) == {"tiny-e-step", "tiny-m-step", "tiny-iteration", "tiny-history"}
    assert shown["tiny-e-step"].data == 100.0
    assert shown["tiny-m-step"].data == 100.0
    text = str(shown["tiny-iteration"].data)
    metrics = RunStore.open(url).iteration(1).metrics()
    assert metrics is not None
    value = metrics.values["divergence"].value
    assert f"{value:.4g}" in text
    assert "](data:image/png;base64," in text
    assert len(text) < 600_000
    history = str(shown["tiny-history"].data)
    assert all(f'"{name}"' in history for name in ("start", "000", "001"))


def test_a_server_that_is_gone_is_not_asked_by_every_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    clock = [1000.0]
    monkeypatch.setattr(artifacts, "_gone_until", 0.0)
    monkeypatch.setattr(artifacts.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: logging.getLogger("test"))

    def tell(what: str, error: Exception | None = None) -> str:
        asked.append(what)
        if error is not None:
            raise error
        return what

    refused = httpx.HTTPStatusError(
        "too large", request=httpx.Request("POST", "http://x"), response=httpx.Response(413)
    )
    assert artifacts._try(lambda: tell("refused", refused)) is None
    assert artifacts._try(lambda: tell("heard")) == "heard", "one artifact's fault alone"
    # Prefect asks for a minute before it says so.
    assert artifacts._try(lambda: tell("gone", httpx.ConnectError("no"))) is None
    assert artifacts._try(lambda: tell("soon after")) is None
    clock[0] += 601
    assert artifacts._try(lambda: tell("later")) == "later"
    assert asked == ["refused", "heard", "gone", "later"]


def report_artifacts() -> list[str]:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["tiny-report"]))
        return [str(found.data) for found in client.read_artifacts(artifact_filter=wanted)]


def test_the_report_is_written_at_the_end_and_linked_from_the_ui(
    tmp_path: Path, tiny_config: Path
) -> None:
    url = create(tmp_path / "run", tiny_config)
    em_run(url, iterations_per_flow_run=1)
    page = tmp_path / "run/report.html"
    first = page.read_text()
    assert "1 of 2" in first
    em_run(url)
    assert page.read_text() != first, "it tells of the second iteration as well"
    assert any(f"]({page.resolve().as_uri()})" in text for text in report_artifacts())
    assert verify(url).ok
    written = page.stat().st_mtime_ns
    em_run(url)
    assert page.stat().st_mtime_ns == written, "nothing was done, so there is nothing to tell"


def test_a_report_that_fails_is_no_failure_of_the_run(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("no such font")

    monkeypatch.setattr("pipelines.report.render_report", fail)
    before = len(report_artifacts())
    done = em_run(create(tmp_path / "run", tiny_config, "iterations=1"))
    assert done["complete"]
    assert not (tmp_path / "run/report.html").exists()
    assert len(report_artifacts()) == before


def test_a_repeated_run_shows_finished_stages_as_cached(tmp_path: Path, tiny_config: Path) -> None:
    url = create(tmp_path / "run", tiny_config)
    run_tagged(url)
    store = RunStore.open(url)
    # Without the commit, all stages of the last iteration are looked at again.
    store.objects.delete("iterations/001/iteration.json")
    again = run_tagged(url)
    assert again["iterations"]["1"] == {
        "complete": False,
        "shards_reused": 4,
        "m_step_reused": True,
        "evaluate_reused": True,
    }
    assert states_of_tasks(latest(url, "tiny · iteration 001"), at_least=7) == {
        **{f"E-step, shard {shard:05d}": "Cached" for shard in range(4)},
        "M-step": "Cached",
        "evaluation": "Cached",
        "commit": "Completed",
    }
    records = {path.name for path in (tmp_path / "run/prefect").iterdir()}
    assert sum(name.startswith("diffem-e_step-") for name in records) == 8
    assert sum(name.startswith("diffem-m_step-") for name in records) == 2
    assert all(b"pickle" not in (tmp_path / "run/prefect" / name).read_bytes() for name in records)


# ------------------------------------------------------------------------------------------ limits


def test_a_flow_run_stops_at_a_commit_and_the_next_one_goes_on(
    tmp_path: Path, tiny_config: Path
) -> None:
    em_run(create(tmp_path / "whole", tiny_config))
    url = create(tmp_path / "parts", tiny_config)
    first = em_run(url, iterations_per_flow_run=1)
    assert not first["complete"]
    assert "1 of 2 EM iterations" in first["reason"]
    assert len(RunStore.open(url).completed()) == 1
    second = em_run(url, iterations_per_flow_run=1)
    assert second["complete"]
    assert results_of(url) == results_of(tmp_path / "whole")


def test_a_time_budget_ends_after_the_iteration_that_uses_it_up(
    tmp_path: Path, tiny_config: Path
) -> None:
    from datetime import timedelta

    url = create(tmp_path / "run", tiny_config)
    done = em_run(url, time_budget=timedelta(microseconds=1))
    assert not done["complete"]
    assert "time budget" in done["reason"]
    assert len(RunStore.open(url).completed()) == 1


# ------------------------------------------------------------------------------------------ ending


def test_an_end_that_is_asked_for_leaves_a_resumable_point(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    em_run(create(tmp_path / "plain", tiny_config))
    url = create(tmp_path / "run", tiny_config)
    learn = iterations.train

    def stop_soon(*args: Any, **kwargs: Any) -> Any:
        cancellation.request("a test")
        return learn(*args, **kwargs)

    monkeypatch.setattr(iterations, "train", stop_soon)
    try:
        with pytest.raises(CancelledRun, match="a test"):
            run_tagged(url)
    finally:
        cancellation.allow()
    states = {run.name: run.state_type for run in flow_runs(url)}
    assert set(states.values()) == {StateType.CANCELLED}
    folder = RunStore.open(url).iteration(0)
    assert folder.read_checkpoint() is not None
    assert folder.stage("m_step") is None

    monkeypatch.setattr(iterations, "train", learn)
    run_tagged(url)
    assert results_of(url) == results_of(tmp_path / "plain")


def test_a_flow_run_that_is_cancelled_on_the_server_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prefect import flow

    monkeypatch.setattr(watching, "_LOOK_SECONDS", 0.05)
    noticed = threading.Event()

    @flow
    def working() -> None:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        with watching.noticing_cancellation():
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(context.flow_run.id, Cancelling(), force=True)
            for _ in range(100):
                if cancellation.requested():
                    noticed.set()
                    return
                threading.Event().wait(0.1)

    try:
        working(return_state=True)
        assert noticed.is_set()
    finally:
        cancellation.allow()


def test_flow_runs_of_a_killed_process_are_marked_as_crashed(
    tmp_path: Path, tiny_config: Path
) -> None:
    from prefect import flow

    url = create(tmp_path / "run", tiny_config)
    other = create(tmp_path / "other", tiny_config)

    def abandoned(name: str, at: str) -> Any:
        with get_client(sync_client=True) as client:
            made = client.create_flow_run(
                em_run,
                name=name,
                parameters={"run_url": at},
                tags=[watching.TAG, watching.run_tag(at)],
                state=Running(),
            )
            client.set_flow_run_state(made.id, Running(), force=True)
            return made.id

    ours, theirs = abandoned("ours", url), abandoned("theirs", other)

    @flow
    def starting() -> int:
        return watching.mark_abandoned(url)

    assert starting() == 1
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(ours).state_type == StateType.CRASHED
        assert client.read_flow_run(theirs).state_type == StateType.RUNNING


# ------------------------------------------------------------ stopping rule


def test_a_stopping_rule_ends_the_run_for_good_and_says_why(
    tmp_path: Path, tiny_config: Path
) -> None:
    from pipelines.status import read_status

    rule = "stop={kind: plateau, monitor: divergence, patience: 1}"
    url = create(tmp_path / "run", tiny_config, "iterations=6", rule)
    done = em_run(url)
    store = RunStore.open(url)
    completed = len(store.completed())
    # The tiny network learns nothing: no iteration is better than the first.
    assert completed == 2
    assert done["complete"]
    status = read_status(store)
    assert status.state == "complete"
    assert status.best == 0
    assert status.stopped == done["reason"]
    assert "divergence" in done["reason"]
    assert em_run(url)["iterations"] == {}

    # Another rule, and the run is not at its end.
    budget = load_config(str(tiny_config), ["iterations=3"])
    RunStore.create(url, budget)
    assert read_status(RunStore.open(url)).state == "incomplete"
    em_run(url)
    assert len(RunStore.open(url).completed()) == 3


def test_an_end_is_forgotten_by_the_next_run_but_not_within_one_command() -> None:
    cancellation.request("of a run before")
    cancellation.begin()
    assert cancellation.requested() is None
    with cancellation.lasting():
        cancellation.request("Ctrl-C while Prefect starts")
        cancellation.begin()
        assert cancellation.requested() == "Ctrl-C while Prefect starts"
    assert cancellation.requested() is None
