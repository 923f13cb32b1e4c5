"""How fast and how small: the codecs of the stores, measured here and now.

Rows are encoded into one shard object and decoded again, as `zarr_objects` does for every shard;
the best of several repetitions counts, since other work only ever slows one down. MB are of
numbers before compression. `layout` states a table measured on a quiet machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat

from storage_schemas._base import Record
from storage_schemas.layout import ArrayLayout, Compression, StoreLayout, inner_chunk_rows

__all__ = ["CODECS", "CodecSpeed", "measure_codecs", "noisy_images"]

CODECS: dict[str, Compression | None] = {
    "none": None,
    "blosc lz4 5 noshuffle": Compression(shuffle="noshuffle"),
    "blosc lz4 5 shuffle": Compression(shuffle="shuffle"),
    "blosc lz4 5 bitshuffle": Compression(),
    "blosc zstd 1 bitshuffle": Compression(cname="zstd", level=1),
    "blosc zstd 3 bitshuffle": Compression(cname="zstd", level=3),
}
"""What is compared, each with crc32c after it."""

_Result = TypeVar("_Result")


class CodecSpeed(Record):
    """One line of the table."""

    codec: str
    """Name in `CODECS`."""
    ratio: PositiveFloat
    """Bytes of the numbers over bytes of the object."""
    write_mb_s: PositiveFloat
    """Encoding, MB/s."""
    read_mb_s: PositiveFloat
    """Decoding, checksums compared, MB/s."""


def noisy_images(n: int, *, shape: tuple[int, ...] = (3, 32, 32)) -> NDArray[np.float32]:
    """Return smooth images with noise, such as reconstructions are: float32 in [-2, 2] or so.

    Arguments:
        n: How many.
        shape: Shape of one, (channels, height, width).

    Returns:
        Shape (n, *shape).
    """
    rng = np.random.default_rng(0)
    channels, height, width = shape
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    frequency = rng.uniform(1, 6, size=(n, channels, 1, 1))
    phase = rng.uniform(0, 6, size=(n, channels, 1, 1))
    smooth = np.sin(frequency * (x + 2 * y) + phase)
    return (smooth + 0.05 * rng.normal(size=smooth.shape)).astype(np.float32)


def measure_codecs(rows: NDArray[Any], *, repetitions: int = 5) -> list[CodecSpeed]:
    """Measure ratio and speed of each codec.

    Arguments:
        rows: Numbers of one shard, shape (n, ...).
        repetitions: How often each is measured; the best counts.
    """
    return [
        _measured(name, compression, rows, repetitions) for name, compression in CODECS.items()
    ]


def _measured(
    name: str, compression: Compression | None, rows: NDArray[Any], repetitions: int
) -> CodecSpeed:
    from storage_schemas import zarr_objects

    layout = ArrayLayout(
        dims=tuple(f"axis_{axis}" for axis in range(rows.ndim)),
        shape=rows.shape,
        dtype=rows.dtype.name,
        chunks=(inner_chunk_rows(len(rows), rows[0].nbytes), *rows.shape[1:]),
        shards=rows.shape,
        compression=compression,
    )
    store = StoreLayout(groups={"": {}}, arrays={"rows": layout})
    metadata = zarr_objects.encode_metadata(store)["rows/zarr.json"]
    encode_seconds, objects = _best(
        lambda: zarr_objects.encode_rows(metadata, 0, rows), repetitions
    )
    decode_seconds, decoded = _best(
        lambda: zarr_objects.decode_rows(metadata, objects, 0, len(rows), path=name), repetitions
    )
    assert np.array_equal(decoded, rows, equal_nan=True)
    return CodecSpeed(
        codec=name,
        ratio=rows.nbytes / sum(len(data) for data in objects.values()),
        write_mb_s=rows.nbytes / 1e6 / encode_seconds,
        read_mb_s=rows.nbytes / 1e6 / decode_seconds,
    )


def _best(work: Callable[[], _Result], repetitions: int) -> tuple[float, _Result]:
    seconds = float("inf")
    for _ in range(repetitions):
        began = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds, result
