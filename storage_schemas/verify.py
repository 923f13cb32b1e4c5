"""Does a run hold what its manifests say? And what to delete so that `diffem run` makes it anew.

Every object that a manifest names is compared with it (existence, size, SHA-256) and, where it
holds numbers, decoded and looked through for what is not finite. Findings are

- missing: a manifest names it and it is not there;
- damaged: it is there and is not what was written, or does not follow from what came before it;
- orphaned: it is there and no manifest of a complete stage names it;
- unfinished: it belongs to an iteration that is not complete: no fault, `diffem run` goes on.

`repair` deletes the damaged objects and the manifests that speak for them, and nothing else: the
next `diffem run` finds these stages incomplete and computes exactly them. Equal inputs give equal
bytes, so what was computed from a repaired object stays valid; if the bytes come out differently
after all, the chain of digests ends there and later iterations are computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from pydantic import NonNegativeInt

from storage_schemas import observations, prior_store, reconstructions, start_store
from storage_schemas._base import Record
from storage_schemas.documents import decode_json, read_json
from storage_schemas.errors import DamageError, SchemaMismatch
from storage_schemas.generations import GENERATIONS, generation_folder, generation_store
from storage_schemas.integrity import joined, problem_of
from storage_schemas.iteration_store import IterationStore
from storage_schemas.lease import held_elsewhere
from storage_schemas.manifests import (
    IterationManifest,
    ObjectRecord,
    ObservationsManifest,
    PriorManifest,
    ReconstructionsManifest,
    RunManifest,
    ShardManifest,
    StageRecord,
    StartManifest,
)
from storage_schemas.metrics import Metrics
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import Observations
from storage_schemas.prior_store import PriorStore
from storage_schemas.run_store import RUN, RunStore
from storage_schemas.stage_folder import CHECKPOINT, METRICS

__all__ = ["Finding", "VerifyReport", "recover", "repair", "verify"]

_Model = TypeVar("_Model", bound=Record)

_OWN = (
    f"{observations.FOLDER}/",
    f"{GENERATIONS}/",
    "start/",
    "iterations/",
    f"{prior_store.FOLDER}/",
)
"""Folders in which nothing else may lie; what people put beside them is theirs."""


class Finding(Record):
    """One object and what is wrong with it."""

    path: str
    """Path in the run."""
    problem: str
    """What is wrong."""


class VerifyReport(Record):
    """What `verify` found."""

    missing: tuple[Finding, ...] = ()
    """Objects that a manifest names and that are not there."""
    damaged: tuple[Finding, ...] = ()
    """Objects that are not what was written."""
    orphaned: tuple[Finding, ...] = ()
    """Objects that nothing names."""
    unfinished: tuple[Finding, ...] = ()
    """Parts of iterations that are not complete: no fault."""
    objects: NonNegativeInt = 0
    """Objects that were checked."""
    bytes: NonNegativeInt = 0
    """Their size."""

    @property
    def ok(self) -> bool:
        """Whether nothing is missing, damaged or orphaned."""
        return not (self.missing or self.damaged or self.orphaned)


def verify(
    store: RunStore | ObjectStore | str,
    *,
    quick: bool = False,
    on_object: Callable[[str, int], None] | None = None,
) -> VerifyReport:
    """Compare every object of a run with its manifests.

    Arguments:
        store: The run, or its URL.
        quick: Compare sizes only, and read nothing but manifests.
        on_object: Called with each object's path and size, for a progress bar.

    Raises:
        NotARun: If there is no run.
    """
    if not isinstance(store, RunStore):
        try:
            store = RunStore.open(store)
        except DamageError as error:  # nothing else can be judged without it
            return VerifyReport(damaged=(Finding(path=error.path, problem=error.problem),))
    check = _Check(store, quick, on_object)
    check.run()
    return VerifyReport(
        missing=tuple(check.missing),
        damaged=tuple(check.damaged),
        orphaned=tuple(check.orphaned),
        unfinished=tuple(check.unfinished),
        objects=check.objects,
        bytes=check.bytes,
    )


def repair(store: RunStore, report: VerifyReport) -> list[str]:
    """Delete what a report names and the manifests that speak for it.

    Only for the holder of the run's lease, before any other process of the run writes. The seal
    of the observations is kept if it is whole: `RunStore.has_observations` is false then, and
    `write_observations` accepts nothing but the same numbers.

    Arguments:
        store: The run.
        report: What `verify` found.

    Returns:
        The paths that were deleted.
    """
    deleted: list[str] = []

    def drop(path: str) -> None:
        if store.objects.exists(path):
            store.objects.delete(path)
            deleted.append(path)

    faults = [*report.missing, *report.damaged]
    for fault in faults:
        top, _, rest = fault.path.partition("/")
        if top == "start":
            drop(joined("start", start_store.COMMIT))
        elif top == prior_store.FOLDER:
            drop(joined(prior_store.FOLDER, prior_store.COMMIT))
        elif top == "iterations":
            folder = joined(top, rest.partition("/")[0])
            drop(joined(folder, reconstructions.COMMIT))
    for fault in [*report.damaged, *report.orphaned]:
        if fault.path != RUN:
            drop(fault.path)
    return deleted


def recover(store: RunStore) -> VerifyReport:
    """Make a run ready to go on, whatever state it was left in; cheap, also for large runs.

    Compares sizes and manifests (not every checksum: they are compared where objects are read),
    repairs, and removes what killed writers left. Only for the holder of the run's lease, before
    any other process of the run writes.

    Arguments:
        store: The run.

    Returns:
        What was found, and repaired.
    """
    report = verify(store, quick=True)
    repair(store, report)
    return report


class _Check:
    def __init__(
        self, store: RunStore, quick: bool, on_object: Callable[[str, int], None] | None
    ) -> None:
        self.store = store
        self.quick = quick
        self.on_object = on_object
        self.missing: list[Finding] = []
        self.damaged: list[Finding] = []
        self.orphaned: list[Finding] = []
        self.unfinished: list[Finding] = []
        self.objects = 0
        self.bytes = 0
        self.named: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.models: dict[int, str] = {}  # digest of each complete iteration's model
        self.contents: dict[str, bytes] = {}  # documents that were read ahead, together

    def run(self) -> None:
        objects = self.store.objects
        self.sizes = objects.sizes()
        self._run_manifest()
        data_digest = self._observations()
        self._generations()
        parent = self._start(data_digest)
        self._iterations(parent)
        self._prior()
        for path in self.sizes:
            if path not in self.named and path.startswith(_OWN):
                self.orphaned.append(Finding(path=path, problem="is named by no manifest"))
        writing = held_elsewhere(objects)
        for path in objects.partials():
            if writing:
                self._unfinished(path, "is being written")
            else:
                problem = "was left by a writer that did not finish"
                self.orphaned.append(Finding(path=path, problem=problem))

    # ------------------------------------------------------------------------------------- parts

    def _run_manifest(self) -> None:
        self.named.add(RUN)
        manifest = self._document(RUN, RunManifest)
        if manifest is not None and manifest.config_digest != manifest.config.digest:
            self._damage(
                RUN,
                "its config does not have the digest that it names: another version's?",
            )

    def _observations(self) -> str | None:
        self.named.add(observations.SEAL)
        seal = self._document(observations.SEAL, ObservationsManifest)
        if seal is None:
            folder = self._contents(observations.FOLDER)
            self.named.update(folder)
            if not self.store.objects.exists(observations.SEAL):
                if joined("start", start_store.COMMIT) in self.sizes:
                    self._miss(observations.SEAL, "is missing although the start is there")
                elif folder:
                    self._unfinished(observations.FOLDER, "the observations are not complete")
            return None
        before = len(self.missing) + len(self.damaged)
        self._compare(seal.objects, "")
        if not self.quick and before == len(self.missing) + len(self.damaged):
            self._decode_observations(seal)
        return seal.data_digest

    def _generations(self) -> None:
        """Check the observations that came later, and that none of them are gone."""
        last = max(
            (int(n) for n in self.store.objects.children(GENERATIONS) if n.isdecimal()), default=0
        )
        for number in range(1, last + 1):
            folder = generation_folder(number)
            path = joined(folder, observations.SEAL)
            self.named.add(path)
            seal = self._document(path, ObservationsManifest)
            if seal is None:
                contents = self._contents(folder)
                self.named.update(contents)
                if not self.store.objects.exists(path):
                    if number < last:
                        self._miss(path, "is missing although later observations are there")
                    elif contents:
                        self._unfinished(folder, "the observations are not complete")
                continue
            before = len(self.missing) + len(self.damaged)
            self._compare(seal.objects, folder)
            if not self.quick and before == len(self.missing) + len(self.damaged):
                self._decode_observations(seal, number)

    def _require_learned_from(self, iteration: IterationStore, samples: int) -> None:
        """Miss observations that an iteration learned from and that are nowhere."""
        try:
            seals = self.store.generations()
        except DamageError:
            return  # which is said already
        known = [seal for seal in seals if seal.from_iteration <= iteration.iteration]
        if seals and samples > sum(seal.samples - seal.holdout for seal in known):
            path = joined(generation_folder(len(known)), observations.SEAL)
            if path not in {fault.path for fault in self.missing}:
                self._miss(path, f"is missing although {iteration.prefix} learned from it")

    def _start(self, data_digest: str | None) -> str | None:
        start = self.store.start()
        path = start.path(start_store.COMMIT)
        manifest = self._document(path, StartManifest)
        self.named.add(path)
        if manifest is None:
            contents = self._contents(start.prefix)
            self.named.update(contents)
            if not self.store.objects.exists(path):
                if self.store.iteration_numbers():
                    self._miss(path, "is missing although iterations are there")
                elif contents:
                    self._unfinished(start.prefix, "the start is not complete")
            return None
        self._compare(manifest.objects, start.prefix)
        if data_digest is not None and manifest.parent_digest != data_digest:
            self._damage(path, "was computed from other observations")
        if manifest.config_digest != self.store.manifest.config_digest:
            self._damage(path, "was computed with another config")
        return manifest.model_digest

    def _iterations(self, parent: str | None) -> None:
        numbers = self.store.iteration_numbers()
        for number in range(max(numbers, default=-1) + 1):
            iteration = self.store.iteration(number)
            path = iteration.path(reconstructions.COMMIT)
            self.named.add(path)
            manifest = self._document(path, IterationManifest)
            if manifest is None:
                if not self.store.objects.exists(path):
                    if any(later > number for later in numbers):
                        self._miss(path, "is missing although later iterations are there")
                    self._incomplete(iteration)
                else:
                    self.named.update(self._contents(iteration.prefix))
                parent = None
                continue
            self._committed(iteration, manifest, parent)
            parent = self.models[number] = manifest.model_digest

    def _prior(self) -> None:
        prior = self.store.prior()
        path = prior.path(prior_store.COMMIT)
        self.named.add(path)
        manifest = self._document(path, PriorManifest)
        if manifest is None:
            contents = self._contents(prior.prefix)
            self.named.update(contents)
            if contents and not self.store.objects.exists(path):
                self._unfinished(prior.prefix, "the prior is not complete")
            return
        self._compare(manifest.objects, prior.prefix)
        if manifest.config_digest != self.store.manifest.config_digest:
            self._damage(path, "was computed with another config")
        made_of = self.models.get(manifest.iteration)
        if made_of is None:
            commit = self.store.iteration(manifest.iteration).path(reconstructions.COMMIT)
            if not self.store.objects.exists(commit):
                self._miss(commit, "is missing although the prior is there")
        elif made_of != manifest.parent_digest:
            self._damage(path, f"was made of another model of iteration {manifest.iteration}")
        if not self.quick:
            self._decode_prior(prior, manifest)

    def _decode_prior(self, prior: PriorStore, manifest: PriorManifest) -> None:
        try:
            prior.read_tensors("model", digest=manifest.model_digest)
        except DamageError as error:
            if error.path not in {fault.path for fault in [*self.missing, *self.damaged]}:
                self._damage(error.path, error.problem)

    def _committed(
        self, iteration: IterationStore, manifest: IterationManifest, parent: str | None
    ) -> None:
        path = iteration.path(reconstructions.COMMIT)
        if parent is not None and manifest.parent_digest != parent:
            self._damage(path, "was computed from another model than the one before it")
        if manifest.config_digest != self.store.manifest.config_digest:
            self._damage(path, "was computed with another config")
        self._require_learned_from(iteration, manifest.samples)
        before = len(self.missing) + len(self.damaged)
        self._compare(manifest.objects, iteration.prefix)
        if not self.quick and before == len(self.missing) + len(self.damaged):
            self._decode_iteration(iteration, manifest)

    def _incomplete(self, iteration: IterationStore) -> None:
        """Check what is there of an iteration that goes on, or that was interrupted."""
        contents = self._contents(iteration.prefix)
        self.named.update(contents)
        if contents:
            self._unfinished(iteration.prefix, "the iteration is not complete")
        plan_path = iteration.path(reconstructions.PLAN)
        plan = self._document(plan_path, ReconstructionsManifest)
        if plan is not None:
            self._compare(plan.objects, iteration.prefix)
            self._require_learned_from(iteration, plan.samples)
        self.contents = self.store.objects.read_many(p for p in contents if _is_small(p))
        for path in contents:
            name = path.removeprefix(f"{iteration.prefix}/")
            if name.startswith("shards/"):
                shard = self._document(path, ShardManifest)
                # A stale shard is about to be drawn again: its object may be another by now.
                if shard is not None and plan and shard.parent_digest == plan.parent_digest:
                    self._compare({shard.path: shard.object}, iteration.prefix)
            elif name.startswith("stages/"):
                stage = self._document(path, StageRecord)
                if stage is not None:
                    self._compare(stage.objects, iteration.prefix)
            elif name == METRICS:
                self._document(path, Metrics)
            elif name == CHECKPOINT and not self.quick:
                unread = iteration.read_checkpoint() is None
                if unread and self.store.objects.exists(path):
                    self._damage(path, "cannot be read")

    # ------------------------------------------------------------------------------------- checks

    def _contents(self, folder: str) -> list[str]:
        return [path for path in self.sizes if path.startswith(f"{folder}/")]

    def _document(self, path: str, model: type[_Model]) -> _Model | None:
        content = self.contents.pop(path, None)
        try:
            if content is not None:
                return decode_json(content, model, path=path)
            return read_json(self.store.objects, path, model)
        except DamageError as error:
            self._damage(path, error.problem)
            return None
        except SchemaMismatch as error:
            self._damage(path, str(error))
            return None

    def _compare(self, records: Mapping[str, ObjectRecord], prefix: str) -> None:
        for name, record in records.items():
            path = joined(prefix, name)
            self.named.add(path)
            size = self.sizes.get(path)
            if size != record.bytes:  # perhaps written since the listing: the run may be going
                size = self.store.objects.size(path)
            self.objects += 1
            self.bytes += size or 0
            if size is None:
                self._miss(path, "is missing")
            elif self.quick or size != record.bytes:
                if size != record.bytes:
                    self._damage(path, f"has {size} bytes but {record.bytes} were written")
            elif problem := problem_of(self.store.objects.read(path), record):
                self._damage(path, problem)
            if self.on_object is not None:
                self.on_object(path, size or 0)

    def _decode_observations(self, seal: ObservationsManifest, generation: int = 0) -> None:
        folder = generation_folder(generation)
        try:
            reader = Observations(generation_store(self.store.objects, generation))
            for start in range(0, seal.samples, 4096):
                rows = slice(start, start + 4096)
                arrays = {"observation": reader.y(rows), "truth/clean": reader.truth(rows)}
                arrays |= {f"params/{n}": a for n, a in reader.params(rows).items()}
                for name, values in arrays.items():
                    if values is not None and not np.isfinite(values).all():
                        path = joined(folder, f"{observations.FOLDER}/{name}")
                        self._damage(path, "is not finite")
        except DamageError as error:
            self._damage(joined(folder, error.path), error.problem)

    def _decode_iteration(self, iteration: IterationStore, manifest: IterationManifest) -> None:
        try:
            iteration.sample_ids()
            plan = iteration.reconstructions()
            assert plan is not None
            for shard in range(plan.shards):
                start, stop = plan.rows(shard)
                if not np.isfinite(iteration.read_reconstructions(slice(start, stop))).all():
                    self._damage(iteration.path(f"shards/{shard:05d}.json"), "is not finite")
            iteration.read_tensors("model", digest=manifest.model_digest)
        except DamageError as error:
            self._damage(error.path, error.problem)

    def _miss(self, path: str, problem: str) -> None:
        self.missing.append(Finding(path=path, problem=problem))

    def _damage(self, path: str, problem: str) -> None:
        self.damaged.append(Finding(path=path, problem=problem))

    def _unfinished(self, path: str, problem: str) -> None:
        self.unfinished.append(Finding(path=path, problem=problem))


def _is_small(path: str) -> bool:
    return "/shards/" in path or "/stages/" in path
