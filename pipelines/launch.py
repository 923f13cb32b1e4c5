"""Starting a run from the command line: check, create or open, start Prefect, work, tell."""

from __future__ import annotations

import contextlib
import importlib
import threading
from pathlib import Path

from rich.console import Console

from pipelines.prefect_settings import apply_defaults, has_server
from pipelines.progress import LineReporter, Reporter, TerminalReporter, use_reporter
from pipelines.sources import require_source
from pipelines.status import read_status
from pipelines.table import Summary, print_run
from storage_schemas.config import RunConfig
from storage_schemas.errors import NotARun, UnusableStore
from storage_schemas.lease import LeaseHeld, RunLease, read_lease
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import now

__all__ = ["RunFailed", "launch", "prepare_run"]

_HEAVY = ("diffem_core.channel", "pipelines.stages")


class RunFailed(RuntimeError):
    """The work failed; what is done stays done."""


def prepare_run(config: RunConfig, url: str, *, take_over: bool) -> RunStore:
    """Create the run, or open the one that is there, before anything is started.

    Arguments:
        config: The config.
        url: Where the run lives.
        take_over: Whether a lease that seems alive may be taken over.

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
    objects = ObjectStore(url)
    try:
        stored = RunStore.open(objects)
    except NotARun:
        from pipelines.check import check_config

        check_config(config)
        return _create(objects, config)
    if stored.config == config:
        _require_free(objects, take_over)
        return stored
    if stored.config.digest != config.digest:
        return RunStore.create(objects, config)  # refuses, with the difference
    with RunLease(objects, owner="diffem run", take_over=take_over):
        return RunStore.create(objects, config)


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


def launch(config: RunConfig, url: str, *, take_over: bool = False) -> None:
    """Do what is left of a run, showing progress, and print its table.

    Arguments:
        config: The config.
        url: Where the run lives; it is created if it does not exist.
        take_over: Whether a lease that seems alive may be taken over.

    Raises:
        ValueError: If the caller made a mistake.
        LeaseHeld: If another process is writing the run.
        RunFailed: If the work failed.
    """
    console = Console(stderr=True)
    store = prepare_run(config, url, take_over=take_over)
    before = read_status(store)
    if before.state == "complete":
        console.print(
            f"{redact_url(store.url)} is complete; checking its objects", highlight=False
        )
    summary = _work(store, console, take_over=take_over)
    print_run(read_status(RunStore.open(store.objects)), summary)


def _work(store: RunStore, console: Console, *, take_over: bool) -> Summary:
    reporter: Reporter = (
        TerminalReporter(console) if console.is_terminal else LineReporter(console)
    )
    apply_defaults()
    # The embedded server takes seconds to start, in a process of its own: import PyTorch
    # meanwhile.
    preload = threading.Thread(target=_preload, name="diffem-preload", daemon=True)
    preload.start()
    with use_reporter(reporter), contextlib.ExitStack() as starting:
        starting.enter_context(reporter.stage("starting Prefect and PyTorch", total=None, unit=""))
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from pipelines.flows import em_run

        # Heartbeats tell a server that outlives this process that it is alive; each costs a flow
        # run about a second at its end, for nothing where the server ends with the process.
        settings = {} if has_server() else {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        run = em_run.with_options(
            flow_run_name=store.config.name,
            on_running=[lambda *_: starting.close()],
        )
        if (folder := _result_folder(store)) is not None:
            run = run.with_options(result_storage=folder)
        try:
            with temporary_settings(settings):
                return Summary.model_validate(run(_address(store), take_over=take_over))
        except (ValueError, LeaseHeld):
            raise
        except Exception as error:
            if "Failed to reach API" in str(error):
                raise RunFailed(
                    f"{error}: no Prefect server answers there; start it (prefect server start), "
                    "or unset PREFECT_API_URL to use the embedded one"
                ) from error
            raise RunFailed(
                f"{type(error).__name__}: {error}\nwhat is done stays done; the same command "
                f"resumes {redact_url(store.url)}"
            ) from error


def _preload() -> None:
    # An import that fails here fails again, and is heard, where its module is used.
    with contextlib.suppress(Exception):
        for name in _HEAVY:
            importlib.import_module(name)


def _address(store: RunStore) -> str:
    """Return what opens the run from any folder: it is a parameter of the flow."""
    local = store.objects.local_path
    return store.url if local is None else str(Path(local).resolve())


def _result_folder(store: RunStore) -> Path | None:
    """Keep Prefect's records of stages beside a local run, so that they go where it goes."""
    local = store.objects.local_path
    return None if local is None else Path(local).resolve() / "prefect"
