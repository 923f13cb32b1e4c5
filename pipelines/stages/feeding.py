"""What a stage keeps at hand of a split that may be larger than memory.

A training goes through all reconstructions in random order, many times. Those that fit into the
runner's budget are kept in memory. Others are decoded once, shard by shard, into a scratch file
that is mapped into memory: the operating system keeps in memory what there is room for, and the
trainer reads the same numbers in the same order. Stages that need a sample of the split only
(evaluation, Gaussian start, observed operators) read some rows, spread evenly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage_schemas.iteration_store import IterationStore

__all__ = ["gathered", "spread_rows"]

_GIB = 2**30
_MANY, _RUN = 2**22, 64


def spread_rows(available: int, wanted: int) -> NDArray[np.int64]:
    """Choose at most `wanted` of `available` rows, spread evenly; all of them if they are fewer.

    Of many millions, runs of neighbours are chosen: rows that each lie in an object of their own
    would have as many whole objects read.

    Returns:
        Row numbers, rising, shape (min(available, wanted),).
    """
    count = min(available, wanted)
    run = _RUN if available >= max(_MANY, _RUN * count) else 1
    row = np.arange(count, dtype=np.int64)
    return row // run * run * available // max(1, count) + row % run


@contextmanager
def gathered(
    reconstructions: IterationStore, rows: NDArray[np.int64], *, memory_gb: float
) -> Iterator[Tensor]:
    """Hold some reconstructions of an iteration at hand.

    Arguments:
        reconstructions: The iteration, its shards complete.
        rows: Which of them, rising.
        memory_gb: Largest size, in GiB, that is kept in memory; more goes through a file in the
            folder for temporary files (`TMPDIR`), which is gone afterwards.

    Yields:
        Float32 reconstructions of shape (len(rows), *x_shape), in the data's units.

    Raises:
        OSError: There is no room for the file.
    """
    plan = reconstructions.reconstructions()
    assert plan is not None, "the E-step comes first"
    shape = (len(rows), *plan.x_shape)
    size = 4 * int(np.prod(shape))
    if size <= memory_gb * _GIB:
        held = np.empty(shape, np.float32)
        _fill(held, reconstructions, rows)
        yield torch.from_numpy(held)
        return
    with tempfile.TemporaryFile(prefix="diffem-") as file:
        file.truncate(size)
        mapped = np.memmap(file, np.float32, "r+", shape=shape)
        _fill(mapped, reconstructions, rows)
        yield torch.from_numpy(mapped)


def _fill(
    out: NDArray[np.float32], reconstructions: IterationStore, rows: NDArray[np.int64]
) -> None:
    """Decode shard by shard, so that beside `out` one shard is in memory."""
    plan = reconstructions.reconstructions()
    assert plan is not None
    for shard in range(plan.shards):
        start, stop = plan.rows(shard)
        first, last = np.searchsorted(rows, (start, stop))
        if first < last:
            decoded = reconstructions.read_reconstructions(slice(start, stop))
            out[first:last] = decoded[rows[first:last] - start]
