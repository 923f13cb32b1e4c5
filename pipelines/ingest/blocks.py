"""Blocks of observations: read, checked, converted, and corrupted where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.ingest.base import Source, recut
from pipelines.ingest.request import IngestRequest
from pipelines.ingest.roles import Role, Roles, assign_roles
from pipelines.sources import choose_holdout
from storage_schemas.documents import digest_of
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.observations import ObservationBlock
from storage_schemas.provenance import collect_provenance

__all__ = ["TITLE", "IngestWork"]

TITLE = "DiffEM observations"
"""Title of what an ingest writes, by which it knows its own."""
_BLOCK_BYTES = 2**23
_LARGEST_BLOCK = 4096
_WIDTHS = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "bool": (0.0, 1.0)}


class IngestWork:
    """An ingest: the arrays, the corruption, and what is learned of the values on the way.

    Arguments:
        request: What was asked for.
        source: The open source.
        there: The seals of what it is added to; none for the first observations of a store.

    Raises:
        IngestError: The arrays are not what was said of them.
    """

    def __init__(
        self,
        request: IngestRequest,
        source: Source,
        there: Sequence[ObservationsManifest] = (),
    ) -> None:
        self.request = request
        self.adds = len(there)
        """Generations that are there."""
        self.after = sum(seal.samples for seal in there)
        """Observations that are there."""
        self.source = source
        self.roles: Roles = assign_roles(source, request)
        self.samples = self.roles.samples
        corruption = request.corruption
        self.seed = request.seed if corruption is None else corruption.seed
        self.holdout_count = 0 if there else request.held_out(self.samples)
        self.units = request.units or source.units or (there[0].units if there else "1")
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
            known = there[0].x_shape if there else y.shape
            self.x_shape = x.shape if x is not None else request.x_shape or known

    def attributes(self, source: str) -> dict[str, Any]:
        """Return the provenance: nothing that differs where the numbers are the same."""
        corruption = self.request.corruption
        made = {} if corruption is None else {"channel": corruption.channel.kind}
        return {"title": TITLE, "source": source, **made}

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

    def digest(self) -> str:
        """Return a digest of all that decides the numbers, apart from the source's content."""
        request, made_by = self.request, collect_provenance()
        corruption = request.corruption
        return digest_of(
            {
                "source": self.source.description,
                "arrays": {
                    name: [role.array.name, list(role.array.shape), role.array.dtype.str]
                    for name, role in self.roles.all.items()
                },
                "shapes": {name: list(role.shape) for name, role in self.roles.all.items()},
                "channels_last": request.channels_last,
                "x_shape": list(self.x_shape),
                "samples": [self.samples, self.holdout_count, self.after],
                "seed": self.seed,
                "range": request.value_range and list(request.value_range),
                "units": self.units,
                "channel": corruption and corruption.channel.model_dump(mode="json"),
                "made_by": made_by.model_dump(mode="json"),
            }
        )

    def blocks(self, start: int = 0) -> Iterator[ObservationBlock]:
        """Yield checked blocks from a sample on, each with what belongs to it."""
        if start >= self.samples:
            return
        # Samples are corrupted in whole blocks, each with a seed of its own.
        begin = start if self.corrupt is None else start - start % self.rows
        streams = {name: self._stream(role, begin) for name, role in self.roles.all.items()}
        for first in range(begin, self.samples, self.rows):
            arrays = {
                name: role.converted(next(streams[name]), first)
                for name, role in self.roles.all.items()
            }
            y, params = self._observed(arrays, first)
            fresh = slice(max(0, start - first), None)
            yield self._block(
                first + fresh.start,
                {
                    "observation": y[fresh],
                    **{f"params/{name}": values[fresh] for name, values in params.items()},
                    **{
                        path: arrays[name][fresh]
                        for path, name in (("truth/clean", "x"), ("truth/label", "label"))
                        if name in arrays
                    },
                },
            )

    def stored_blocks(
        self, shards: Iterator[Mapping[str, NDArray[Any]]]
    ) -> Iterator[ObservationBlock]:
        """Yield the blocks that are in the store already."""
        start = 0
        for arrays in shards:
            yield self._block(start, arrays)
            start += len(arrays["observation"])

    def _block(self, start: int, arrays: Mapping[str, NDArray[Any]]) -> ObservationBlock:
        """Look at the range of some samples, and put them together with their ids and split."""
        role = self.roles.x or self.roles.y
        assert role is not None
        values = arrays["observation" if self.roles.x is None else "truth/clean"]
        role.require_range(values, start, self.request.value_range)
        self.smallest = min(self.smallest, float(values.min()))
        self.largest = max(self.largest, float(values.max()))
        stop = start + len(values)
        return ObservationBlock(
            sample=np.arange(self.after + start, self.after + stop),
            holdout=self._holdout[start:stop],
            y=arrays["observation"],
            params={
                path.removeprefix("params/"): values
                for path, values in arrays.items()
                if path.startswith("params/")
            },
            x=arrays.get("truth/clean"),
            label=arrays.get("truth/label"),
        )

    @cached_property
    def _holdout(self) -> NDArray[np.bool_]:
        if self.adds:
            return np.zeros(self.samples, bool)
        return choose_holdout(self.samples, self.holdout_count, seed=self.seed)

    def _observed(
        self, arrays: dict[str, NDArray[Any]], start: int
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        if self.corrupt is None:
            return arrays["y"], {name: arrays[f"param {name}"] for name in self.roles.params}
        # Blocks of what is there have seeds of their own, the last of them perhaps a short one.
        block = -(-self.after // self.rows) + start // self.rows
        y, params = self.corrupt(self.channel, arrays["x"], seed=self.seed, block=block)
        return y, params

    def _stream(self, role: Role, start: int) -> Iterator[NDArray[Any]]:
        return recut(role.array.pieces(self.rows, self.samples, start), self.rows)

    def _rows(self) -> int:
        widest = max(
            4 * math.prod(role.shape) + role.array.dtype.itemsize * math.prod(role.array.shape[1:])
            for role in self.roles.all.values()
        )
        return max(1, min(_LARGEST_BLOCK, _BLOCK_BYTES // widest))
