"""From a source into a store: blocks are read, checked, converted, corrupted, written, sealed.

Order of writing as inside a run: `observations.zarr`, then `observations.json`. Until that seal is
there nothing counts: an ingest that was interrupted begins anew. One that is complete is read
again and compared; another one at the same URL is refused.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.ingest.base import IngestError, Source, recut
from pipelines.ingest.opening import opened_source
from pipelines.ingest.request import IngestRequest
from pipelines.ingest.roles import Role, Roles, assign_roles
from pipelines.progress import stage
from pipelines.sources import choose_holdout
from storage_schemas._base import Record
from storage_schemas.errors import BadObservations, DamageError, UnusableStore
from storage_schemas.lease import LeaseHeld, RunLease, read_lease
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.observations import (
    FOLDER,
    SEAL,
    ObservationBlock,
    read_seal,
    write_observations,
)

__all__ = ["IngestSummary", "ingest"]

_TITLE = "DiffEM observations"
_BLOCK_BYTES = 2**23
_LARGEST_BLOCK = 4096
_WIDTHS = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "bool": (0.0, 1.0)}


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
    objects = ObjectStore(request.url)
    sealed = _what_is_there(objects)
    with opened_source(request.source, request.corruption) as source:
        work = _Work(request, source)
        if sealed is not None:
            _require_alike(objects, sealed, work)
        blocks = work.blocks()
        # What is wrong with the first block is found before anything is written.
        first = next(blocks)
        written = _write(objects, work, _chained(first, blocks), sealed)
    value_range, measured = work.value_range()
    return IngestSummary(
        url=request.url,
        complete_before=sealed is not None,
        data_digest=written.data_digest,
        samples=written.samples,
        holdout=written.holdout,
        x_shape=written.x_shape,
        y_shape=written.y_shape,
        parameters=dict(written.parameters),
        truth=written.truth,
        labels=written.labels,
        units=written.units,
        source=written.source,
        smallest=work.smallest,
        largest=work.largest,
        seconds=time.monotonic() - began,
        range_is_measured=measured,
        data={
            "kind": "store",
            "url": request.url,
            "x_shape": list(written.x_shape),
            "value_range": value_range,
            "labelled": written.labels,
        },
    )


class _Work:
    """An ingest: the arrays, the corruption, and what is learned of the values on the way."""

    def __init__(self, request: IngestRequest, source: Source) -> None:
        self.request = request
        self.source = source
        self.roles: Roles = assign_roles(source, request)
        self.samples = self.roles.samples
        corruption = request.corruption
        self.seed = request.seed if corruption is None else corruption.seed
        self.holdout_count = request.held_out(self.samples)
        self.units = request.units or source.units or "1"
        self.smallest, self.largest = math.inf, -math.inf
        self.rows = self._rows()
        self.parameters = {name: role.shape for name, role in self.roles.params.items()}
        self.corrupt: Callable[..., Any] | None = None
        x, y = self.roles.x, self.roles.y
        if corruption is not None:
            # Only here are PyTorch and deepinv needed.
            from pipelines import build
            from pipelines.stages.observations import corrupt_block, corruption_rows

            assert x is not None
            self.x_shape = x.shape
            self.rows = corruption_rows(x.shape)
            self.channel = build.build_channel(corruption.channel, x.shape)
            self.y_shape = self.channel.y_shape
            self.parameters = dict(self.channel.params_spec)
            self.corrupt = corrupt_block
        else:
            assert y is not None
            self.y_shape = y.shape
            self.x_shape = x.shape if x is not None else request.x_shape or y.shape

    def attributes(self, source: str) -> dict[str, Any]:
        """Return the provenance: nothing that differs where the numbers are the same."""
        corruption = self.request.corruption
        made = {} if corruption is None else {"channel": corruption.channel.kind}
        return {"title": _TITLE, "source": source, **made}

    def value_range(self) -> tuple[list[float] | None, bool]:
        """Return the values of black and white, and whether they are only the measured ones."""
        role = self.roles.x or self.roles.y
        assert role is not None
        known = (
            self.request.value_range
            or self.source.value_range
            or (_WIDTHS.get(role.array.dtype.name) if len(self.x_shape) == 3 else None)
        )
        if known is not None:
            return [float(value) for value in known], False
        if len(self.x_shape) == 1:
            return None, False
        higher = self.smallest + 1 if self.largest <= self.smallest else self.largest
        return [self.smallest, higher], True

    def blocks(self) -> Iterator[ObservationBlock]:
        """Yield checked blocks, each with what belongs to it."""
        holdout = choose_holdout(self.samples, self.holdout_count, seed=self.seed)
        streams = {name: self._stream(role) for name, role in self.roles.all.items()}
        for start in range(0, self.samples, self.rows):
            arrays = {
                name: role.converted(next(streams[name]), start)
                for name, role in self.roles.all.items()
            }
            measured = "x" if self.roles.x is not None else "y"
            self._measure(self.roles.all[measured], arrays[measured], start)
            stop = start + len(arrays[measured])
            y, params = self._observed(arrays, start)
            yield ObservationBlock(
                sample=np.arange(start, stop),
                holdout=holdout[start:stop],
                y=y,
                params=params,
                x=arrays.get("x"),
                label=arrays.get("label"),
            )

    def _observed(
        self, arrays: dict[str, NDArray[Any]], start: int
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        if self.corrupt is None:
            return arrays["y"], {name: arrays[f"param {name}"] for name in self.roles.params}
        y, params = self.corrupt(
            self.channel, arrays["x"], seed=self.seed, block=start // self.rows
        )
        return y, params

    def _measure(self, role: Role, values: NDArray[Any], start: int) -> None:
        role.require_range(values, start, self.request.value_range)
        self.smallest = min(self.smallest, float(values.min()))
        self.largest = max(self.largest, float(values.max()))

    def _stream(self, role: Role) -> Iterator[NDArray[Any]]:
        return recut(role.array.pieces(self.rows, self.samples), self.rows)

    def _rows(self) -> int:
        widest = max(
            4 * math.prod(role.shape) + role.array.dtype.itemsize * math.prod(role.array.shape[1:])
            for role in self.roles.all.values()
        )
        return max(1, min(_LARGEST_BLOCK, _BLOCK_BYTES // widest))


def _chained(
    first: ObservationBlock, rest: Iterator[ObservationBlock]
) -> Iterator[ObservationBlock]:
    yield first
    yield from rest


def _write(
    objects: ObjectStore,
    work: _Work,
    blocks: Iterator[ObservationBlock],
    sealed: ObservationsManifest | None,
) -> ObservationsManifest:
    title = "ingest" if sealed is None else "comparing with what is there"
    # The same numbers under another name of the source are the same ingest.
    source = work.source.description if sealed is None else sealed.source
    try:
        with (
            RunLease(objects, owner="diffem ingest") as lease,
            stage(title, total=work.samples, unit="samples") as advance,
        ):
            objects.sweep(FOLDER)  # what a writer that was killed had open

            def counted() -> Iterator[ObservationBlock]:
                for block in blocks:
                    yield block
                    advance(len(block.sample))
                lease.check()

            return write_observations(
                objects,
                counted(),
                x_shape=work.x_shape,
                units=work.units,
                source=source,
                attributes=work.attributes(source),
            )
    except LeaseHeld:
        raise IngestError(_held(objects)) from None
    except BadObservations as error:
        if sealed is None:
            raise
        raise _other(objects, str(error)) from error
    except IngestError:
        if sealed is None:  # what was refused halfway leaves nothing behind
            objects.delete_folder(FOLDER)
        raise
    except OSError as error:
        if objects.local_path is None:
            raise
        raise UnusableStore(
            f"cannot write to {redact_url(objects.url)} ({error}); choose another URL, or check "
            "its permissions and the space left"
        ) from error


def _what_is_there(objects: ObjectStore) -> ObservationsManifest | None:
    """Return the seal that is there; refuse what no ingest wrote, which would be deleted."""
    where = redact_url(objects.url)
    try:
        names = [name for name in objects.children() if name not in ("lease", FOLDER, SEAL)]
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
        if metadata.get("attributes", {}).get("title") != _TITLE:
            raise IngestError(
                f"{where} holds another {FOLDER}, which this would delete; choose another URL"
            )
    return sealed


def _require_alike(objects: ObjectStore, sealed: ObservationsManifest, work: _Work) -> None:
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
