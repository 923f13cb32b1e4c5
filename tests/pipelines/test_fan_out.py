"""Stages side by side outside of a flow: faults are tried again, mistakes end everything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipelines.cancellation import Cancelled
from pipelines.runners import fan_out as module
from pipelines.runners.devices import WorkerDied
from pipelines.runners.fan_out import fan_out


class Pool:
    """Does each call by a function; a call that waits is ended by `close`, as a device's is."""

    here = False
    size = 2

    def __init__(self, work: Callable[[int, int], None]) -> None:
        self.work = work
        self.done: list[int] = []
        self.tries = {0: 0, 1: 0}
        self.closed = threading.Event()

    def call(self, stage: str, *args: Any) -> None:
        assert stage == "draw_shards"
        (number,) = args
        self.tries[number] += 1
        self.work(number, self.tries[number])
        self.done.append(number)

    def close(self) -> None:
        self.closed.set()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES", (0.0,))


def nothing() -> None:
    pass


def test_a_worker_that_dies_is_not_the_end() -> None:
    def work(number: int, tries: int) -> None:
        if number == 1 and tries <= 2:
            raise WorkerDied("worker 1 was ended by SIGKILL")

    pool = Pool(work)
    fan_out(pool, "draw_shards", [(0,), (1,)], retries=2, while_waiting=nothing)
    assert sorted(pool.done) == [0, 1]
    assert pool.tries == {0: 1, 1: 3}
    assert not pool.closed.is_set()


def test_one_that_always_dies_is_told_after_its_repetitions() -> None:
    def work(number: int, tries: int) -> None:
        if number == 1:
            raise WorkerDied(f"ended at try {tries}")

    pool = Pool(work)
    with pytest.raises(WorkerDied, match="try 3"):
        fan_out(pool, "draw_shards", [(0,), (1,)], retries=2, while_waiting=nothing)
    assert pool.closed.is_set()


def test_a_mistake_is_not_tried_again_and_ends_the_others() -> None:
    def work(number: int, tries: int) -> None:
        if number == 1:
            raise ValueError("a mask is missing")
        assert pool.closed.wait(60)
        raise Cancelled("the devices were closed")

    pool = Pool(work)
    with pytest.raises(ValueError, match="mask is missing"):
        fan_out(pool, "draw_shards", [(0,), (1,)], retries=9, while_waiting=nothing)
    assert pool.tries == {0: 1, 1: 1}


def test_a_lease_that_is_lost_ends_all() -> None:
    def work(number: int, tries: int) -> None:
        assert pool.closed.wait(60)
        raise Cancelled("the devices were closed")

    def lost() -> None:
        raise OSError("the lease is lost")

    pool = Pool(work)
    began = time.monotonic()
    with pytest.raises(OSError, match="lease is lost"):
        fan_out(pool, "draw_shards", [(0,), (1,)], retries=9, while_waiting=lost)
    assert time.monotonic() - began < 30
    assert pool.tries == {0: 1, 1: 1}, "it had ended: no call is tried again"
