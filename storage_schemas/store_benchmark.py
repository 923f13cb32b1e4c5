"""How fast a store is: writing, reading whole, and random minibatches, at any URL.

Images with noise are written as observations are (the same layout, codecs, checksums and manifest
as in a run), then read by rows. MB are of numbers before compression. Timings of a shared machine
wander: compare what one call prints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from storage_schemas._base import Record
from storage_schemas.benchmark import noisy_images
from storage_schemas.layout import StoreLayout, observation_layout
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import ObservationBlock, Observations, write_observations

__all__ = ["StorePlan", "StoreSpeed", "measure_store", "plan_store"]

_BLOCK = 1000
_BATCH = 256


class StoreSpeed(Record):
    """What one store does."""

    url: str
    """Where."""
    samples: PositiveInt
    """Samples."""
    x_shape: tuple[PositiveInt, ...]
    """Shape of one."""
    mb: PositiveFloat
    """Numbers, before compression."""
    ratio: PositiveFloat
    """Numbers over bytes of the objects."""
    objects: PositiveInt
    """Objects that were written."""
    write_mb_s: PositiveFloat
    """Writing all, MB/s, one writer."""
    read_mb_s: PositiveFloat
    """Reading all in order, MB/s, checksums compared."""
    minibatches_s: NonNegativeFloat
    """Minibatches of 256 random samples read per second straight from the store."""


class StorePlan(Record):
    """What a store would be, from its layout alone."""

    samples: PositiveInt
    """Samples."""
    x_shape: tuple[PositiveInt, ...]
    """Shape of one."""
    mb: PositiveFloat
    """Numbers, before compression."""
    objects: PositiveInt
    """Objects that hold the observations."""
    object_mb: PositiveFloat
    """Numbers in one of them, before compression."""
    inner_chunks_per_object: PositiveInt
    """Parts of an object that are compressed and checked on their own."""
    write_requests: PositiveInt
    """Objects in all, ids, split, metadata and seal included: each is written by one request."""
    read_requests: PositiveInt
    """Requests of a reader of all observations, one object at a time."""
    minibatch_requests: PositiveFloat
    """Objects, of so many requests, that 256 random samples lie in on average."""
    minibatch_mb: PositiveFloat
    """Numbers that are decoded for such a minibatch, since objects are read whole."""
    writer_mb: PositiveFloat
    """What a writer holds: an object's samples, collected, and twice encoded."""


def measure_store(
    url: str, *, samples: int, x_shape: tuple[int, ...], minibatches: int = 3
) -> StoreSpeed:
    """Write images to an empty place, and read them.

    Arguments:
        url: An empty folder, or a URL under which nothing is yet.
        samples: How many.
        x_shape: Shape (C, H, W) of one.
        minibatches: Random minibatches that are read.

    Returns:
        The speeds.

    Raises:
        ValueError: Something is there already.
    """
    objects = ObjectStore(url)
    if objects.list():
        raise ValueError(f"{url} is not empty; give a place where nothing is yet")
    pattern = noisy_images(min(_BLOCK, samples), shape=x_shape)

    def blocks() -> Iterator[ObservationBlock]:
        for start in range(0, samples, len(pattern)):
            count = min(len(pattern), samples - start)
            yield ObservationBlock(
                sample=np.arange(start, start + count),
                holdout=np.zeros(count, bool),
                y=pattern[:count],
            )

    began = time.perf_counter()
    seal = write_observations(
        objects, blocks(), x_shape=x_shape, units="1", source="benchmark", attributes={}
    )
    write_seconds = time.perf_counter() - began
    mb = 4e-6 * samples * math.prod(x_shape)

    observations = Observations(objects)
    rows = objects_rows(samples, x_shape)
    began = time.perf_counter()
    for start in range(0, samples, rows):
        observations.y(slice(start, start + rows))
    read_seconds = time.perf_counter() - began

    rng = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(minibatches):
        observations.y(np.sort(rng.integers(0, samples, _BATCH)))
    batch_seconds = time.perf_counter() - began
    stored = sum(record.bytes for record in seal.objects.values())
    return StoreSpeed(
        url=url,
        samples=samples,
        x_shape=x_shape,
        mb=mb,
        ratio=1e6 * mb / stored,
        objects=len(seal.objects),
        write_mb_s=mb / write_seconds,
        read_mb_s=mb / read_seconds,
        minibatches_s=minibatches / batch_seconds,
    )


def objects_rows(samples: int, x_shape: tuple[int, ...]) -> int:
    """Return the samples of one object of the observations."""
    return _layout(samples, x_shape).arrays["observation"].object_rows


def plan_store(*, samples: int, x_shape: tuple[int, ...]) -> StorePlan:
    """Say what a store would be, without writing anything.

    Arguments:
        samples: How many.
        x_shape: Shape (C, H, W) of one.
    """
    layout = _layout(samples, x_shape)
    array = layout.arrays["observation"]
    width = 4e-6 * math.prod(x_shape)
    objects = math.ceil(samples / array.object_rows)
    small = len(layout.arrays) - 1  # ids and split: one object each
    touched = objects * (1 - (1 - 1 / objects) ** _BATCH)
    return StorePlan(
        samples=samples,
        x_shape=x_shape,
        mb=samples * width,
        objects=objects,
        object_mb=array.object_rows * width,
        inner_chunks_per_object=array.object_rows // array.chunks[0],
        write_requests=objects + small + len(layout.arrays) + len(layout.groups) + 1,
        # The seal; metadata and object of the ids; metadata of the observations.
        read_requests=objects + 4,
        minibatch_requests=touched,
        minibatch_mb=touched * array.object_rows * width,
        writer_mb=3 * array.object_rows * width,
    )


def _layout(samples: int, x_shape: tuple[int, ...]) -> StoreLayout:
    return observation_layout(
        samples=samples,
        x_shape=x_shape,
        y_shape=x_shape,
        y_dtype="float32",
        parameters={},
        x_dtype=None,
        label_dtype=None,
        units="1",
        attributes={},
    )
