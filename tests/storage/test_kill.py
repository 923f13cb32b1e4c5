"""A writer is killed at random instants: what is there is whole, and it can be resumed."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.storage.tiny_run import results, resume_run

KILLS = 30

# A process of the fork server has everything imported: a kill lands in the writing, not before.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["zarr", "safetensors.numpy", "tests.storage.tiny_run"])


def write(url: str) -> None:
    os.fsync = lambda _: None
    resume_run(url)


def run_and_kill(url: str, seconds: float | None) -> float | None:
    """Resume the run in another process, kill it after some seconds; return how long it took."""
    process = _CONTEXT.Process(target=write, args=(url,))
    process.start()
    began = time.monotonic()
    process.join(60 if seconds is None else seconds)
    process.kill()
    process.join(60)
    return time.monotonic() - began if process.exitcode == 0 else None


def test_killed_writers_leave_nothing_wrong(tmp_path: Path) -> None:
    expected = results(resume_run(str(tmp_path / "whole")).objects)
    run_and_kill(str(tmp_path / "warm"), None)
    duration = run_and_kill(str(tmp_path / "timed"), None)
    assert duration is not None
    rng = np.random.default_rng(0)
    killed = begun = 0
    for attempt, share in enumerate(rng.uniform(0, 0.9, KILLS)):
        url = str(tmp_path / str(attempt))
        killed += run_and_kill(url, share * duration) is None
        objects = ObjectStore(url)
        # Every object under its final name is whole; what is torn has another name.
        for path, data in results(objects).items():
            assert data == expected[path], path
        if objects.exists("run.json"):
            begun += 1
            report = verify(url)
            assert (report.missing, report.damaged) == ((), ())
            assert {fault.path for fault in report.orphaned} == set(objects.partials())
        assert results(resume_run(url).objects) == expected
        assert verify(url).ok
    # Most instants fall into the writing, on a machine of any speed.
    assert killed >= KILLS // 2
    assert begun >= KILLS // 3


@pytest.mark.parametrize("step", range(0, 60, 7))
def test_a_writer_that_stops_after_any_object_is_resumed(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without chance: the n-th writing of an object fails, for n over the whole run."""
    expected = results(resume_run(str(tmp_path / "whole")).objects)
    count = 0
    write, create = ObjectStore.write, ObjectStore.create

    def counted(self: ObjectStore, path: str, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > step:
            raise KeyboardInterrupt
        (create if path.endswith(("iteration.json", "start.json", "run.json")) else write)(
            self, path, data
        )

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write", counted)
        patch.setattr(ObjectStore, "create", counted)
        with pytest.raises(KeyboardInterrupt):
            resume_run(str(tmp_path / "run"))
    report = verify(str(tmp_path / "run")) if step else None
    assert report is None or report.ok
    assert results(resume_run(str(tmp_path / "run")).objects) == expected


def test_a_resumed_run_writes_only_what_was_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = resume_run(str(tmp_path / "run"))
    written: list[str] = []

    def recorded(self: ObjectStore, path: str, data: bytes) -> None:
        written.append(path)

    monkeypatch.setattr(ObjectStore, "write", recorded)
    monkeypatch.setattr(ObjectStore, "create", recorded)
    resume_run(store.url)
    assert written == []
    RunStore.open(store.url).tidy()
    assert written == []
