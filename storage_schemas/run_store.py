"""A run, at any fsspec URL: created or opened, its observations, start and iterations.

    run.json                    config, provenance; create-only
    observations.zarr, .json    observations, sealed by the JSON
    generations/001/ ...        observations that came later (`generations`)
    start/                      what makes the first reconstructions
    iterations/000/ ...         EM iterations
    prior/                      the model of clean data alone, where one is wanted
    lease/                      who is writing (`lease`)

Nothing here imports Zarr or xarray before an array is touched, so that `diffem status` is quick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from storage_schemas.config import RunConfig, StoreData
from storage_schemas.documents import create_json, decode_json, read_json, write_json
from storage_schemas.errors import (
    ConfigMismatch,
    DamageError,
    NotARun,
    SchemaMismatch,
    UnusableStore,
)
from storage_schemas.generations import GrownObservations, generation_store, read_generations
from storage_schemas.integrity import is_whole
from storage_schemas.iteration_store import IterationStore
from storage_schemas.lease import held_elsewhere
from storage_schemas.manifests import (
    IterationManifest,
    ObservationsManifest,
    Provenance,
    RunManifest,
    StartManifest,
    StopRecord,
)
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.observations import (
    FOLDER,
    ObservationBlock,
    Observations,
    Split,
    read_seal,
    write_observations,
)
from storage_schemas.prior_store import PriorStore
from storage_schemas.provenance import collect_provenance
from storage_schemas.reconstructions import COMMIT
from storage_schemas.start_store import StartStore

if TYPE_CHECKING:
    from storage_schemas.verify import VerifyReport

__all__ = ["RunStore", "config_differences"]

RUN = "run.json"
STOP = "stop.json"


class RunStore:
    """A run that exists; made by `RunStore.create` or `RunStore.open`."""

    def __init__(self, objects: ObjectStore, manifest: RunManifest) -> None:
        self.objects = objects
        self.manifest = manifest

    @classmethod
    def create(
        cls, url: str | ObjectStore, config: RunConfig, provenance: Provenance | None = None
    ) -> RunStore:
        """Create a run, or open the one that exists with an equal `config.digest`.

        A `run.json` that is damaged is written anew if the run was computed with this config.
        Where the configs differ outside `RunConfig.identity()` (iterations raised, another device)
        the stored config is replaced, unless another process is writing the run.

        Arguments:
            url: Where; or an open store.
            config: The config.
            provenance: By what it is made; collected here by default.

        Raises:
            ConfigMismatch: If a run with another config is there.
            SchemaMismatch: If one is there that another version made, with other fields.
            NotARun: If something else is there.
            UnusableStore: If the store cannot be written.
        """
        objects = _opened(url)
        try:
            stored = _read_run(objects)
        except DamageError:
            stored = None
            _require_same_config(objects, config)
            objects.delete(RUN)
        else:
            if stored is None:
                _require_empty(objects)
        if stored is None:
            manifest = RunManifest(
                config=config,
                config_digest=config.digest,
                provenance=provenance or collect_provenance(),
                created=datetime.now(UTC),
            )
            stored = _create_run(objects, manifest)
        if stored.config_digest != config.digest:
            differences = config_differences(stored.config.identity(), config.identity())
            if not differences:
                raise SchemaMismatch(
                    f"the run at {redact_url(objects.url)} was made by version "
                    f"{stored.provenance.code_version}, whose configs had other fields; go on "
                    "with that version, or give another --store for a new run"
                )
            raise ConfigMismatch.at(redact_url(objects.url), differences)
        if stored.config != config and not held_elsewhere(objects):
            stored = stored.model_copy(update={"config": config})
            write_json(objects, RUN, stored)
        return cls(objects, stored)

    @classmethod
    def open(cls, url: str | ObjectStore) -> RunStore:
        """Open the run that exists.

        Raises:
            NotARun: If there is none.
            SchemaMismatch: If it was written by another version, which this one cannot read.
            DamageError: If `run.json` is damaged.
        """
        objects = _opened(url)
        manifest = _read_run(objects)
        if manifest is None:
            raise NotARun(
                f"{redact_url(objects.url)} is not a run: it has no {RUN}; give the folder or URL "
                "that `diffem run` wrote (runs/NAME by default)"
            )
        return cls(objects, manifest)

    @property
    def url(self) -> str:
        """Where the run is: what another process needs to open it."""
        return self.objects.url

    @property
    def address(self) -> str:
        """What opens the run from any folder: its URL, or its absolute path."""
        local = self.objects.local_path
        return self.url if local is None else str(local.resolve())

    @property
    def config(self) -> RunConfig:
        """The stored config."""
        return self.manifest.config

    # -------------------------------------------------------------------------------- observations

    def observations_manifest(self) -> ObservationsManifest | None:
        """Return `observations.json`: None as long as the observations are not complete."""
        return read_seal(self.objects)

    def has_observations(self) -> bool:
        """Tell whether the observations are sealed and all their objects have the right size."""
        seal = self.observations_manifest()
        return seal is not None and is_whole(
            self.objects,
            seal.objects,
            prefix="",
            checksum=False,
            sizes=self.objects.sizes(FOLDER),
        )

    def write_observations(
        self,
        blocks: Iterable[ObservationBlock],
        *,
        x_shape: tuple[int, ...],
        units: str = "1",
        source: str = "",
        attributes: Mapping[str, Any] | None = None,
        generation: int = 0,
        copied: Sequence[str] = (),
        from_iteration: int = 0,
    ) -> ObservationsManifest:
        """Write the observations and seal them, or repair them with the same numbers.

        See `observations.write_observations`, and `generations` for those that come later.
        """
        provenance = {
            "title": "DiffEM observations",
            "run": self.config.name,
            "config_digest": self.manifest.config_digest,
            "code_version": self.manifest.provenance.code_version,
            "source": source,
            **(attributes or {}),
        }
        start = self.start().manifest() if generation == 0 else None
        return write_observations(
            generation_store(self.objects, generation),
            blocks,
            x_shape=x_shape,
            units=units,
            source=source,
            attributes=provenance,
            data_digest=start.parent_digest if start else None,
            copied=copied,
            from_iteration=from_iteration,
        )

    def observations(self, split: Split | None = None) -> Observations:
        """Return a reader of the observations, of one split or of all.

        Where observations came later (`generations`), these are the first ones: those that the
        start was fitted to, and that everything is judged by.
        """
        return Observations(self.objects, split)

    def generations(self) -> list[ObservationsManifest]:
        """Return the seals of the observations that came together, in order."""
        return read_generations(self.objects)

    def training(self, iteration: int) -> Observations:
        """Return a reader of the training observations that an EM iteration learns from."""
        if not (isinstance(self.config.data, StoreData) and self.config.data.follow):
            return self.observations("train")
        known = sum(seal.from_iteration <= iteration for seal in self.generations())
        return GrownObservations(self.objects, "train", known)

    # -------------------------------------------------------------------------------------- stages

    def start(self) -> StartStore:
        """Return the start."""
        return StartStore(self.objects, self.manifest)

    def iteration(self, iteration: int) -> IterationStore:
        """Return an EM iteration, whether or not anything of it is there."""
        return IterationStore(self.objects, self.manifest, iteration)

    def prior(self) -> PriorStore:
        """Return the prior, whether or not anything of it is there."""
        return PriorStore(self.objects, self.manifest)

    def iteration_numbers(self) -> list[int]:
        """Return the numbers of the iterations of which anything is there."""
        return sorted(int(n) for n in self.objects.children("iterations") if n.isdecimal())

    def completed(self) -> list[IterationManifest]:
        """Return the manifests of the complete iterations, in order.

        The chain ends at the first iteration that is not complete or that was not computed from
        the model before it.
        """
        start = self.start().manifest()
        if start is None:
            return []
        paths = [self.iteration(n).path(COMMIT) for n in self.iteration_numbers()]
        contents = self.objects.read_many(paths)
        chain: list[IterationManifest] = []
        parent = start.model_digest
        while (path := self.iteration(len(chain)).path(COMMIT)) in contents:
            manifest = decode_json(contents[path], IterationManifest, path=path)
            if manifest.parent_digest != parent:
                break
            chain.append(manifest)
            parent = manifest.model_digest
        return chain

    def stopped(self) -> StopRecord | None:
        """Return why the stopping rule ended the run; None while it has not, or not this run."""
        try:
            record = read_json(self.objects, STOP, StopRecord)
        except DamageError:
            return None  # decided anew from the iterations' metrics
        completed = self.completed()
        if record is None or record.rule != self.config.stop or not completed:
            return None
        return record if record.model_digest == completed[-1].model_digest else None

    def write_stop(self, *, best: int, reason: str) -> None:
        """Record that the stopping rule ended the run after the last complete iteration."""
        record = StopRecord(
            rule=self.config.stop,
            model_digest=self.completed()[-1].model_digest,
            best=best,
            reason=reason,
        )
        write_json(self.objects, STOP, record)

    def parent_digest(self, iteration: int) -> str | None:
        """Return the digest of the model that draws an iteration's reconstructions.

        None as long as the start, or the iteration before, is not complete.
        """
        before = self.iteration(iteration - 1) if iteration else self.start()
        manifest = before.manifest()
        return manifest.model_digest if manifest else None

    def tidy(self) -> VerifyReport:
        """Make the run ready to go on, whatever state it was left in: see `verify.recover`."""
        from storage_schemas.verify import recover

        return recover(self)


def config_differences(stored: Any, given: Any, key: str = "") -> list[str]:
    """Return the lines `key: stored -> given` for every leaf in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(given, dict):
        lines: list[str] = []
        for name in [*stored, *(name for name in given if name not in stored)]:
            below = f"{key}.{name}" if key else str(name)
            lines += config_differences(stored.get(name, _ABSENT), given.get(name, _ABSENT), below)
        return lines
    return [] if stored == given else [f"{key}: {_shown(stored)} -> {_shown(given)}"]


_ABSENT = object()


def _shown(value: object) -> str:
    import json

    return "(absent)" if value is _ABSENT else json.dumps(value)


def _opened(url: str | ObjectStore) -> ObjectStore:
    return url if isinstance(url, ObjectStore) else ObjectStore(url)


def _read_run(objects: ObjectStore) -> RunManifest | None:
    try:
        return read_json(objects, RUN, RunManifest)
    except NotADirectoryError:
        raise NotARun(f"{objects.url} is a file, not a run; give the folder of a run") from None
    except PermissionError as error:
        raise UnusableStore(
            f"cannot read {redact_url(objects.url)} ({error}); check its permissions and the "
            "credentials"
        ) from error


def _create_run(objects: ObjectStore, manifest: RunManifest) -> RunManifest:
    """Write `run.json`, or return the one that another process wrote a moment before."""
    try:
        create_json(objects, RUN, manifest)
    except FileExistsError:
        stored = _read_run(objects)
        assert stored is not None
        return stored
    except UnusableStore:
        raise
    except Exception as error:  # each cloud library has exceptions of its own
        if objects.local_path is not None:
            raise
        raise UnusableStore(
            f"cannot write to {redact_url(objects.url)} ({type(error).__name__}: {error}); check "
            "the bucket's name, its permissions and the credentials"
        ) from error
    return manifest


def _require_same_config(objects: ObjectStore, config: RunConfig) -> None:
    """Raise DamageError unless what was computed says that the config was this one."""
    start = read_json(objects, "start/start.json", StartManifest)
    if start is not None and start.config_digest != config.digest:
        raise DamageError(RUN, "is damaged, and the run was computed with another config")


def _require_empty(objects: ObjectStore) -> None:
    others = [name for name in objects.children() if name != "lease"]
    if others:
        raise NotARun(
            f"{redact_url(objects.url)} is not empty and not a run: it holds "
            f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''} but no {RUN}; choose "
            "another --store"
        )
