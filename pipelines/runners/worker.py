"""A worker process: does stages for the process that started it, one after the other.

    python -m pipelines.runners.worker FD PARENT

FD is this end of a socket pair on which JSON messages go to and fro (see `worker_process`), and
PARENT the process number of the parent. The environment has bound the process to its device
before this module was read. It ends when the parent ends, however that comes about: Linux kills it
then, and elsewhere (and besides) it finds the pipe closed. Ctrl-C is the parent's affair, and a
termination signal asks for an end at the next resumable point.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from pipelines import cancellation
from pipelines.progress import Advance, use_reporter
from pipelines.runners.devices import THREADS_VARIABLE, find_stage
from pipelines.runners.remote_errors import encode_error

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


class _Pipe:
    """The worker's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self.calls: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.busy = False

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or end if nobody is there any more to read it."""
        encoded = json.dumps(message).encode()
        try:
            with self._lock:
                self._connection.send_bytes(encoded)
        except OSError:
            os._exit(1)

    def listen(self) -> None:
        """Take what the parent says, also while a stage runs; end when the parent has ended."""
        while True:
            try:
                message = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(1)
            match message:
                case {"cancel": reason}:
                    cancellation.request(reason)
                case {"close": reason}:
                    if not self.busy:
                        os._exit(0)
                    cancellation.request(reason)
                    self.calls.put(None)
                case _:
                    # No stage is running: a request that is still there was for an earlier one.
                    cancellation.allow()
                    self.busy = True
                    self.calls.put(message)


class _PipeReporter:
    """Reports to the parent's reporter. A stage that fails is closed there by its error."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Advance]:
        """Open a stage at the parent's reporter and tell it of every advance."""
        number = next(self._numbers)
        opened = {"name": name, "total": total, "unit": unit, "done": done}
        self._pipe.send({"opened": number, **opened})
        yield lambda items: self._pipe.send({"advanced": number, "items": items})
        self._pipe.send({"closed": number})

    def note(self, text: str) -> None:
        """Have one line printed."""
        self._pipe.send({"note": text})


def main() -> None:
    """Work until the parent closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: cancellation.request("the worker was terminated"))
    descriptor, parent = map(int, sys.argv[1:3])
    _end_with(parent)
    pipe = _Pipe(Connection(descriptor))
    threading.Thread(target=pipe.listen, name="diffem-parent", daemon=True).start()
    # An import that fails here fails again in a stage, which tells the parent.
    with contextlib.suppress(Exception):
        importlib.import_module("pipelines.stages")
    share = os.environ.get(THREADS_VARIABLE, "")
    with use_reporter(_PipeReporter(pipe)):
        while (call := pipe.calls.get()) is not None:
            pipe.send(_answer(call, share))
            pipe.busy = False


def _answer(call: dict[str, Any], share: str) -> dict[str, Any]:
    """Do a stage, with the threads that it may use or this worker's share; say how it ended."""
    os.environ[THREADS_VARIABLE] = str(call["threads"] or share)
    try:
        stage = find_stage(call["stage"])
        cancellation.check()
        result = stage(*call["args"])
        json.dumps(result)  # One that is no JSON is an error of the stage.
        return {"result": result}
    except cancellation.Cancelled as cancelled:
        return {"cancelled": str(cancelled)}
    except BaseException as error:
        return {"error": encode_error(error)}
    finally:
        _give_memory_back()


def _give_memory_back() -> None:
    """Leave the GPU's memory to others while this process has nothing to do."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _end_with(parent: int) -> None:
    """Be killed as soon as the parent ends, where the system knows how to."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It ended before it could be watched.
        os._exit(1)


if __name__ == "__main__":
    main()
