"""From a source into a store: blocks are read, checked, converted, corrupted, written, sealed.

Order of writing as inside a run: `observations.zarr`, then `observations.json`. Until that seal is
there nothing counts. An ingest that was interrupted goes on after its last whole shard where the
same is asked of the same source, and begins anew otherwise. One that is complete is read again and
compared; another one at the same URL is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from pipelines.ingest.base import IngestError
from pipelines.ingest.blocks import TITLE, IngestWork
from pipelines.ingest.opening import opened_source
from pipelines.ingest.request import IngestRequest
from pipelines.progress import reporter, stage
from storage_schemas._base import Record
from storage_schemas.errors import BadObservations, DamageError, UnusableStore
from storage_schemas.generations import GENERATIONS
from storage_schemas.lease import LeaseHeld, RunLease, read_lease
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.observations import (
    FOLDER,
    SEAL,
    ObservationBlock,
    layout_of,
    read_seal,
    write_observations,
)
from storage_schemas.unsealed import PROGRESS, IngestProgress, UnsealedShards, read_progress

__all__ = ["IngestSummary", "ingest", "summary_of", "what_is_there", "write_generation"]


class IngestSummary(Record):
    """What was ingested."""

    url: str
    """Where the observations are."""
    complete_before: bool
    """Whether the same observations were there already."""
    data_digest: str
    """Digest of the numbers."""
    samples: int
    """Observations, held-out ones included."""
    holdout: int
    """Held-out ones."""
    x_shape: tuple[int, ...]
    """Shape of one clean sample."""
    y_shape: tuple[int, ...]
    """Shape of one observation."""
    parameters: dict[str, tuple[int, ...]]
    """Shape of one sample's operator parameters, by name."""
    truth: bool
    """Whether clean samples are stored, for evaluation only."""
    labels: bool
    """Whether classes are stored, for evaluation only."""
    units: str
    """Unit of the values."""
    source: str
    """Where they come from."""
    smallest: float
    """Smallest value of the clean samples, or else of the observations."""
    largest: float
    """Largest one."""
    seconds: float
    """Seconds that it took."""
    range_is_measured: bool
    """Whether `data.value_range` is only what was found: black and white may lie elsewhere."""
    data: dict[str, Any]
    """The section `data` of a config that reads them."""

    def yaml(self) -> str:
        """Return the lines to paste into a config."""
        lines = [f"  {key}: {json.dumps(value)}" for key, value in self.data.items()]
        if self.range_is_measured:
            lines = [
                f"{line}  # as measured: correct it to the values of black and white"
                if line.startswith("  value_range")
                else line
                for line in lines
            ]
        return "\n".join(["data:", *lines])


def ingest(request: IngestRequest) -> IngestSummary:
    """Write observations of one's own, in blocks, to any URL.

    Arguments:
        request: Which arrays are what, and where they go.

    Returns:
        What is there now.

    Raises:
        ValueError: The source cannot be read or is not what was said, a sample cannot be used
            (the first is named), or something else is at the URL.
    """
    began = time.monotonic()
    if request.append:
        from pipelines.ingest.append import append

        return append(request)
    objects = ObjectStore(request.url)
    sealed = what_is_there(objects)
    with opened_source(request.source, request.corruption) as source:
        work = IngestWork(request, source)
        if sealed is not None:
            _require_alike(objects, sealed, work)
        blocks = work.blocks()
        # What is wrong with the first block is found before anything is written.
        first = next(blocks)
        written = write_generation(objects, work, first, blocks, sealed)
    return summary_of(work, [written], began=began, complete_before=sealed is not None)


def summary_of(
    work: IngestWork,
    seals: Sequence[ObservationsManifest],
    *,
    began: float,
    complete_before: bool,
) -> IngestSummary:
    """Tell what a store holds now.

    Arguments:
        work: The ingest.
        seals: The seals of its generations.
        began: `time.monotonic()` of the beginning.
        complete_before: Whether the same was there already.
    """
    first, last = seals[0], seals[-1]
    value_range, measured = work.value_range()
    return IngestSummary(
        url=work.request.url,
        complete_before=complete_before,
        data_digest=last.data_digest,
        samples=sum(seal.samples for seal in seals),
        holdout=first.holdout,
        x_shape=first.x_shape,
        y_shape=first.y_shape,
        parameters=dict(first.parameters),
        truth=first.truth,
        labels=first.labels,
        units=first.units,
        source=last.source,
        smallest=work.smallest,
        largest=work.largest,
        seconds=time.monotonic() - began,
        range_is_measured=measured,
        data={
            "kind": "store",
            "url": work.request.url,
            "x_shape": list(first.x_shape),
            "value_range": value_range,
            "labelled": first.labels,
        },
    )


def write_generation(
    objects: ObjectStore,
    work: IngestWork,
    first: ObservationBlock,
    rest: Iterator[ObservationBlock],
    sealed: ObservationsManifest | None,
) -> ObservationsManifest:
    """Write the observations of one ingest, or compare them with those that are sealed.

    Arguments:
        objects: Where they go: the store, or that of a generation.
        work: The ingest.
        first: Its first block.
        rest: The blocks after it.
        sealed: The seal that is there.

    Returns:
        The seal.

    Raises:
        ValueError: They cannot be used, are not those that are sealed, or another process writes.
    """
    title = "ingest" if sealed is None else "comparing with what is there"
    # The same numbers under another name of the source are the same ingest.
    source = work.source.description if sealed is None else sealed.source
    try:
        with (
            RunLease(objects, owner="diffem ingest") as lease,
            stage(title, total=work.samples, unit="samples") as advance,
        ):
            objects.sweep(FOLDER)  # what a writer that was killed had open
            blocks: Iterator[ObservationBlock] = chain([first], rest)
            kept = None
            if sealed is None:
                shards = _what_was_interrupted(objects, work, first)
                blocks, kept = _resumed(work, first, rest, shards), shards.kept

            def counted() -> Iterator[ObservationBlock]:
                for block in blocks:
                    yield block
                    advance(len(block.sample))
                lease.check()

            written = write_observations(
                objects,
                counted(),
                x_shape=work.x_shape,
                units=work.units,
                source=source,
                attributes=work.attributes(source),
                kept=kept,
            )
            if not work.adds:  # of what was added, it tells what it was
                objects.delete(PROGRESS)
            return written
    except LeaseHeld:
        raise IngestError(_held(objects)) from None
    except BadObservations as error:
        if sealed is None:
            raise
        raise _other(objects, str(error)) from error
    except IngestError:
        if sealed is None:  # what was refused halfway leaves nothing behind
            objects.delete(PROGRESS)
            objects.delete_folder(FOLDER)
        raise
    except OSError as error:
        if objects.local_path is None:
            raise
        raise UnusableStore(
            f"cannot write to {redact_url(objects.url)} ({error}); choose another URL, or check "
            "its permissions and the space left"
        ) from error


def _what_was_interrupted(
    objects: ObjectStore, work: IngestWork, first: ObservationBlock
) -> UnsealedShards:
    """Return the shards that the same ingest of the same source has left; delete all others."""
    arrays = first.arrays()
    layout = layout_of(
        arrays, samples=work.samples, x_shape=work.x_shape, units=work.units, attributes={}
    )
    shards = UnsealedShards(objects, layout)
    progress = IngestProgress(request=work.digest(), source=work.source.state())
    there = read_progress(objects)
    changed = "its source has changed since then (or nothing tells that it has not)"
    if there is None:
        reason = "nothing says what was being ingested" if objects.list(FOLDER) else ""
    elif there.request != progress.request:
        reason = "something else was being ingested, or by other versions"
    elif there.source is None or there.source != progress.source:
        reason = changed
    else:
        head = next(UnsealedShards(objects, layout).read(), {})
        alike = all(
            np.array_equal(values[: len(arrays[path])], arrays[path][: len(values)])
            for path, values in head.items()
        )
        if alike:
            shards.tidy()
            return shards
        reason = changed
    if reason:
        reporter().note(f"an ingest into {objects} was interrupted, but {reason}: begins anew")
    shards.begin(progress)
    return shards


def _resumed(
    work: IngestWork,
    first: ObservationBlock,
    rest: Iterator[ObservationBlock],
    shards: UnsealedShards,
) -> Iterator[ObservationBlock]:
    """Yield the blocks that are there, then those that the source has to give."""
    yield from work.stored_blocks(shards.read())
    if shards.rows == 0:
        yield first
        yield from rest
        return
    reporter().note(
        f"{shards.rows:,} of {work.samples:,} samples are there from an ingest that was "
        "interrupted"
    )
    yield from work.blocks(shards.rows)


def what_is_there(objects: ObjectStore) -> ObservationsManifest | None:
    """Return the seal that is there; refuse what no ingest wrote, which would be deleted."""
    where = redact_url(objects.url)
    try:
        names = [
            name
            for name in objects.children()
            if name not in ("lease", FOLDER, SEAL, PROGRESS, GENERATIONS)
        ]
        if names:
            what = "a run" if "run.json" in names else ", ".join(names[:5])
            raise IngestError(
                f"{where} is not empty: it holds {what}; choose another URL for the observations"
            )
        if objects.local_path is not None and objects.local_path.is_file():
            raise IngestError(f"{where} is a file; choose a folder that does not exist yet")
        sealed = read_seal(objects)
        root = objects.read_many([f"{FOLDER}/zarr.json", f"{FOLDER}/.zgroup"])
    except DamageError as error:
        raise IngestError(
            f"{where}: {error.path} {error.problem}; delete it, and the same command begins anew"
        ) from error
    except PermissionError as error:
        raise IngestError(f"{where} cannot be read ({error}); choose another URL") from error
    if sealed is None and root:
        metadata = json.loads(next(iter(root.values())))
        if metadata.get("attributes", {}).get("title") != TITLE:
            raise IngestError(
                f"{where} holds another {FOLDER}, which this would delete; choose another URL"
            )
    return sealed


def _require_alike(objects: ObjectStore, sealed: ObservationsManifest, work: IngestWork) -> None:
    """Refuse another ingest before its numbers are read."""
    roles = work.roles
    pairs: dict[str, tuple[object, object]] = {
        "samples": (sealed.samples, work.samples),
        "holdout": (sealed.holdout, work.holdout_count),
        "x_shape": (sealed.x_shape, work.x_shape),
        "y_shape": (sealed.y_shape, work.y_shape),
        "parameters": (dict(sealed.parameters), work.parameters),
        "clean samples": (sealed.truth, roles.x is not None),
        "classes": (sealed.labels, roles.label is not None),
        "units": (sealed.units, work.units),
    }
    found = [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b]
    if found:
        raise _other(objects, f"stored -> given: {'; '.join(found)}")


def _other(objects: ObjectStore, difference: str) -> IngestError:
    return IngestError(
        f"{redact_url(objects.url)} holds other observations already ({difference}); choose "
        "another URL, or delete what is there"
    )


def _held(objects: ObjectStore) -> str:
    record = read_lease(objects)
    by = "another process"
    if record is not None:
        by = f"{record.owner} (process {record.pid} on {record.host})"
    return (
        f"{redact_url(objects.url)} is being written by {by}; wait for it, or stop it: where it "
        "died, this is found out within a minute"
    )
