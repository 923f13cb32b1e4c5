import json
from typing import Any

import numpy as np
import pytest
import zarr

from storage_schemas import zarr_objects
from storage_schemas.errors import DamageError, LayoutMismatch
from storage_schemas.layout import (
    INNER_CHUNK_BYTES,
    ArrayLayout,
    StoreLayout,
    inner_chunk_rows,
    observation_layout,
    reconstruction_layout,
)
from tests.storage.tiny_run import X_SHAPE


def reconstructions(**changes: Any) -> StoreLayout:
    given: dict[str, Any] = {
        "samples": 40,
        "x_shape": X_SHAPE,
        "dtype": "float32",
        "shard_size": 16,
        "units": "1",
        "attributes": {"seed": 7},
    }
    return reconstruction_layout(**(given | changes))


def x_hat_metadata(**changes: Any) -> bytes:
    return zarr_objects.encode_metadata(reconstructions(**changes))["x_hat/zarr.json"]


@pytest.mark.parametrize(
    ("rows", "sample_bytes", "expected"),
    [(512, 256, 512), (512, 12_288, 128), (512, 49_152, 32), (7, 49_152, 7), (12, 10**9, 1)],
)
def test_inner_chunks_divide_the_shard_and_stay_small(
    rows: int, sample_bytes: int, expected: int
) -> None:
    assert inner_chunk_rows(rows, sample_bytes) == expected
    assert rows % expected == 0
    assert expected == 1 or expected * sample_bytes <= INNER_CHUNK_BYTES


def test_the_stored_codecs_are_those_that_were_measured() -> None:
    metadata = json.loads(x_hat_metadata())
    [sharding] = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    inner = sharding["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "blosc", "crc32c"]
    blosc = inner[1]["configuration"]
    assert (blosc["cname"], blosc["clevel"], blosc["shuffle"]) == ("lz4", 5, "bitshuffle")
    assert blosc["typesize"] == 4
    assert [c["name"] for c in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert metadata["fill_value"] == "NaN"
    assert metadata["dimension_names"] == ["sample", "channel", "y", "x"]


def test_vectors_have_features_and_measurements() -> None:
    assert reconstructions(x_shape=(5,)).arrays["x_hat"].dims == ("sample", "feature")
    layout = observation_layout(
        samples=9,
        x_shape=(5,),
        y_shape=(2,),
        y_dtype="float32",
        parameters={"matrix": ((2, 5), "float32"), "gain": ((), "float32")},
        x_dtype="float32",
        label_dtype=None,
        units="1",
        attributes={},
    )
    dims = {path: array.dims for path, array in layout.arrays.items()}
    assert dims == {
        "sample": ("sample",),
        "split": ("sample",),
        "observation": ("sample", "measurement"),
        "params/matrix": ("sample", "measurement", "feature"),
        "params/gain": ("sample",),
        "truth/clean": ("sample", "feature"),
    }


def test_dimensions_of_another_size_have_another_name() -> None:
    """xarray opens a hierarchy only if one name has one size in it."""
    layout = observation_layout(
        samples=9,
        x_shape=(3, 32, 32),
        y_shape=(3, 16, 16),
        y_dtype="float32",
        parameters={"mask": ((1, 32, 32), "bool")},
        x_dtype="float32",
        label_dtype="int64",
        units="1",
        attributes={},
    )
    assert layout.arrays["observation"].dims == ("sample", "channel", "observed_y", "observed_x")
    assert layout.arrays["params/mask"].dims == ("sample", "mask_channel", "y", "x")
    sizes: dict[str, int] = {}
    for array in layout.arrays.values():
        for name, size in zip(array.dims, array.shape, strict=True):
            assert sizes.setdefault(name, size) == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": ("sample", "sample")}, "different from each other"),
        ({"dims": ("sample",)}, "must be as long"),
        ({"chunks": (3, 4)}, "must divide shards"),
        ({"dtype": "U3"}, "floating, integer or boolean"),
    ],
)
def test_layouts_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "dims": ("sample", "feature"),
        "shape": (10, 4),
        "dtype": "float32",
        "chunks": (2, 4),
        "shards": (4, 4),
    }
    ArrayLayout(**given)
    with pytest.raises(ValueError, match=message):
        ArrayLayout(**(given | changes))


def test_what_is_encoded_here_is_what_zarr_writes(tmp_path: Any) -> None:
    """Our objects, encoded in memory, must be those that Zarr itself puts on the disk."""
    rows = np.random.default_rng(0).normal(size=(40, *X_SHAPE)).astype(np.float32)
    metadata = x_hat_metadata()
    (tmp_path / "zarr.json").write_bytes(metadata)
    array = zarr.open_array(str(tmp_path), mode="r+")
    array[:] = rows
    for start in range(0, 40, 16):
        [(key, data)] = zarr_objects.encode_rows(metadata, start, rows[start : start + 16]).items()
        assert (tmp_path / key).read_bytes() == data


def test_equal_rows_give_equal_bytes() -> None:
    rows = np.random.default_rng(0).normal(size=(16, *X_SHAPE)).astype(np.float32)
    metadata = x_hat_metadata()
    assert metadata == x_hat_metadata()
    assert zarr_objects.encode_rows(metadata, 16, rows) == zarr_objects.encode_rows(
        metadata, 16, rows.copy()
    )


@pytest.mark.parametrize(("start", "count"), [(8, 16), (0, 10), (16, 10), (0, 24)])
def test_rows_that_cut_an_object_are_refused(start: int, count: int) -> None:
    """Zarr itself would take them, and lose what another process writes into the same object."""
    with pytest.raises(AssertionError):
        zarr_objects.encode_rows(x_hat_metadata(), start, np.zeros((count, *X_SHAPE), np.float32))


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_objects_full_of_the_fill_value_are_written(value: float) -> None:
    rows = np.full((16, *X_SHAPE), value, np.float32)
    metadata = x_hat_metadata()
    objects = zarr_objects.encode_rows(metadata, 0, rows)
    assert [*objects] == ["c/0/0/0/0"]
    np.testing.assert_array_equal(
        zarr_objects.decode_rows(metadata, objects, 0, 16, path="p"), rows
    )


def test_flipped_bits_of_a_shard_are_found() -> None:
    rows = np.random.default_rng(0).normal(size=(16, *X_SHAPE)).astype(np.float32)
    metadata = x_hat_metadata()
    [(key, data)] = zarr_objects.encode_rows(metadata, 0, rows).items()
    positions = np.random.default_rng(1).choice(8 * len(data), 400, replace=False)
    for position in positions:
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(DamageError, match="cannot be decoded"):
            zarr_objects.decode_rows(metadata, {key: bytes(changed)}, 0, 16, path="p")


def test_truncations_of_a_shard_are_found() -> None:
    rows = np.random.default_rng(0).normal(size=(16, *X_SHAPE)).astype(np.float32)
    metadata = x_hat_metadata()
    [(key, data)] = zarr_objects.encode_rows(metadata, 0, rows).items()
    for length in range(0, len(data), 7):
        with pytest.raises(DamageError):
            zarr_objects.decode_rows(metadata, {key: data[:length]}, 0, 16, path="p")


def test_another_layout_is_named() -> None:
    stored = x_hat_metadata()
    zarr_objects.require_same_layout("p", stored=stored, given=x_hat_metadata())
    zarr_objects.require_same_layout("p", stored=stored, given=x_hat_metadata(attributes={}))
    with pytest.raises(
        LayoutMismatch, match=r"shape: \(40, 1, 4, 4\) -> \(41, 1, 4, 4\);"
    ) as error:
        zarr_objects.require_same_layout("p", stored=stored, given=x_hat_metadata(samples=41))
    assert len(error.value.differences) == 1
