"""Observations that grow: what was added later is a store of its own inside the first one.

    observations.zarr, .json                     the first generation
    generations/001/observations.zarr, .json     what was added once, later
    generations/002/ ...                         ... and again

A generation is written like any observations and counts when its own seal is there, which nothing
ever replaces. Whoever reads a store while it grows goes on reading what was sealed when it was
opened, and a writer that is killed leaves the generations before it as they were. Observations
that are added belong to the training split: those held out are the first generation's, so that
numbers of before and after can be compared.

The sample ids of a store count on from one generation to the next. In a run, the seal of a
generation says which EM iteration was the first to learn from it.
"""

from __future__ import annotations

from itertools import count

import numpy as np
from numpy.typing import NDArray

from storage_schemas.errors import IncompleteError
from storage_schemas.manifests import ObservationsManifest
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import SEAL, Observations, Split, read_seal

__all__ = [
    "GENERATIONS",
    "GrownObservations",
    "generation_folder",
    "generation_store",
    "read_generations",
]

GENERATIONS = "generations"


def generation_folder(number: int) -> str:
    """Return the path of a generation in its store; the first one, 0, is the store itself."""
    return f"{GENERATIONS}/{number:03d}" if number else ""


def generation_store(objects: ObjectStore, number: int) -> ObjectStore:
    """Return the store of a generation, whether or not anything of it is there."""
    return objects.below(generation_folder(number)) if number else objects


def read_generations(objects: ObjectStore) -> list[ObservationsManifest]:
    """Return the seals of the generations, in order, up to the first that is not complete."""
    first = read_seal(objects)
    if first is None:
        return []
    seals = [first]
    for number in count(1):
        seal = read_seal(generation_store(objects, number))
        if seal is None:
            return seals
        seals.append(seal)
    raise AssertionError("count never ends")


class GrownObservations(Observations):
    """The observations of several generations, one after the other, or one split of them.

    Arguments:
        objects: The run's store, or one that `diffem ingest` wrote.
        split: `train`, `holdout`, or None for all.
        generations: How many, from the first on; all that are complete by default.

    Raises:
        IncompleteError: If one of them is not sealed.
        DamageError: Here and at every reading, if an object is not what was sealed.
    """

    def __init__(
        self, objects: ObjectStore, split: Split | None = None, generations: int | None = None
    ) -> None:
        super().__init__(objects, split)
        if generations is None:
            generations = len(read_generations(objects))
        if generations < 1:
            raise IncompleteError(f"{objects} has no {SEAL}: the observations are not complete")
        self._later = [
            Observations(generation_store(objects, number)) for number in range(1, generations)
        ]
        sizes = [self.manifest.samples, *(later.manifest.samples for later in self._later)]
        self._starts = np.cumsum([0, *sizes])
        if split != "holdout" and self._later:
            self._rows = np.concatenate(
                [self._rows, np.arange(self._starts[1], self._starts[-1], dtype=self._rows.dtype)]
            )
            self.sample_ids = np.concatenate(
                [self.sample_ids, *(later.sample_ids for later in self._later)]
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many of this split are in each generation."""
        bounds = np.searchsorted(self._rows, self._starts)
        return tuple(int(n) for n in np.diff(bounds))

    def _read(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        later = getattr(self, "_later", [])
        if not later or not len(rows) or rows.max() < self._starts[1]:
            return super()._read(name, rows)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        out: NDArray[np.generic] | None = None
        for part in np.unique(parts):
            inside = np.flatnonzero(parts == part)
            wanted = rows[inside] - self._starts[part]
            read = super()._read if part == 0 else later[part - 1]._read
            values = read(name, wanted)
            if out is None:
                out = np.empty((len(rows), *values.shape[1:]), values.dtype)
            out[inside] = values
        assert out is not None
        return out
