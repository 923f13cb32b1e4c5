from pathlib import Path

import numpy as np
import pytest

from storage_schemas.benchmark import CODECS, measure_codecs, noisy_images
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import Observations
from storage_schemas.store_benchmark import measure_store, objects_rows, plan_store


def test_every_codec_is_measured() -> None:
    table = {line.codec: line for line in measure_codecs(noisy_images(64), repetitions=1)}
    assert table.keys() == CODECS.keys()
    # Ratios are no timings: bits of like meaning side by side are what compresses noisy floats.
    assert 0.98 < table["none"].ratio < 1
    assert table["blosc lz4 5 bitshuffle"].ratio > 1.1 > table["blosc lz4 5 noshuffle"].ratio


def test_images_are_smooth_and_noisy() -> None:
    images = noisy_images(50, shape=(1, 64, 64))
    assert (images.shape, images.dtype) == ((50, 1, 64, 64), np.float32)
    steps = np.diff(images, axis=-1).std(axis=(1, 2, 3))
    # Noise of 0.05 alone makes steps of 0.05 sqrt 2 = 0.071; the waves add at most 6 / 63 = 0.095.
    assert np.all((steps > 0.065) & (steps < 0.13))


def test_a_store_is_measured_by_what_was_written(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    speed = measure_store(url, samples=700, x_shape=(1, 8, 8), minibatches=2)
    assert speed.mb == 700 * 64 * 4e-6
    on_disk = sum(p.stat().st_size for p in (tmp_path / "store/observations.zarr").rglob("*.*"))
    on_disk += sum(
        p.stat().st_size
        for p in (tmp_path / "store/observations.zarr").rglob("*")
        if p.is_file() and "." not in p.name
    )
    assert speed.ratio == pytest.approx(1e6 * speed.mb / on_disk)
    assert min(speed.write_mb_s, speed.read_mb_s, speed.minibatches_s) > 0
    with pytest.raises(ValueError, match="is not empty; give a place where nothing is yet"):
        measure_store(url, samples=10, x_shape=(1, 8, 8))


def test_a_plan_says_what_is_written_and_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = ObjectStore(str(tmp_path / "store"))
    shape, samples = (3, 64, 64), 1000
    measure_store(objects.url, samples=samples, x_shape=shape, minibatches=1)
    plan = plan_store(samples=samples, x_shape=shape)
    written = [p for p in objects.list() if p.startswith("observations.zarr/observation/c/")]
    assert plan.objects == len(written) == 4
    assert plan.write_requests == len(objects.list())
    assert plan.object_mb <= 24
    assert plan.mb == pytest.approx(samples * 3 * 64 * 64 * 4e-6)

    asked: list[str] = []
    read = ObjectStore.read

    def counted(self: ObjectStore, path: str) -> bytes:
        asked.append(path)
        return read(self, path)

    monkeypatch.setattr(ObjectStore, "read", counted)
    observations = Observations(objects)
    rows = objects_rows(samples, shape)
    for start in range(0, samples, rows):
        observations.y(slice(start, start + rows))
    assert len(asked) == plan.read_requests
    asked.clear()
    few = 4  # The plan is of 256 samples, which touch all four objects.
    observations.y(np.arange(few) * rows)
    assert len(asked) == few == round(plan.minibatch_requests)
    assert plan.minibatch_mb == pytest.approx(few * plan.object_mb)


def test_the_plan_of_a_large_store_touches_the_objects_that_chance_says() -> None:
    plan = plan_store(samples=1_000_000, x_shape=(3, 64, 64))
    rng = np.random.default_rng(0)
    drawn = [len(np.unique(rng.integers(0, plan.objects, 256))) for _ in range(400)]
    # Mean of 400 counts whose standard deviation is below 5: four standard errors are 1.
    assert np.mean(drawn) == pytest.approx(plan.minibatch_requests, abs=1)
