import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from storage_schemas import lease as lease_module
from storage_schemas.documents import read_json, write_json
from storage_schemas.lease import LeaseHeld, LeaseLost, LeaseRecord, RunLease, read_lease
from storage_schemas.objects import ObjectStore

HOLD = """
import sys, time
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore
with RunLease(ObjectStore(sys.argv[1]), owner="other"):
    print("held", flush=True)
    time.sleep(60)
"""


def held_by_another(url: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def change(objects: ObjectStore, number: int, **fields: object) -> None:
    path = f"lease/{number:06d}.json"
    record = read_json(objects, path, LeaseRecord)
    assert record is not None
    write_json(objects, path, record.model_copy(update=fields))


def test_a_lease_passes_from_one_to_the_next(any_url: str) -> None:
    objects = ObjectStore(any_url)
    assert read_lease(objects) is None
    for number in (1, 2, 3):
        with RunLease(objects, owner="first") as lease:
            lease.check()
            record = read_lease(objects)
            assert record is not None
            assert (record.number, record.owner, record.pid) == (number, "first", os.getpid())
            with pytest.raises(LeaseHeld, match=rf"written by first \(process {os.getpid()} on"):
                RunLease(objects).acquire()
            lease.check()
        assert objects.children("lease") == [f"{number:06d}.json"]
        with pytest.raises(LeaseLost, match="not held"):
            lease.check()


def test_a_living_process_is_named(tmp_path: Path) -> None:
    process = held_by_another(str(tmp_path))
    try:
        with pytest.raises(LeaseHeld) as error:
            RunLease(ObjectStore(str(tmp_path))).acquire()
        for part in (f"process {process.pid} on", "since 20", "s ago", "--take-over"):
            assert part in str(error.value)
    finally:
        end(process)


def test_a_dead_owner_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    end(held_by_another(str(tmp_path)))
    with RunLease(ObjectStore(str(tmp_path))) as lease:
        lease.check()


def test_a_process_id_used_again_is_not_its_owner(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    RunLease(objects).acquire()
    change(objects, 1, pid_started="1")
    with RunLease(objects) as lease:
        lease.check()


@pytest.mark.parametrize("fields", [{"host": "elsewhere"}, {"machine": "other boot"}])
def test_a_death_elsewhere_cannot_be_told(fields: dict[str, str], tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    end(held_by_another(str(tmp_path)))
    change(objects, 1, **fields)
    with pytest.raises(LeaseHeld):
        RunLease(objects).acquire()
    record = read_lease(objects)
    assert record is not None
    change(objects, 1, heartbeat=record.heartbeat - timedelta(seconds=61))
    with RunLease(objects) as lease:
        lease.check()


def test_who_loses_the_lease_notices(any_url: str) -> None:
    objects = ObjectStore(any_url)
    first = RunLease(objects, owner="first")
    first.acquire()
    with pytest.raises(LeaseHeld):
        RunLease(objects).acquire()
    with RunLease(objects, owner="second", take_over=True) as second:
        with pytest.raises(LeaseLost, match=r"was taken over by second \(process .*resume"):
            first.check()
        second.check()
        with pytest.raises(LeaseLost):
            first.check()
        first.release()
        assert objects.children("lease") == ["000002.json"]
        second.check()
        record = read_lease(objects)
        assert record is not None
        assert (record.owner, record.released) == ("second", False)


def test_the_heartbeat_itself_notices_the_loss(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    with RunLease(objects, heartbeat_seconds=0.02) as first, RunLease(objects, take_over=True):
        assert first._thread is not None
        first._thread.join(20)
        assert not first._thread.is_alive()
        assert first._lost is not None


@pytest.mark.parametrize("take_over", [False, True])
def test_who_comes_in_between_is_not_pushed_out(
    take_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another acquires after the old lease was judged and before the new one is created."""
    objects = ObjectStore(str(tmp_path))
    with RunLease(objects):
        pass
    other = RunLease(objects, owner="other")
    create = lease_module.create_json

    def with_another_before(*arguments: Any) -> None:
        monkeypatch.setattr(lease_module, "create_json", create)
        other.acquire()
        create(*arguments)

    monkeypatch.setattr(lease_module, "create_json", with_another_before)
    with pytest.raises(LeaseHeld, match="written by other"):
        RunLease(objects, take_over=take_over).acquire()
    other.check()
    other.release()


def test_a_number_is_that_of_the_judged_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = ObjectStore(str(tmp_path))
    with RunLease(objects):
        pass
    other = RunLease(objects, owner="other")
    judge = RunLease._require_available

    def with_another_after(self: RunLease, number: int) -> None:
        judge(self, number)
        monkeypatch.setattr(RunLease, "_require_available", judge)
        other.acquire()

    monkeypatch.setattr(RunLease, "_require_available", with_another_after)
    with pytest.raises(LeaseHeld, match="written by other"):
        RunLease(objects).acquire()
    other.check()
    other.release()


def test_a_heartbeat_renews_and_its_absence_is_noticed(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    with RunLease(objects, expires_seconds=30, heartbeat_seconds=0.02) as lease:
        before = read_lease(objects)
        assert before is not None
        deadline = time.monotonic() + 20
        while (now := read_lease(objects)) is None or now.heartbeat <= before.heartbeat:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        lease.check()
        lease._alive_at -= 31
        lease._stop.set()
        with pytest.raises(LeaseLost, match="could not be renewed for 30 s"):
            lease.check()


def test_a_stopped_process_has_lost_its_lease_when_it_wakes(tmp_path: Path) -> None:
    code = """
import sys
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore
with RunLease(ObjectStore(sys.argv[1]), expires_seconds=0.5) as lease:
    print("held", flush=True)
    sys.stdin.readline()
    lease.check()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.7)
    with RunLease(ObjectStore(str(tmp_path)), owner="next") as lease:
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate("\n", timeout=30)
        assert "LeaseLost" in error
        assert "taken over by next" in error
        lease.check()


def test_a_damaged_record_gives_way_to_force_only(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    objects.write("lease/000004.json", b"torn")
    assert read_lease(objects) is None
    with pytest.raises(LeaseHeld, match=r"cannot be told.*--take-over"):
        RunLease(objects).acquire()
    with RunLease(objects, take_over=True):
        assert objects.children("lease") == ["000005.json"]


def _try(urls: list[str], barrier: Barrier, queue: "Queue[int]") -> None:
    for url in urls:
        lease = RunLease(ObjectStore(url))
        barrier.wait()
        try:
            lease.acquire()
            queue.put(os.getpid())
            barrier.wait()  # hold it until all have tried
            lease.check()
        except LeaseHeld:
            queue.put(0)
            barrier.wait()


@pytest.mark.parametrize("dead_owner", [False, True])
def test_at_one_instant_one_of_many_succeeds(dead_owner: bool, tmp_path: Path) -> None:
    urls = [str(tmp_path / str(attempt)) for attempt in range(5)]
    if dead_owner:
        first = ObjectStore(urls[0])
        end(held_by_another(urls[0]))
        for url in urls[1:]:
            ObjectStore(url).write("lease/000001.json", first.read("lease/000001.json"))
    context = multiprocessing.get_context("forkserver")
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_try, args=(urls, barrier, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    tries = [queue.get(timeout=60) for _ in range(4 * len(urls))]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len([pid for pid in tries if pid]) == len(urls)
