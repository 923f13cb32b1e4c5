"""Two processes are started on one run at one instant: one works, the other says who does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from storage_schemas.lease import read_lease
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.faults.cli import results_at, run_command
from tests.storage.servers import Server, reached
from tests.storage.tiny_run import make_config, results, resume_run

# The winner holds the lease until the other has been judged: both are there at one time for sure.
WORK = """
import os, sys, time
os.fsync = lambda _: None
import zarr, safetensors.numpy
from storage_schemas.lease import LeaseHeld, RunLease
from storage_schemas.objects import ObjectStore
from tests.storage.tiny_run import resume_run
if "://" in sys.argv[1]:
    ObjectStore(sys.argv[1]).list()
for line in sys.stdin:
    url, instant = line.split()
    time.sleep(max(0.0, float(instant) - time.time()))
    try:
        with RunLease(ObjectStore(url), owner=f"worker {os.getpid()}") as lease:
            resume_run(url)
            lease.check()
            print("worked", flush=True)
            sys.stdin.readline()
    except LeaseHeld as error:
        print(f"refused {error}", flush=True)
        sys.stdin.readline()
    print("done", flush=True)
"""


class Worker:
    """A process that starts on a run when it is told to."""

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORK, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def start_together(place: str, times: int, expected: dict[str, bytes]) -> None:
    import time

    workers = [Worker(place), Worker(place)]
    winners = set()
    try:
        for attempt in range(times):
            url = f"{place}/{attempt}"
            instant = time.time() + (3.0 if attempt == 0 else 0.05)
            for worker in workers:
                worker.say(f"{url} {instant}")
            answers = [worker.hear() for worker in workers]
            worked = [number for number, answer in enumerate(answers) if answer == "worked"]
            assert len(worked) == 1, answers
            winner = workers[worked[0]].process.pid
            winners.add(winner)
            said = answers[1 - worked[0]]
            assert re.match(
                rf"refused .* is being written by worker {winner} \(process {winner} on", said
            ), said
            for worker in workers:
                worker.say("end")
                assert worker.hear() == "done"
            objects = ObjectStore(url)
            assert results(objects) == expected
            report = verify(RunStore.open(objects))
            assert report.ok, report
            record = read_lease(objects)
            assert record is not None
            assert (record.pid, record.released) == (winner, True)
            assert objects.partials() == []
    finally:
        for worker in workers:
            worker.end()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return results(resume_run(str(tmp_path_factory.mktemp("whole") / "run")).objects)


def test_two_starts_on_a_disk(tmp_path: Path, expected: dict[str, bytes]) -> None:
    start_together(str(tmp_path), 20, expected)


@pytest.mark.slow
def test_two_starts_in_a_bucket(moto: Server, expected: dict[str, bytes]) -> None:
    with reached(moto):
        start_together(moto.url("two"), 5, expected)


def test_two_processes_create_one_run(tmp_path: Path) -> None:
    """`run.json` itself: both may write it, one does, and the other opens that one."""
    first = RunStore.create(str(tmp_path), make_config())
    second = RunStore.create(str(tmp_path), make_config())
    assert second.manifest == first.manifest


@pytest.mark.slow
def test_two_commands_at_one_instant(
    home: dict[str, str],
    tiny_config: Path,
    undisturbed_run: dict[str, str],
    tmp_path: Path,
) -> None:
    url = str(tmp_path / "run")
    commands = [
        subprocess.Popen(
            run_command(tiny_config, url, "--set", "m_step.checkpoint_seconds=60"),
            env={**os.environ, **home},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [command.communicate(timeout=200) for command in commands]
    statuses = [command.returncode for command in commands]
    assert sorted(statuses) == [0, 2], outputs
    refused, worked = statuses.index(2), statuses.index(0)
    assert f"is being written by diffem run (process {commands[worked].pid}" in outputs[refused][1]
    assert "Traceback" not in outputs[refused][1]
    assert results_at(url) == undisturbed_run
    assert verify(url).ok
