"""Starting a run from the command line: check, create or open, start Prefect, work, tell."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console

from pipelines.embedded_server import begin_embedded_server, embedded_server, has_server
from pipelines.json_log import JsonReporter
from pipelines.prefect_settings import apply_defaults
from pipelines.progress import Reporter, reporter_on, use_reporter
from pipelines.runners.reachable import require_cluster
from pipelines.signals import ending_softly
from pipelines.sources import require_source
from pipelines.status import read_status
from pipelines.table import Summary, print_run
from storage_schemas.config import RayRunner, RunConfig
from storage_schemas.errors import NotARun, UnusableStore
from storage_schemas.lease import LeaseHeld, RunLease, read_lease
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import now

__all__ = ["Interrupted", "RunFailed", "launch", "prepare_run", "require_runnable"]

_HEAVY = ("diffem_core.channel", "pipelines.stages")


class RunFailed(RuntimeError):
    """The work failed; what is done stays done."""


class Interrupted(RuntimeError):
    """An end was asked for, and the run is at a resumable point."""


def prepare_run(
    config: RunConfig, url: str, *, take_over: bool, meanwhile: Callable[[], None] = lambda: None
) -> RunStore:
    """Create the run, or open the one that is there.

    Arguments:
        config: The config.
        url: Where the run lives.
        take_over: Whether a lease that seems alive may be taken over.
        meanwhile: Begins what else a run needs, after the quick checks and before the long ones.

    Returns:
        The run.

    Raises:
        ValueError: If the URL holds another run, or something else, or cannot be written.
        LeaseHeld: If another process is writing the run.
    """
    require_source(config.data)
    if config.runner.device.startswith("cuda"):
        from pipelines.build import build_device

        build_device(config.runner)
    if isinstance(config.runner, RayRunner):
        require_cluster(config.runner)
    objects = ObjectStore(url)
    stored = require_runnable(config, objects, meanwhile=meanwhile)
    if stored is None:
        return _create(objects, config)
    if stored.config == config:
        _require_free(objects, take_over)
        return stored
    with RunLease(objects, owner="diffem run", take_over=take_over):
        return RunStore.create(objects, config)


def require_runnable(
    config: RunConfig, objects: ObjectStore, *, meanwhile: Callable[[], None] = lambda: None
) -> RunStore | None:
    """Refuse what could not run there; nothing is written.

    Arguments:
        config: The config.
        objects: Where the run lives, or is to live.
        meanwhile: See `prepare_run`.

    Returns:
        The run that is there with this config; None where there is none yet.

    Raises:
        ValueError: The config describes nothing that can run, or another run is there.
    """
    try:
        stored = RunStore.open(objects)
    except NotARun:
        meanwhile()
        from pipelines.check import check_config

        check_config(config)
        return None
    if stored.config.digest != config.digest:
        RunStore.create(objects, config)  # refuses, with the difference
    return stored


def _create(objects: ObjectStore, config: RunConfig) -> RunStore:
    try:
        return RunStore.create(objects, config)
    except OSError as error:
        raise UnusableStore(
            f"cannot write to {redact_url(objects.url)} ({error}); choose another --store, or "
            f"check "
            "its permissions and the space left"
        ) from error


def _require_free(objects: ObjectStore, take_over: bool) -> None:
    """Refuse a run that is being written before Prefect takes its seconds to start."""
    lease = read_lease(objects)
    if lease is not None and not take_over and not lease.available(now()):
        with RunLease(objects, owner="diffem run"):
            return


def launch(
    config: RunConfig,
    url: str,
    *,
    take_over: bool = False,
    iterations_per_flow_run: int | None = None,
    time_budget: timedelta | None = None,
    json_logs: bool = False,
    show: bool = True,
) -> None:
    """Do what is left of a run, showing progress, and print its table.

    Arguments:
        config: The config.
        url: Where the run lives; it is created if it does not exist.
        take_over: Whether a lease that seems alive may be taken over.
        iterations_per_flow_run: Do at most so many EM iterations.
        time_budget: Begin no EM iteration after this time.
        json_logs: Report progress as one JSON object per line.
        show: Whether the run's table is printed at the end.

    Raises:
        ValueError: If the caller made a mistake.
        LeaseHeld: If another process is writing the run.
        Interrupted: If an end was asked for; the run is at a resumable point.
        RunFailed: If the work failed.
    """
    console = Console(stderr=True)
    apply_defaults()
    store = prepare_run(config, url, take_over=take_over, meanwhile=begin_embedded_server)
    reporter = JsonReporter(console, run=store.config.name) if json_logs else reporter_on(console)
    before = read_status(store)
    if before.state == "complete":
        reporter.note(f"{redact_url(store.url)} is complete; checking its objects")
    done = _work(
        store,
        reporter,
        take_over=take_over,
        iterations_per_flow_run=iterations_per_flow_run,
        time_budget=time_budget,
    )
    if not done.pop("complete"):
        reporter.note(f"stopped: {done['reason']}; the same command goes on")
    del done["reason"]
    if show:
        print_run(read_status(RunStore.open(store.objects)), Summary.model_validate(done))


def _work(store: RunStore, reporter: Reporter, **limits: Any) -> dict[str, Any]:
    begin_embedded_server()
    # It takes seconds to start, in a process of its own: import PyTorch meanwhile.
    preload = threading.Thread(target=_preload, name="diffem-preload", daemon=True)
    preload.start()
    with (
        use_reporter(reporter),
        ending_softly(),
        contextlib.ExitStack() as running,
        contextlib.ExitStack() as starting,
    ):
        starting.enter_context(reporter.stage("starting Prefect and PyTorch", total=None, unit=""))
        import httpx
        from prefect import tags
        from prefect.exceptions import CancelledRun, TerminationSignal
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from pipelines import watching
        from pipelines.flows import em_run

        running.enter_context(_server())
        # Heartbeats tell a server that outlives this process that it is alive; each costs a flow
        # run about a second at its end, for nothing where the server ends with the process.
        beat = watching.HEARTBEAT_SECONDS if has_server() else None
        address = store.address
        name = store.config.name + (" (clean samples)" if store.config.method == "clean" else "")
        run = em_run.with_options(flow_run_name=name, on_running=[lambda *_: starting.close()])
        try:
            with (
                temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: beat}),
                tags(watching.TAG, watching.run_tag(address), store.config.name),
            ):
                done: dict[str, Any] = run(address, **limits)
            return done
        except (ValueError, LeaseHeld):
            raise
        except (CancelledRun, TerminationSignal) as error:
            raise Interrupted(str(error)) from error
        except Exception as error:
            # Stores speak through other libraries than Prefect, so such an error is the server's.
            lost = isinstance(error, httpx.TransportError)
            if lost or "Failed to reach API" in str(error):
                raise RunFailed(
                    f"{error}: no Prefect server answers there; start it (prefect server start), "
                    "or unset PREFECT_API_URL to use the embedded one; what is done stays done, "
                    "and the same command goes on"
                ) from error
            raise RunFailed(
                f"{type(error).__name__}: {error}\nwhat is done stays done; the same command "
                f"resumes {redact_url(store.url)}"
            ) from error


@contextlib.contextmanager
def _server() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(embedded_server())
        except RuntimeError as error:
            raise RunFailed(
                f"Prefect's embedded server did not start ({error}); on a machine that is busy, "
                "give it more time (PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=600), or "
                "start one that stays (prefect server start) and set PREFECT_API_URL"
            ) from error
        yield


def _preload() -> None:
    # An import that fails here fails again, and is heard, where its module is used.
    with contextlib.suppress(Exception):
        for name in _HEAVY:
            importlib.import_module(name)
