from typing import Any

import numpy as np
import pytest

from storage_schemas.errors import DamageError, IncompleteError, LayoutMismatch
from storage_schemas.iteration_store import IterationStore
from storage_schemas.objects import ObjectStore
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.storage.tiny_run import (
    PROVENANCE,
    SHARD,
    X_SHAPE,
    draw,
    lay_out,
    make_blocks,
    make_config,
    make_x_hat,
    write_start,
)


@pytest.fixture
def folder(any_url: str) -> IterationStore:
    """Iteration 0, laid out: 40 reconstructions in shards of 16, 16 and 8."""
    store = RunStore.create(any_url, make_config(), PROVENANCE)
    store.write_observations(make_blocks(), x_shape=X_SHAPE)
    write_start(store)
    return lay_out(store, 0)


def again(folder: IterationStore) -> IterationStore:
    """The same iteration as another process opens it."""
    return RunStore.open(folder.objects.url).iteration(folder.iteration)


def test_reconstructions_come_back(folder: IterationStore) -> None:
    assert again(folder).missing_shards() == [0, 1, 2]
    for shard in (2, 0, 1):
        draw(again(folder), shard)
    assert again(folder).missing_shards() == []
    whole = make_x_hat(0, 0, 40)
    reader = again(folder)
    np.testing.assert_array_equal(reader.read_reconstructions(), whole)
    np.testing.assert_array_equal(reader.read_reconstructions(slice(10, 35)), whole[10:35])
    assert reader.read_reconstructions(slice(5, 5)).shape == (0, *X_SHAPE)
    out = np.empty((8, *X_SHAPE), np.float64)
    assert reader.read_reconstructions(slice(32, None), out=out) is out
    np.testing.assert_array_equal(out, whole[32:])
    np.testing.assert_array_equal(reader.sample_ids(), [i * 3 for i in range(50) if i % 5])


def test_a_shard_counts_only_with_its_manifest_and_its_whole_object(
    folder: IterationStore,
) -> None:
    draw(folder, 1)
    manifest = folder.shard(1)
    assert manifest is not None
    assert (manifest.start, manifest.stop, manifest.seed) == (16, 32, 1001)
    manifest_path, object_path = folder.path("shards/00001.json"), folder.path(manifest.path)
    for path in (manifest_path, object_path):
        whole = folder.objects.read(path)
        for data in (None, b"", whole[:-2], whole + b"x"):
            if data is None:
                folder.objects.delete(path)
            else:
                folder.objects.write(path, data)
            assert again(folder).shard(1) is None
            assert again(folder).missing_shards() == [0, 1, 2]
            with pytest.raises(IncompleteError, match=r"iterations/000: 1 shards .* \(1\)"):
                again(folder).read_reconstructions(slice(16, 17))
        folder.objects.write(path, whole)
        assert again(folder).shard(1) == manifest


def test_a_flipped_bit_is_found_at_reading(folder: IterationStore) -> None:
    draw(folder, 0)
    manifest = folder.shard(0)
    assert manifest is not None
    path = folder.path(manifest.path)
    data = bytearray(folder.objects.read(path))
    data[len(data) // 2] ^= 4
    folder.objects.write(path, bytes(data))
    assert folder.shard(0) == manifest
    assert folder.shard(0, checksum=True) is None
    with pytest.raises(DamageError, match="cannot be decoded"):
        folder.read_reconstructions(slice(0, 16))


def test_writing_twice_is_harmless(folder: IterationStore) -> None:
    draw(folder, 0)
    before = folder.objects.read_many(folder.objects.list(folder.path("reconstructions.zarr")))
    draw(again(folder), 0)
    lay_out(RunStore.open(folder.objects), 0)
    after = folder.objects.read_many(folder.objects.list(folder.path("reconstructions.zarr")))
    assert after == before


@pytest.mark.parametrize(
    ("x_hat", "message"),
    [
        (np.zeros((15, *X_SHAPE)), r"has shape \(15, 1, 4, 4\) but shard 0 has \(16, 1, 4, 4\)"),
        (np.where(np.arange(16) == 9, np.nan, 0.0), "not finite in 1 of 16 rows .* in row 9"),
        (np.full(16, 1e300), "not finite in 16 of 16 rows as float32"),
    ],
)
def test_unusable_reconstructions_are_refused(
    x_hat: Any, message: str, folder: IterationStore
) -> None:
    if x_hat.ndim == 1:
        x_hat = np.broadcast_to(x_hat[:, None, None, None], (16, *X_SHAPE))
    with pytest.raises(ValueError, match=message):
        folder.write_shard(0, x_hat, seed=1, seconds=0.0)
    assert folder.missing_shards() == [0, 1, 2]


def test_a_shard_that_does_not_exist_is_refused(folder: IterationStore) -> None:
    with pytest.raises(ValueError, match="shard is 3 but there are shards 0 to 2"):
        folder.write_shard(3, np.zeros((8, *X_SHAPE)), seed=1, seconds=0.0)


def test_another_model_makes_the_shards_stale(folder: IterationStore) -> None:
    draw(folder, 0)
    other = "0" * 64
    given = {"x_shape": X_SHAPE, "shard_size": SHARD, "parent_digest": other, "seed": 7}
    folder.create_reconstructions(folder.sample_ids(), **given)  # type: ignore[arg-type]
    assert again(folder).missing_shards() == [0, 1, 2]
    draw(folder, 0)
    shard = again(folder).shard(0)
    assert shard is not None
    assert shard.parent_digest == other


def test_an_interrupted_new_layout_is_no_damage(
    folder: IterationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(folder, 0)
    given = {"x_shape": X_SHAPE, "shard_size": SHARD, "parent_digest": "0" * 64, "seed": 7}
    write, written = ObjectStore.write, 0

    def interrupted(self: ObjectStore, path: str, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise KeyboardInterrupt
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.create_reconstructions(folder.sample_ids(), **given)  # type: ignore[arg-type]
    assert verify(folder.objects).ok
    assert again(folder).reconstructions() is None
    folder.create_reconstructions(np.arange(40), **given)  # type: ignore[arg-type]
    assert again(folder).missing_shards() == [0, 1, 2]


def test_another_layout_is_refused_with_the_difference(folder: IterationStore) -> None:
    parent = "0" * 64
    with pytest.raises(LayoutMismatch, match=r"shards: \(16, 1, 4, 4\) -> \(8, 1, 4, 4\)"):
        folder.create_reconstructions(
            folder.sample_ids(), x_shape=X_SHAPE, shard_size=8, parent_digest=parent, seed=7
        )
    with pytest.raises(LayoutMismatch, match=r"shape: \(40, 1, 4, 4\) -> \(39, 1, 4, 4\)"):
        folder.create_reconstructions(
            folder.sample_ids()[1:], x_shape=X_SHAPE, shard_size=16, parent_digest=parent, seed=7
        )


@pytest.mark.parametrize("name", ["zarr.json", "x_hat/zarr.json", "sample/c/0"])
def test_damaged_metadata_is_noticed_and_laid_out_anew(name: str, folder: IterationStore) -> None:
    path = folder.path(f"reconstructions.zarr/{name}")
    whole = folder.objects.read(path)
    folder.objects.write(path, whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    if name == "x_hat/zarr.json":
        with pytest.raises(DamageError, match="does not answer to its checksum"):
            draw(again(folder), 0)
    if name == "sample/c/0":
        with pytest.raises(DamageError, match="does not answer to its checksum"):
            again(folder).sample_ids()
    lay_out(RunStore.open(folder.objects), 0)
    assert folder.objects.read(path) == whole


def test_float16_reconstructions(folder: IterationStore) -> None:
    store = RunStore.open(folder.objects)
    half = store.iteration(1)
    half.create_reconstructions(
        np.arange(20),
        x_shape=X_SHAPE,
        shard_size=16,
        parent_digest="0" * 64,
        seed=1,
        dtype="float16",
    )
    x_hat = make_x_hat(0, 0, 16)
    half.write_shard(0, x_hat, seed=1, seconds=0.0)
    read = half.read_reconstructions(slice(0, 16))
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, x_hat.astype(np.float16))
    with pytest.raises(ValueError, match="not finite in 1 of 4 rows as float16, first in row 16"):
        half.write_shard(
            1, np.full((4, *X_SHAPE), [[[[1e6]]], *[[[[1.0]]]] * 3]), seed=1, seconds=0.0
        )
