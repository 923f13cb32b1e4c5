"""One writer per run: a lease with owner, heartbeat and expiry.

    lease/000001.json      the first holder; only it writes this file
    lease/000002.json      whoever came after it

The holder of the highest number has the lease, unless that file says `released`. To acquire is to
create the next number, create-only: of all who try at one instant, one succeeds, on every file
system and object store, also when they take over a dead owner's lease (a single `lease.json` would
need a compare-and-swap for that). A holder that finds a higher number than its own has lost.

A lease can be taken over when its owner's process is known to be dead (same machine, same process
namespace, and no process of that id and start time), when its last heartbeat is older than its
expiry, or by force. Clocks of different machines may differ by less than the expiry.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat

from storage_schemas._base import Record
from storage_schemas.documents import create_json, read_json, write_json
from storage_schemas.errors import DamageError
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.stage_folder import now

__all__ = ["LeaseHeld", "LeaseLost", "LeaseRecord", "RunLease", "held_elsewhere", "read_lease"]

FOLDER = "lease"
_TIME = "%Y-%m-%d %H:%M:%S UTC"


class LeaseHeld(RuntimeError):
    """Another process is writing the run."""


class LeaseLost(RuntimeError):
    """This process no longer holds the run's lease and must not write."""


class LeaseRecord(Record):
    """Who holds, or held, the lease."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    number: NonNegativeInt
    """Number of the holder."""
    owner: str
    """Who, in words."""
    host: str
    """Machine."""
    machine: str
    """Boot and process namespace in which `pid` means something; empty if unknown."""
    pid: NonNegativeInt
    """Process."""
    pid_started: str
    """Start of the process, as the kernel tells it; empty if unknown."""
    acquired: datetime
    """When it was acquired."""
    heartbeat: datetime
    """When the owner last said that it was alive."""
    expires_seconds: PositiveFloat
    """Age of the heartbeat from which the lease may be taken over."""
    released: bool = False
    """Whether the owner is done."""

    def available(self, at: datetime) -> bool:
        """Tell whether the lease may be acquired by another."""
        return self.released or self.age(at) > self.expires_seconds or self.owner_is_dead()

    def age(self, at: datetime) -> float:
        """Return the seconds since the last heartbeat."""
        return (at - self.heartbeat).total_seconds()

    def is_this_process(self) -> bool:
        """Tell whether this very process acquired the lease."""
        here = (platform.node(), _machine(), os.getpid(), _process_start(os.getpid()))
        return here == (self.host, self.machine, self.pid, self.pid_started)

    def owner_is_dead(self) -> bool:
        """Tell whether the owner's process is known to have ended."""
        if not self.machine or (self.host, self.machine) != (platform.node(), _machine()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it lives, and is another user's
        started = _process_start(self.pid)
        return bool(self.pid_started) and bool(started) and started != self.pid_started


class RunLease:
    """The right to write a run; a context manager.

    Arguments:
        objects: The run's store; the run itself need not exist yet.
        owner: Who asks, in words.
        take_over: Take the lease from whoever holds it.
        expires_seconds: Age of the heartbeat from which others may take over.
        heartbeat_seconds: Time between heartbeats; a sixth of the expiry by default.

    Raises:
        LeaseHeld: On entering, if another process holds the lease.
    """

    def __init__(
        self,
        objects: ObjectStore,
        *,
        owner: str = "diffem",
        take_over: bool = False,
        expires_seconds: float = 60.0,
        heartbeat_seconds: float | None = None,
    ) -> None:
        self._objects = objects
        self._owner = owner
        self._take_over = take_over
        self._expires = expires_seconds
        self._interval = heartbeat_seconds or expires_seconds / 6
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._record: LeaseRecord | None = None
        self._alive_at = 0.0
        self._lost: str | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Acquire the lease and begin to renew it."""
        while True:
            # The number is that of the very record that was judged: a holder that came in between
            # has it already, and creating it fails.
            current = _highest(self._objects)
            if current and not self._take_over:
                self._require_available(current)
            number = current + 1
            began = time.monotonic()
            record = self._new_record(number)
            try:
                create_json(self._objects, _name(number), record)
            except FileExistsError:
                self._take_over = False  # someone was quicker: that one is not to be pushed out
                continue
            break
        self._record, self._alive_at = record, began
        for older in _numbers(self._objects):
            if older < number:
                self._objects.delete(_name(older))
        self._thread = threading.Thread(target=self._renew, name="diffem-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing, and leave the lease to the next, if it is still held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        record, self._record = self._record, None
        if record is not None and _highest(self._objects) == record.number:
            done = record.model_copy(update={"released": True, "heartbeat": now()})
            write_json(self._objects, _name(record.number), done)

    def check(self) -> None:
        """Raise LeaseLost unless the lease is held, as the store says now."""
        if self._record is None:
            raise LeaseLost("the run's lease is not held; enter RunLease first")
        # A request that fails here says nothing about the lease; its age does.
        with contextlib.suppress(Exception):
            if self._lost is None and _highest(self._objects) != self._record.number:
                self._lost = self._taken()
        if self._lost is None and time.monotonic() - self._alive_at > self._expires:
            self._lost = (
                f"the lease of {self._objects!r} could not be renewed for {self._expires:g} s: it "
                "has expired"
            )
        if self._lost is not None:
            raise LeaseLost(f"{self._lost}; this process stops writing, run it again to resume")

    def _require_available(self, number: int) -> None:
        try:
            record = read_json(self._objects, _name(number), LeaseRecord)
        except DamageError as error:
            raise LeaseHeld(
                f"{error}; whoever holds this run's lease cannot be told: make sure that nothing "
                "writes the run, then use --take-over"
            ) from error
        if record is not None and not record.available(now()):
            raise LeaseHeld(_held_message(self._objects, record))

    def _renew(self) -> None:
        assert self._record is not None
        while not self._stop.wait(self._interval):
            began = time.monotonic()
            # A request may fail; the next one is due before the lease expires.
            with contextlib.suppress(Exception):
                if _highest(self._objects) != self._record.number:
                    self._lost = self._taken()
                    return
                beat = self._record.model_copy(update={"heartbeat": now()})
                write_json(self._objects, _name(beat.number), beat)
                self._alive_at = began

    def _new_record(self, number: int) -> LeaseRecord:
        at = now()
        return LeaseRecord(
            number=number,
            owner=self._owner,
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            pid_started=_process_start(os.getpid()),
            acquired=at,
            heartbeat=at,
            expires_seconds=self._expires,
        )

    def _taken(self) -> str:
        with contextlib.suppress(Exception):
            if (record := read_lease(self._objects)) is not None:
                return (
                    f"the lease of {self._objects!r} was taken over by {record.owner} "
                    f"(process {record.pid} on {record.host}) at {record.acquired:{_TIME}}"
                )
        return f"the lease of {self._objects!r} was taken over"


def read_lease(objects: ObjectStore) -> LeaseRecord | None:
    """Return who holds, or last held, the lease; None if nobody did or it cannot be read."""
    number = _highest(objects)
    if number == 0:
        return None
    try:
        return read_json(objects, _name(number), LeaseRecord)
    except DamageError:
        return None


def held_elsewhere(objects: ObjectStore) -> bool:
    """Tell whether another process holds the lease."""
    record = read_lease(objects)
    return record is not None and not record.available(now()) and not record.is_this_process()


def _highest(objects: ObjectStore) -> int:
    return max(_numbers(objects), default=0)


def _numbers(objects: ObjectStore) -> list[int]:
    names = (name.removesuffix(".json") for name in objects.children(FOLDER))
    return [int(name) for name in names if name.isdecimal()]


def _name(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _held_message(objects: ObjectStore, record: LeaseRecord) -> str:
    left = max(0.0, record.expires_seconds - record.age(now()))
    return (
        f"{redact_url(objects.url)} is being written by {record.owner} (process {record.pid} on "
        f"{record.host}) since {record.acquired:{_TIME}}, last heard of "
        f"{max(0.0, record.age(now())):.0f} s ago; wait for it, or stop it. If it is dead, its "
        f"lease ends in {left:.0f} s, or at once with --take-over"
    )


def _machine() -> str:
    """Name the boot and the process namespace: within them a process id and start are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""  # no /proc: other processes' deaths cannot be told, the lease has to expire


def _process_start(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # Fields follow the command's closing parenthesis, which may itself hold any character.
    return stat.rpartition(")")[2].split()[19]
