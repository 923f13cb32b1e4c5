"""All stages of a process compute in one thread, whoever asks for them."""

from __future__ import annotations

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines import cancellation, stages
from pipelines.runners.devices import open_devices
from pipelines.runners.work_thread import WorkThread
from storage_schemas.config import LocalRunner

CONTEXT: contextvars.ContextVar[str] = contextvars.ContextVar("CONTEXT", default="nobody")


def test_stages_of_a_pool_of_one_run_in_one_thread_in_their_callers_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, str]] = []

    def stage(caller: str) -> str:
        seen.append((threading.get_ident(), CONTEXT.get()))
        return caller

    def ask(caller: str) -> str:
        CONTEXT.set(caller)
        with ThreadPoolExecutor(1) as one:  # as each flow run of Prefect has its own
            context = contextvars.copy_context()
            found: str = one.submit(context.run, pool.call, "is_done", caller).result()
            return found

    monkeypatch.setattr(stages, "is_done", stage)
    with open_devices(LocalRunner(device="cpu", workers=1)) as pool:
        assert [ask(caller) for caller in "abc"] == ["a", "b", "c"]
        assert pool.call("is_done", "d") == "d"
    threads, contexts = zip(*seen, strict=True)
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    assert contexts[:3] == ("a", "b", "c")


def test_what_a_stage_raises_is_raised_whatever_it_is() -> None:
    thread = WorkThread()

    def fails(error: BaseException) -> None:
        raise error

    for error in (ValueError("no"), cancellation.Cancelled("an end was asked for")):
        with pytest.raises(type(error), match=str(error)):
            thread.call(fails, error)
    assert thread.call(lambda: 3) == 3
    thread.close()


def test_a_thread_that_was_closed_cancels() -> None:
    thread = WorkThread()
    thread.close()
    with pytest.raises(cancellation.Cancelled, match="devices were closed"):
        thread.call(threading.get_ident)


def test_a_stage_may_ask_for_another_one() -> None:
    thread = WorkThread()
    assert thread.call(lambda: thread.call(threading.get_ident)) == thread.call(
        threading.get_ident
    )
    thread.close()
