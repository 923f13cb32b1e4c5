"""New observations, read in order and in blocks: a source of `diffem ingest`, or a sealed store.

They are read twice: once to check every one of them before anything is drawn, to take their
digest, and to pick some for comparing with those of the run; then block by block for drawing.
Memory holds one block.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffem_core.channel import Channel
from pipelines.ingest.base import IngestError, Source, recut
from pipelines.ingest.opening import opened_source
from pipelines.ingest.request import IngestRequest
from pipelines.ingest.roles import Role, Roles, assign_roles
from pipelines.ingest.stored import copy_rows
from pipelines.progress import stage
from pipelines.stages.feeding import spread_rows
from pipelines.using.arguments import require_fit
from storage_schemas.documents import digest_of
from storage_schemas.errors import DamageError, StorageError
from storage_schemas.generations import GrownObservations
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.observations import read_seal

__all__ = ["Block", "Incoming", "Survey", "opened_observations", "survey"]

_BLOCK_BYTES = 2**23
_LARGEST_BLOCK = 4096
_SOURCES_OF_THEIR_OWN = ("bundled:", "hf://")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some observations, in the data's own units."""

    y: NDArray[np.float32]
    """Observations, shape (n, *y_shape)."""
    params: Mapping[str, NDArray[np.float32]]
    """Their operator parameters by name, shape (n, ...)."""

    def __len__(self) -> int:
        return len(self.y)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return the arrays by unique names."""
        return {"y": self.y} | {f"params/{name}": a for name, a in sorted(self.params.items())}


class Incoming:
    """New observations; nothing but headers is read before `blocks`.

    Arguments:
        description: Where they come from, in words; holds no secret.
        sample_ids: Their ids, shape (n,).
        y_shape: Shape of one.
        parameters: Shape of one sample's operator parameters, by name.
        units: Unit of the values, where it is known.
    """

    def __init__(
        self,
        description: str,
        *,
        sample_ids: NDArray[np.int64],
        y_shape: tuple[int, ...],
        parameters: Mapping[str, tuple[int, ...]],
        units: str | None,
    ) -> None:
        self.description = description
        self.sample_ids = sample_ids
        self.y_shape = y_shape
        self.parameters = dict(parameters)
        self.units = units

    def __len__(self) -> int:
        return len(self.sample_ids)

    def blocks(self, rows: int, first: int = 0) -> Iterator[Block]:
        """Yield the observations in order, `rows` at a time; the last block may be shorter.

        Arguments:
            rows: Observations of a block.
            first: The block to begin with; what is before it is not read.

        Raises:
            ValueError: They cannot be read, or one is not finite.
        """
        raise NotImplementedError

    @property
    def block_rows(self) -> int:
        """A number of observations that is small in memory."""
        shapes = [self.y_shape, *self.parameters.values()]
        width = 4 * sum(math.prod(shape) for shape in shapes)
        return max(1, min(_LARGEST_BLOCK, _BLOCK_BYTES // width))


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was seen on the first way through."""

    digest: str
    """Digest of the numbers, as float32."""
    probe: Block
    """Some observations, spread evenly."""


def survey(incoming: Incoming, *, probe: int) -> Survey:
    """Read all observations once.

    Arguments:
        incoming: The observations.
        probe: How many are kept, at most.

    Raises:
        ValueError: They cannot be read, or one is not finite.
    """
    wanted = spread_rows(len(incoming), probe)
    hashes: dict[str, hashlib._Hash] = {}
    kept: list[Block] = []
    start = 0
    with stage("reading the observations", total=len(incoming), unit="samples") as advance:
        for block in incoming.blocks(incoming.block_rows):
            for name, values in block.arrays().items():
                hashes.setdefault(name, hashlib.sha256()).update(values.data)
            inside = wanted[(wanted >= start) & (wanted < start + len(block))] - start
            kept.append(
                Block(y=block.y[inside], params={k: v[inside] for k, v in block.params.items()})
            )
            start += len(block)
            advance(len(block))
    shapes = {"y": incoming.y_shape} | {f"params/{k}": v for k, v in incoming.parameters.items()}
    return Survey(
        digest=digest_of(
            {name: [list(shapes[name]), value.hexdigest()] for name, value in hashes.items()}
        ),
        probe=Block(
            y=np.concatenate([block.y for block in kept]),
            params={
                name: np.concatenate([block.params[name] for block in kept])
                for name in incoming.parameters
            },
        ),
    )


@contextlib.contextmanager
def opened_observations(
    source: str,
    channel: Channel,
    *,
    y: str | None = None,
    params: Mapping[str, str] | None = None,
    x_shape: tuple[int, ...] | None = None,
    channels_last: bool = False,
    limit: int | None = None,
) -> Iterator[Incoming]:
    """Open new observations, and check their shapes against a channel.

    Arguments:
        source: What `diffem ingest` reads or wrote: path or fsspec URL; or a run, for its own.
        channel: The channel that they came out of.
        y: Name of their array, where the source holds several.
        params: Names of the arrays of operator parameters, by the channel's name for each; those
            that have the channel's names are found without.
        x_shape: Shape of a clean sample; only compared with that of the channel.
        channels_last: Whether the bands of images are the last axis.
        limit: Use only the first so many.

    Raises:
        ValueError: They cannot be read, or cannot have come out of the channel.
    """
    if x_shape is not None and x_shape != channel.x_shape:
        raise IngestError(
            f"--x-shape is {x_shape} but the model makes samples of shape {channel.x_shape}; "
            "leave it out, or take another run"
        )
    if limit is not None and limit < 1:
        raise IngestError(f"--limit is {limit}; give 1 or more")
    seal = None
    if not source.startswith(_SOURCES_OF_THEIR_OWN):
        seal = _sealed(source)
    if seal is not None:
        if y is not None or params or channels_last:
            raise IngestError(
                f"{redact_url(source)} holds observations that are sealed, with names and shapes; "
                "leave --y, --param and --channels-last out"
            )
        stored = _Stored(source, seal, limit)
        _require_fit(stored, channel)
        yield stored
        return
    with opened_source(source, None) as found:
        # Parameters go by their own names, without being asked for.
        named = {name: name for name in channel.params_spec if name in found.arrays}
        named |= dict(params or {})
        roles = assign_roles(
            found,
            IngestRequest(
                source=source,
                url="",
                y=_name_of_y(found, named) if y is None else y,
                params=named,
                channels_last=channels_last,
                limit=limit,
            ),
            least=1,
        )
        streamed = _Streamed(found, roles)
        _require_fit(streamed, channel)
        yield streamed


def _sealed(source: str) -> ObservationsManifest | None:
    """Return the seal of a store that `diffem ingest` wrote, or of a run's observations."""
    try:
        objects = ObjectStore(source)
        if objects.local_path is not None and not objects.local_path.is_dir():
            return None
        return read_seal(objects)
    except DamageError as error:
        raise _damaged(source, error) from error
    except (StorageError, OSError):
        return None  # no store: the sources say what is wrong


def _damaged(source: str, error: DamageError) -> ValueError:
    return ValueError(
        f"the observations at {redact_url(source)} are damaged ({error.path}: {error.problem}); "
        "write them again, or give others"
    )


def _name_of_y(source: Source, params: Mapping[str, str]) -> str:
    """Choose the array of observations where none is named."""
    if source.clean:
        raise IngestError(
            f"{source.description} are clean samples, but observations are reconstructed; give "
            "corrupted ones (`diffem ingest SOURCE URL --corrupt CONFIG` makes some)"
        )
    if "y" in source.arrays:
        return "y"
    left = [name for name in source.arrays if name not in params.values()]
    if len(left) != 1:
        told = ", ".join(f"{name!r} {array.shape}" for name, array in source.arrays.items())
        raise IngestError(
            f"{source.description} holds {told}; say which one holds the observations (--y NAME)"
        )
    return left[0]


def _require_fit(incoming: Incoming, channel: Channel) -> None:
    require_fit(
        f"the observations in {incoming.description}",
        y_shape=incoming.y_shape,
        parameters=incoming.parameters,
        channel=channel,
        remedy="give it with --param NAME[=ARRAY]",
    )


class _Stored(Incoming):
    """Observations in a sealed store."""

    def __init__(self, source: str, seal: ObservationsManifest, limit: int | None) -> None:
        try:
            self._observations = GrownObservations(ObjectStore(source))
        except DamageError as error:
            raise _damaged(source, error) from error
        self._source = source
        self._rows = copy_rows(seal)
        super().__init__(
            redact_url(source),
            sample_ids=self._observations.sample_ids[: limit or None],
            y_shape=seal.y_shape,
            parameters=seal.parameters,
            units=seal.units,
        )

    @property
    def block_rows(self) -> int:
        return self._rows  # one object: the least that is decoded

    def blocks(self, rows: int, first: int = 0) -> Iterator[Block]:
        # Objects are decoded whole: as many rows as one holds are read at a time.
        held: Block | None = None
        begin = first * rows
        ahead = begin % self._rows
        for start in range(begin - ahead, len(self), self._rows):
            block = self._read(slice(start, min(start + self._rows, len(self))))
            held = _part(block, slice(ahead, None)) if held is None else _joined(held, block)
            while len(held) >= rows:
                yield _part(held, slice(0, rows))
                held = _part(held, slice(rows, None))
        if held is not None and len(held):
            yield held

    def _read(self, rows: slice) -> Block:
        try:
            y, params = self._observations.y(rows), self._observations.params(rows)
        except DamageError as error:
            raise _damaged(self._source, error) from error
        return Block(
            y=np.ascontiguousarray(y, np.float32),
            params={k: np.ascontiguousarray(v, np.float32) for k, v in params.items()},
        )


class _Streamed(Incoming):
    """Observations in a source of `diffem ingest`."""

    def __init__(self, source: Source, roles: Roles) -> None:
        assert roles.y is not None
        self._y: Role = roles.y
        self._params = dict(roles.params)
        super().__init__(
            source.description,
            sample_ids=np.arange(roles.samples),
            y_shape=roles.y.shape,
            parameters={name: role.shape for name, role in roles.params.items()},
            units=source.units,
        )

    def blocks(self, rows: int, first: int = 0) -> Iterator[Block]:
        roles = {"": self._y, **self._params}
        begin = first * rows
        streams = {
            name: recut(role.array.pieces(rows, len(self), begin), rows)
            for name, role in roles.items()
        }
        for start in range(begin, len(self), rows):
            found = {
                name: role.converted(next(streams[name]), start) for name, role in roles.items()
            }
            yield Block(y=found.pop(""), params=found)


def _part(block: Block, rows: slice) -> Block:
    return Block(y=block.y[rows], params={name: a[rows] for name, a in block.params.items()})


def _joined(first: Block, second: Block) -> Block:
    return Block(
        y=np.concatenate([first.y, second.y]),
        params={
            name: np.concatenate([array, second.params[name]])
            for name, array in first.params.items()
        },
    )
