"""Layouts of the Zarr stores: dimensions, types, shards, chunks, codecs and attributes.

    observations.zarr      sample, split, observation(sample, channel, y, x)
      params/              one array per operator parameter, e.g. mask(sample, mask_channel, y, x)
      truth/               clean(sample, channel, y, x), label(sample); for evaluation only
    reconstructions.zarr   sample, x_hat(sample, channel, y, x)

Vectors have `x_hat(sample, feature)`, `clean(sample, feature)` and
`observation(sample, measurement)`. The observation is not called `y`, nor the clean image `x`:
xarray takes an array with the name of a dimension for a coordinate and drops it from the data
variables. Several draws per observation will add a dimension `draw` after `sample`; a shard then
holds all draws of its samples.

A shard (one object, one atomic write) spans some samples and everything of them; inner chunks, the
unit of reading and of checksums, hold at most 3 MB and divide the shard. Floats are filled with
NaN, so that what was never written cannot be taken for data. Codecs, on noisy float32 images, one
thread, MB/s before compression:

    codec                       ratio   write    read
    none                         1.00   6,700  10,000
    zstd 1                       1.11     910   1,350
    blosc zstd 3 bitshuffle      1.27     430   1,080
    blosc lz4 5 bitshuffle       1.26   1,780   2,740    used, with crc32c after it: without a
                                                         checksum a flipped bit reads back wrong

These are models of our own, not pydantic-zarr's: its 0.9.2 (the last for Python 3.11) raises
NameError on writing over an existing array and accepts types that do not exist.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from storage_schemas._base import Record

__all__ = [
    "INNER_CHUNK_BYTES",
    "ArrayLayout",
    "Compression",
    "StoreLayout",
    "inner_chunk_rows",
    "observation_layout",
    "reconstruction_layout",
]

INNER_CHUNK_BYTES = 3_000_000
"""Largest inner chunk, in bytes before compression."""
OBSERVATION_CHUNK_ROWS = 4096
"""Most samples in an inner chunk of the observations."""
OBSERVATION_CHUNKS_PER_SHARD = 8
"""Inner chunks in a shard of the observations: at most 24 MB."""


class Compression(Record):
    """Blosc with its settings."""

    cname: Literal["lz4", "zstd"] = "lz4"
    """Compressor."""
    level: int = Field(5, ge=0, le=9)
    """Effort."""
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"] = "bitshuffle"
    """Rearrangement before compressing."""


class ArrayLayout(Record):
    """One array."""

    dims: tuple[str, ...] = Field(min_length=1)
    """Names of the dimensions."""
    shape: tuple[NonNegativeInt, ...]
    """Shape."""
    dtype: str
    """NumPy's name of the type."""
    chunks: tuple[PositiveInt, ...]
    """Inner chunks: the unit of reading."""
    shards: tuple[PositiveInt, ...] | None = None
    """Shards: one object each; None makes every chunk an object."""
    compression: Compression | None = Compression()
    """Compressor in front of the checksum; None stores plain bytes."""
    attributes: dict[str, Any] = Field(default_factory=dict)
    """Attributes, CF-like: `long_name`, `units`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        rank = len(self.shape)
        if len(self.dims) != rank or len(self.chunks) != rank:
            raise ValueError(
                f"dims {self.dims}, shape {self.shape} and chunks {self.chunks} must be as long"
            )
        if len(set(self.dims)) != rank:
            raise ValueError(f"dims {self.dims} must be different from each other")
        if self.shards is not None and (
            len(self.shards) != rank
            or any(s % c for s, c in zip(self.shards, self.chunks, strict=True))
        ):
            raise ValueError(f"chunks {self.chunks} must divide shards {self.shards}")
        if np.dtype(self.dtype).kind not in "fiub":
            raise ValueError(f"dtype {self.dtype!r} must be floating, integer or boolean")
        return self

    @property
    def object_rows(self) -> int:
        """Samples per object."""
        return (self.shards or self.chunks)[0]

    @property
    def fill(self) -> float | int | bool:
        """What stands where nothing was written: NaN for floats."""
        kind = np.dtype(self.dtype).kind
        return float("nan") if kind == "f" else False if kind == "b" else 0


class StoreLayout(Record):
    """A hierarchy of groups and arrays."""

    groups: dict[str, dict[str, Any]]
    """Attributes of each group, by path; the root is the empty path."""
    arrays: dict[str, ArrayLayout]
    """Arrays, by path."""


def inner_chunk_rows(rows: int, sample_bytes: int) -> int:
    """Return the largest divisor of `rows` whose samples fit in an inner chunk (at least 1)."""
    most = max(1, INNER_CHUNK_BYTES // max(1, sample_bytes))
    return max(d for d in range(1, min(rows, most) + 1) if rows % d == 0)


def clean_dims(x_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of a clean sample's dimensions: `channel, y, x` or `feature`."""
    match len(x_shape):
        case 1:
            return ("feature",)
        case 3:
            return ("channel", "y", "x")
        case _:
            raise ValueError(
                f"a sample has shape {x_shape} but must be a vector (features) or an image "
                "(channels, height, width)"
            )


def observation_dims(y_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of an observation's dimensions.

    Where an observed image has another size than the clean one, the dimension gets a name of its
    own, since one name has one size in a hierarchy that xarray opens.
    """
    if len(y_shape) == 1:
        return ("measurement",)
    return _sized_dims(y_shape, x_shape, prefix="observed")


def parameter_dims(
    name: str, shape: tuple[int, ...], *, y_shape: tuple[int, ...], x_shape: tuple[int, ...]
) -> tuple[str, ...]:
    """Return the names of an operator parameter's dimensions."""
    if len(shape) == 3 and len(x_shape) == 3:
        return _sized_dims(shape, x_shape, prefix=name)
    if len(y_shape) == len(x_shape) == 1 and shape == (*y_shape, *x_shape):
        return ("measurement", "feature")
    return tuple(f"{name}_{axis}" for axis in range(len(shape)))


def _sized_dims(
    shape: tuple[int, ...], x_shape: tuple[int, ...], *, prefix: str
) -> tuple[str, ...]:
    names = clean_dims(shape)
    known = dict(zip(clean_dims(x_shape), x_shape, strict=True))
    return tuple(
        name if known.get(name) == size else f"{prefix}_{name}"
        for name, size in zip(names, shape, strict=True)
    )


def reconstruction_layout(
    *,
    samples: int,
    x_shape: tuple[int, ...],
    dtype: str,
    shard_size: int,
    units: str,
    attributes: dict[str, Any],
) -> StoreLayout:
    """Return the layout of `reconstructions.zarr`.

    Arguments:
        samples: Number of reconstructions.
        x_shape: Shape of one.
        dtype: Stored type: `float32` or `float16`.
        shard_size: Reconstructions per E-step shard, which is one shard object.
        units: Unit of the values.
        attributes: Provenance, put on the group.
    """
    width = np.dtype(dtype).itemsize * int(np.prod(x_shape))
    chunk_rows = inner_chunk_rows(shard_size, width)
    x_hat = ArrayLayout(
        dims=("sample", *clean_dims(x_shape)),
        shape=(samples, *x_shape),
        dtype=dtype,
        chunks=(chunk_rows, *x_shape),
        shards=(shard_size, *x_shape),
        attributes={"long_name": "reconstruction: one draw from the posterior", "units": units},
    )
    return StoreLayout(
        groups={"": attributes}, arrays={"x_hat": x_hat, "sample": _sample_layout(samples)}
    )


def observation_layout(
    *,
    samples: int,
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    y_dtype: str,
    parameters: dict[str, tuple[tuple[int, ...], str]],
    x_dtype: str | None,
    label_dtype: str | None,
    units: str,
    attributes: dict[str, Any],
) -> StoreLayout:
    """Return the layout of `observations.zarr`, all arrays with the same samples per shard.

    Arguments:
        samples: Number of observations.
        x_shape: Shape of one clean sample.
        y_shape: Shape of one observation.
        y_dtype: Type of the observations.
        parameters: Shape and type of one sample's operator parameters, by name.
        x_dtype: Type of the clean samples, None where there are none.
        label_dtype: Type of the classes, None where there are none.
        units: Unit of the values.
        attributes: Provenance, put on the group.
    """
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...], str, dict[str, Any]]] = {
        "observation": (
            observation_dims(y_shape, x_shape),
            y_shape,
            y_dtype,
            {"long_name": "corrupted observation", "units": units, "coordinates": "split"},
        )
    }
    for name, (shape, dtype) in parameters.items():
        dims = parameter_dims(name, shape, y_shape=y_shape, x_shape=x_shape)
        note = {"long_name": f"operator parameter {name!r}", "units": "1"}
        wanted[f"params/{name}"] = (dims, shape, dtype, note)
    if x_dtype is not None:
        note = {"long_name": "clean sample, for evaluation only", "units": units}
        wanted["truth/clean"] = (clean_dims(x_shape), x_shape, x_dtype, note)
    if label_dtype is not None:
        note = {"long_name": "class, for evaluation only", "units": "1"}
        wanted["truth/label"] = ((), (), label_dtype, note)
    widest = max(np.dtype(t).itemsize * int(np.prod(shape)) for _, shape, t, _ in wanted.values())
    chunk_rows = 1
    while chunk_rows < OBSERVATION_CHUNK_ROWS and 2 * chunk_rows * widest <= INNER_CHUNK_BYTES:
        chunk_rows *= 2
    shard_rows = chunk_rows * OBSERVATION_CHUNKS_PER_SHARD
    arrays = {
        path: ArrayLayout(
            dims=("sample", *dims),
            shape=(samples, *shape),
            dtype=dtype,
            chunks=(chunk_rows, *shape),
            shards=(shard_rows, *shape),
            attributes=note,
        )
        for path, (dims, shape, dtype, note) in wanted.items()
    }
    arrays["sample"] = _sample_layout(samples)
    arrays["split"] = ArrayLayout(
        dims=("sample",),
        shape=(samples,),
        dtype="uint8",
        chunks=(max(1, samples),),
        attributes={
            "long_name": "split",
            "flag_values": [0, 1],
            "flag_meanings": "train holdout",
        },
    )
    groups: dict[str, dict[str, Any]] = {"": attributes}
    for path in arrays:
        parent = path.rpartition("/")[0]
        groups.setdefault(parent, {})
    return StoreLayout(groups=groups, arrays=arrays)


def _sample_layout(samples: int) -> ArrayLayout:
    return ArrayLayout(
        dims=("sample",),
        shape=(samples,),
        dtype="int64",
        chunks=(max(1, samples),),
        attributes={"long_name": "sample id in the source's own order"},
    )
