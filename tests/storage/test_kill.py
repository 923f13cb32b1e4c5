"""A writer is killed at random instants: what is there is whole, and it can be resumed."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.storage.tiny_run import results, resume_run

WRITE = """
import os, sys
os.fsync = lambda _: None
import zarr, safetensors.numpy
from tests.storage.tiny_run import resume_run
print("ready", flush=True)
resume_run(sys.argv[1])
"""
KILLS = 6


def run_and_kill(url: str, seconds: float | None) -> float | None:
    """Resume the run in another process, kill it after some seconds; return how long it took."""
    run = [sys.executable, "-c", WRITE, url]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait()
    process.stdout.close()
    return time.monotonic() - began if process.returncode == 0 else None


def test_killed_writers_leave_nothing_wrong(tmp_path: Path) -> None:
    expected = results(resume_run(str(tmp_path / "whole")).objects)
    duration = run_and_kill(str(tmp_path / "timed"), None)
    assert duration is not None
    rng = np.random.default_rng(0)
    killed = 0
    for attempt, share in enumerate(rng.uniform(0, 0.7, KILLS)):
        url = str(tmp_path / str(attempt))
        killed += run_and_kill(url, share * duration) is None
        objects = ObjectStore(url)
        # Every object under its final name is whole; what is torn has another name.
        for path, data in results(objects).items():
            assert data == expected[path], path
        if objects.exists("run.json"):
            report = verify(url)
            assert (report.missing, report.damaged) == ((), ())
            assert {fault.path for fault in report.orphaned} == set(objects.partials())
        assert results(resume_run(url).objects) == expected
        assert verify(url).ok
    assert killed > 0


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
