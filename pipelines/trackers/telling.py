"""What trackers are told, and when."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

from pipelines.progress import reporter
from storage_schemas.config import MlflowTracker, TensorboardTracker, TrackerConfig, WandbTracker
from storage_schemas.manifests import IterationManifest, PriorManifest, StartManifest
from storage_schemas.redaction import without_secrets
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import StageFolder

__all__ = ["Identity", "Told", "Tracker", "told_of", "tracking"]

PICTURE = "preview.png"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A run, for a tracker."""

    name: str
    """Name of the run."""
    key: str
    """The name with the beginning of the config's digest: runs of one key have equal numbers."""
    config: dict[str, Any]
    """The config, every default filled in."""

    @classmethod
    def of(cls, store: RunStore) -> Identity:
        """Read a run's identity."""
        config = store.config
        return cls(
            name=config.name,
            key=f"{config.name}-{store.manifest.config_digest[:8]}",
            config=config.model_dump(mode="json"),
        )


@dataclass(frozen=True, kw_only=True)
class Told:
    """A commit, for a tracker."""

    key: str
    """`start`, `000`, ..., `prior`."""
    step: int
    """EM iteration; -1 for the start."""
    values: dict[str, float]
    """Numbers by name; those of the prior begin with `prior/`, times with `seconds/`."""
    picture: bytes | None
    """A picture, as PNG."""
    finished: float
    """When it was committed, in seconds since 1970."""


class Tracker(Protocol):
    """One tracker."""

    def known(self) -> set[str]:
        """Return the keys of the commits that it has."""
        ...

    def tell(self, told: Told) -> None:
        """Give it a commit; a second time changes nothing."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


@contextmanager
def tracking(store: RunStore) -> Iterator[Callable[[], None]]:
    """Connect a run with the trackers of its config.

    Arguments:
        store: The run.

    Yields:
        A function that tells every tracker of the commits that it does not know yet. It raises
        nothing; what goes wrong is a line in the log.
    """
    followers = [_Follower(config, Identity.of(store)) for config in store.config.trackers]

    def track() -> None:
        for follower in followers:
            follower.follow(store)

    try:
        yield track
    finally:
        for follower in followers:
            follower.close()


class _Follower:
    """A tracker that is opened when it is first told something, and whose faults are not ours."""

    def __init__(self, config: TrackerConfig, identity: Identity) -> None:
        self._config = config
        self._identity = identity
        self._tracker: Tracker | None = None
        self._known: set[str] = set()
        self._missing = False

    def follow(self, store: RunStore) -> None:
        if self._missing:
            return
        try:
            if self._tracker is None:
                self._tracker = _opened(self._config, self._identity)
                self._known = self._tracker.known()
            for key, read in told_of(store):
                if key not in self._known:
                    self._tracker.tell(read())
                    self._known.add(key)
        except ImportError as error:
            self._missing = True
            self._warn(f"{error}; pip install 'diffem[trackers]'")
        except Exception as error:  # whatever a tracker does, the run goes on
            self._warn(f"{type(error).__name__}: {error}")
            self.close()

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with suppress(Exception):  # it has been told, or a warning has been given
                tracker.close()

    def _warn(self, text: str) -> None:
        shown = " ".join(without_secrets(text).split())
        reporter().note(f"warning: the tracker {self._config.kind} was not told: {shown}")


def _opened(config: TrackerConfig, identity: Identity) -> Tracker:
    match config:
        case TensorboardTracker():
            from pipelines.trackers.tensorboard import Tensorboard

            return Tensorboard(config, identity)
        case MlflowTracker():
            from pipelines.trackers.mlflow import Mlflow

            return Mlflow(config, identity)
        case WandbTracker():
            from pipelines.trackers.wandb import Wandb

            return Wandb(config, identity)
    assert_never(config)


def told_of(store: RunStore) -> Iterator[tuple[str, Callable[[], Told]]]:
    """Yield the key of each commit of a run, in order, with what reads it."""
    begun = store.start().manifest()
    if begun is not None:
        yield "start", functools.partial(_told, "start", -1, begun, store.start())
    for done in store.completed():
        folder = store.iteration(done.iteration)
        key = f"{done.iteration:03d}"
        yield key, functools.partial(_told, key, done.iteration, done, folder)
    ended = None if store.config.prior is None else store.prior().manifest()
    if ended is not None:
        yield "prior", functools.partial(_told, "prior", ended.iteration, ended, store.prior())


def _told(
    key: str,
    step: int,
    manifest: StartManifest | IterationManifest | PriorManifest,
    folder: StageFolder,
) -> Told:
    prefix = "prior/" if key == "prior" else ""
    metrics = {} if manifest.metrics is None else manifest.metrics.values
    values = {name: m.value for name, m in metrics.items() if m.value is not None}
    values |= {f"seconds/{name}": stage.seconds for name, stage in manifest.stages.items()}
    return Told(
        key=key,
        step=step,
        values={f"{prefix}{name}": value for name, value in values.items()},
        picture=folder.read_bytes(PICTURE) if PICTURE in manifest.objects else None,
        finished=manifest.finished.timestamp(),
    )
