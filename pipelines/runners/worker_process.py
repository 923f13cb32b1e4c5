"""A worker process as its parent sees it: starting it, having a stage done, ending it.

Messages on the pipe, JSON both ways:

    to the worker      {"stage": ..., "args": [...], "threads": ...}
                       {"cancel": reason}   {"close": reason}
    from the worker    {"opened": number, "name": ..., "total": ..., "unit": ..., "done": ...}
                       {"advanced": number, "items": ...}   {"closed": number}   {"note": text}
    its last of a call {"result": ...}   {"error": ...}   {"cancelled": reason}
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines import cancellation
from pipelines.progress import Advance, reporter
from pipelines.runners.devices import GRACE_SECONDS, Device, WorkerDied
from pipelines.runners.remote_errors import decode_error

__all__ = ["WorkerProcess"]

_MODULE = "pipelines.runners.worker"
_POLL_SECONDS = 0.1


class _PipeClosed(Exception):
    """The worker is gone, or going: not to be mixed up with connections that a stage lost."""


class WorkerProcess:
    """A process that is bound to a device.

    It is started by its parent's thread that lasts longest: Linux ends a process with the
    *thread* that started it.

    Arguments:
        number: Number of the worker, from 0.
        device: What it works on.
    """

    def __init__(self, number: int, device: Device) -> None:
        self.name = f"worker {number} ({device.name})"
        self._device = device
        self._sending = threading.Lock()
        self._calling = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        # As in a process that multiprocessing spawns, what this one can import the worker can.
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno()), str(os.getpid())],
            env={**os.environ, "PYTHONPATH": paths, **self._device.environment},
            stdin=subprocess.DEVNULL,
            stdout=2,  # What a library prints must not get into the output of a command.
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def restart(self) -> None:
        """Put a new process in the place of one that has ended."""
        self._pipe.close()
        self._start()

    def call(self, stage: str, args: Sequence[Any], threads: int | None = None) -> Any:
        """Have a stage done and wait for it, reporting its progress to this process's reporter.

        Arguments:
            stage: Name of a function in `pipelines.stages`.
            args: Its arguments, JSON.
            threads: Processor threads that it may use; the worker's share by default.

        Returns:
            What it returns, JSON.

        Raises:
            Cancelled: An end was asked for and the stage stopped at a resumable point.
            WorkerDied: The process has ended.
            BaseException: What the stage raised, with its trace as a note; or what was raised in
                this thread while it waited, in which case the worker is ended.
        """
        with self._calling:
            try:
                reply = self._converse({"stage": stage, "args": list(args), "threads": threads})
            except _PipeClosed as error:
                raise WorkerDied(
                    f"{self.name} {self._ending()} while it did {stage}; other shards are not "
                    "touched and a new worker takes its place: run the stage again (if the "
                    "system's log says that memory was short, lower e_step.batch_size)"
                ) from error
        return reply["result"]

    def _converse(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and pass on what the worker reports until it answers."""
        told = False
        with _Reports() as reports:
            try:
                self._send(request)
                while True:
                    reason = cancellation.requested()
                    if reason is not None and not told:
                        self._send({"cancel": reason})
                        told = True
                    message = self._receive()
                    if message is not None and not reports.pass_on(message):
                        break
            except BaseException:
                self.end(time.monotonic() + GRACE_SECONDS)
                raise
            if "cancelled" in message:
                raise cancellation.Cancelled(message["cancelled"])
            if "error" in message:
                raise decode_error(message["error"], self.name)
        return message

    def ask_to_end(self) -> None:
        """Ask the process to end at its next resumable point."""
        with contextlib.suppress(_PipeClosed):
            self._send({"close": "the worker was asked to end"})

    def end(self, deadline: float) -> None:
        """Ask the process to end, wait until `deadline` (of `time.monotonic`), then kill it."""
        self.ask_to_end()
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._process.kill()  # Does nothing to a process that has ended.
            self._process.wait()

    def close(self) -> None:
        """Let go of the pipe of a process that has ended."""
        with self._calling:
            self._pipe.close()

    def _send(self, message: dict[str, Any]) -> None:
        encoded = json.dumps(message).encode()
        try:
            with self._sending:
                self._pipe.send_bytes(encoded)
        except OSError as error:
            raise _PipeClosed from error

    def _receive(self) -> dict[str, Any] | None:
        """Return the next message; None if there is none for a while."""
        try:
            if not self._pipe.poll(_POLL_SECONDS):
                return None
            message: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise _PipeClosed from error
        return message

    def _ending(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit status {code}"
        return f"was ended by {signal.Signals(-code).name}"


class _Reports:
    """What a worker reports during a call, passed on to this process's reporter.

    An error passes through the stages that it ended, as if they had been opened here.
    """

    def __init__(self) -> None:
        self._open: dict[int, tuple[AbstractContextManager[Advance], Advance]] = {}

    def pass_on(self, message: dict[str, Any]) -> bool:
        """Pass a report on; return False if the message is none."""
        match message:
            case {"opened": number, "name": name, **shown}:
                stage = reporter().stage(name, **shown)
                self._open[number] = stage, stage.__enter__()
            case {"advanced": number, "items": items}:
                self._open[number][1](items)
            case {"closed": number}:
                self._open.pop(number)[0].__exit__(None, None, None)
            case {"note": text}:
                reporter().note(text)
            case _:
                return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stages = contextlib.ExitStack()
        for stage, _ in self._open.values():
            stages.push(stage)
        stages.__exit__(kind, error, trace)
