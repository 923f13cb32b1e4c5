from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from storage_schemas import observations as module
from storage_schemas.errors import BadObservations, DamageError, IncompleteError
from storage_schemas.observations import ObservationBlock
from storage_schemas.run_store import RunStore
from tests.storage.tiny_run import (
    PROVENANCE,
    SAMPLES,
    X_SHAPE,
    make_block,
    make_blocks,
    make_config,
    resume_run,
)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Observations in shards of 8 rows, so that 50 of them make several objects."""
    monkeypatch.setattr("storage_schemas.layout.OBSERVATION_CHUNK_ROWS", 4)
    monkeypatch.setattr("storage_schemas.layout.OBSERVATION_CHUNKS_PER_SHARD", 2)


def make_store(url: str) -> RunStore:
    return RunStore.create(url, make_config(), PROVENANCE)


def test_observations_come_back(any_url: str, small_shards: None) -> None:
    store = make_store(any_url)
    assert store.observations_manifest() is None
    assert not store.has_observations()
    seal = store.write_observations(
        make_blocks(), x_shape=X_SHAPE, units="grey level", source="test"
    )
    assert store.has_observations()
    assert (seal.samples, seal.holdout, seal.y_shape) == (SAMPLES, 10, X_SHAPE)
    assert sum("observation/c/" in path for path in seal.objects) == 7
    everything = make_block(0, SAMPLES)
    assert everything.x is not None
    for split in (None, "train", "holdout"):
        chosen = {
            None: np.ones(SAMPLES, bool),
            "train": ~everything.holdout,
            "holdout": everything.holdout,
        }[split]
        reader = RunStore.open(store.objects).observations(split)  # type: ignore[arg-type]
        assert len(reader) == chosen.sum()
        np.testing.assert_array_equal(reader.sample_ids, everything.sample[chosen])
        np.testing.assert_array_equal(reader.y(), everything.y[chosen])
        np.testing.assert_array_equal(reader.params()["mask"], everything.params["mask"][chosen])
        np.testing.assert_array_equal(reader.truth(), everything.x[chosen])
        np.testing.assert_array_equal(reader.labels(), everything.label[chosen])
        rows = np.array([7, 0, 7, 9])
        np.testing.assert_array_equal(reader.y(rows), everything.y[chosen][rows])
        np.testing.assert_array_equal(reader.y(slice(3, 9)), everything.y[chosen][3:9])
        assert reader.y(slice(0, 0)).shape == (0, *X_SHAPE)
        assert reader.params()["mask"].dtype == bool


def test_the_cutting_into_blocks_does_not_matter(tmp_path: object, small_shards: None) -> None:
    bytes_by_cut = []
    for size in (1, 8, 13, 50):
        store = make_store(f"{tmp_path}/{size}")
        seal = store.write_observations(make_blocks(size=size), x_shape=X_SHAPE)
        bytes_by_cut.append((seal.data_digest, seal.objects))
    assert all(found == bytes_by_cut[0] for found in bytes_by_cut)


def test_the_digest_names_every_number(tmp_path: object) -> None:
    block = make_block(0, 10)
    assert block.x is not None
    assert block.label is not None
    changed = {
        "same": block,
        "y": replace(block, y=block.y + 1),
        "sample": replace(block, sample=block.sample + 1),
        "holdout": replace(block, holdout=~block.holdout),
        "params": replace(block, params={"mask": ~block.params["mask"]}),
        "name": replace(block, params={"other": block.params["mask"]}),
        "x": replace(block, x=block.x + 1),
        "label": replace(block, label=block.label + 1),
        "dtype": replace(block, y=block.y.astype(np.float64)),
    }
    digests = {
        name: make_store(f"{tmp_path}/{name}")
        .write_observations([other], x_shape=X_SHAPE)
        .data_digest
        for name, other in changed.items()
    }
    assert len(set(digests.values())) == len(changed)


def test_no_clean_data_is_needed(tmp_path: object) -> None:
    store = make_store(f"{tmp_path}/run")
    block = replace(make_block(0, 10), x=None, label=None)
    seal = store.write_observations([block], x_shape=X_SHAPE)
    reader = store.observations()
    assert (seal.truth, seal.labels, reader.truth(), reader.labels()) == (False, False, None, None)
    assert not [path for path in store.objects.list() if "truth" in path]


def test_an_interrupted_stream_leaves_nothing_that_counts(
    tmp_path: object, small_shards: None
) -> None:
    def breaking() -> Iterator[ObservationBlock]:
        yield make_block(0, 30)
        raise KeyboardInterrupt

    store = make_store(f"{tmp_path}/run")
    with pytest.raises(KeyboardInterrupt):
        store.write_observations(breaking(), x_shape=X_SHAPE)
    assert [path for path in store.objects.list() if "observation/c/" in path]
    assert not store.has_observations()
    with pytest.raises(IncompleteError, match="not complete; run `diffem run`"):
        store.observations()
    seal = store.write_observations(make_blocks(samples=10), x_shape=X_SHAPE)
    assert seal.objects.keys() == set(store.objects.list("observations.zarr"))


def bad_blocks() -> dict[str, tuple[list[ObservationBlock], str]]:
    good, x_shape = make_block(0, 10), X_SHAPE
    nan, infinite = good.y.copy(), good.y.copy()
    nan[7, 0, 1, 1] = np.nan
    infinite[2:4] = np.inf
    later = make_block(10, 20)
    assert good.x is not None
    return {
        "nan": (
            [good, replace(later, y=nan)],
            r"sample 51 \(row 17\): `observation` holds NaN or infinity, as do 1 of 10",
        ),
        "infinite": ([replace(good, y=infinite)], r"sample 6 \(row 2\).*as do 2 of 10 samples"),
        "shape": (
            [good, replace(later, y=later.y[:, :, :3])],
            r"rows 10 to 19: `observation` is float32 \(1, 3, 4\) but the rows before have "
            r"float32 \(1, 4, 4\)",
        ),
        "dtype": ([good, replace(later, y=later.y.astype(np.float64))], "float64"),
        "missing": ([good, replace(later, params={})], "`params/mask` is missing but"),
        "lengths": ([replace(good, y=good.y[:9])], "`observation` has 9 rows for 10 samples"),
        "twice": ([good, replace(later, sample=later.sample - 3)], "sample 27 occurs 2 times"),
        "none": ([], "there are no observations"),
        "clean": (
            [replace(good, x=good.x[:, :, :3])],
            rf"`x` has shape \(1, 3, 4\) but a clean sample has \({x_shape[0]}, 4, 4\)",
        ),
    }


@pytest.mark.parametrize("kind", [*bad_blocks()])
def test_unusable_observations_are_refused(kind: str, tmp_path: object) -> None:
    blocks, message = bad_blocks()[kind]
    store = make_store(f"{tmp_path}/run")
    with pytest.raises(BadObservations, match=message):
        store.write_observations(blocks, x_shape=X_SHAPE)
    assert not store.has_observations()


def test_a_sealed_store_takes_the_same_numbers_only(tmp_path: object, small_shards: None) -> None:
    store = make_store(f"{tmp_path}/run")
    seal = store.write_observations(make_blocks(), x_shape=X_SHAPE)
    before = store.objects.read_many(store.objects.list())
    assert store.write_observations(make_blocks(size=7), x_shape=X_SHAPE) == seal
    others = [replace(block, y=block.y + 1) for block in make_blocks()]
    with pytest.raises(BadObservations, match=r"are not those sealed in observations\.json"):
        store.write_observations(others, x_shape=X_SHAPE)
    with pytest.raises(BadObservations, match="observations"):
        store.write_observations(make_blocks(samples=SAMPLES - 1), x_shape=X_SHAPE)
    assert store.objects.read_many(store.objects.list()) == before


def test_a_run_keeps_the_observations_that_it_was_computed_from(tmp_path: object) -> None:
    store = resume_run(f"{tmp_path}/run")
    seal = store.observations_manifest()
    assert seal is not None
    store.objects.delete("observations.json")
    with pytest.raises(BadObservations, match="not those that this run was computed from"):
        store.write_observations(make_blocks(samples=SAMPLES - 1), x_shape=X_SHAPE)
    assert not store.has_observations()
    assert store.write_observations(make_blocks(), x_shape=X_SHAPE).data_digest == seal.data_digest


def test_damage_is_found_at_reading_and_repaired_by_writing(
    tmp_path: object, small_shards: None
) -> None:
    store = make_store(f"{tmp_path}/run")
    store.write_observations(make_blocks(), x_shape=X_SHAPE)
    before = store.objects.read_many(store.objects.list())
    path = "observations.zarr/observation/c/3/0/0/0"
    whole = store.objects.read(path)
    damages = {
        "is missing": None,
        "has 0 bytes": b"",
        "bytes were written|bytes but": whole[:-1],
        "cannot be decoded": whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
    }
    for problem, data in damages.items():
        if data is None:
            store.objects.delete(path)
        else:
            store.objects.write(path, data)
        with pytest.raises(DamageError, match=problem) as error:
            store.observations().y()
        assert error.value.path == path
        np.testing.assert_array_equal(store.observations().y(slice(0, 24)), make_block(0, 24).y)
        assert store.has_observations() == (data is not None and len(data) == len(whole))
        store.write_observations(make_blocks(), x_shape=X_SHAPE)
        assert store.objects.read_many(store.objects.list()) == before


def test_memory_holds_a_shard_and_a_block(small_shards: None) -> None:
    """Pieces come out as soon as they are full: the stream is never collected."""
    taken = 0

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        nonlocal taken
        for start in range(0, 60, 3):
            taken += 3
            yield {"sample": np.arange(start, start + 3)}

    stream = blocks()
    out = 0
    for piece in module._rebuffered(next(stream), stream, 8):
        out += len(piece["sample"])
        assert taken - out < 8 + 3
    assert (taken, out) == (60, 60)
