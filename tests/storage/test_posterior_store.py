"""The store of draws: laid out once, written by shards, sealed, refused to other requests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from storage_schemas.errors import DamageError, IncompleteError
from storage_schemas.objects import ObjectStore
from storage_schemas.posterior_store import DrawPlan, DrawStore, OtherDraws

IDS = np.arange(5) * 3


def make_plan(**changes: Any) -> DrawPlan:
    given: dict[str, Any] = {
        "request": {"seed": 0, "sampler": {"kind": "ddpm", "steps": 4}},
        "samples": 5,
        "x_shape": (1, 2, 4),
        "draws": 3,
        "kept": True,
        "summaries": ("mean", "quantiles"),
        "levels": (0.1, 0.9),
        "shard_size": 2,
        "units": "grey level",
    }
    return DrawPlan(**(given | changes))


def arrays(plan: DrawPlan, shard: int) -> dict[str, np.ndarray]:
    start, stop = plan.rows(shard)
    rng = np.random.default_rng(shard)
    return {
        name: rng.normal(size=(stop - start, *shape)).astype(np.float32)
        for name, shape in plan.shapes().items()
    }


def filled(url: str, plan: DrawPlan, shards: range | list[int]) -> DrawStore:
    store = DrawStore(ObjectStore(url))
    store.create(plan, IDS, {"title": "test"})
    for shard in shards:
        store.write_shard(shard, arrays(plan, shard), seconds=1.0)
    return store


def test_what_is_written_is_what_xarray_reads(any_url: str) -> None:
    plan = make_plan()
    store = filled(any_url, plan, [2, 0, 1])
    assert store.missing() == []
    manifest = store.seal({"title": "test"}, {"note": 1})
    assert (manifest.seconds, manifest.notes) == (3.0, {"note": 1})
    dataset = xr.open_zarr(ObjectStore(any_url).zarr_store("draws.zarr"), chunks=None)
    assert dataset["x_hat"].dims == ("sample", "draw", "channel", "y", "x")
    assert dataset["mean"].dims == ("sample", "channel", "y", "x")
    assert dataset["quantiles"].dims == ("sample", "quantile", "channel", "y", "x")
    np.testing.assert_array_equal(dataset["sample"], IDS)
    np.testing.assert_array_equal(dataset["quantile"], [0.1, 0.9])
    assert dataset.attrs["title"] == "test"
    for name in plan.shapes():
        parts = [arrays(plan, shard)[name] for shard in range(3)]
        np.testing.assert_array_equal(dataset[name], np.concatenate(parts))
        np.testing.assert_array_equal(store.read(name, 1), parts[1])
    # Every object that is there is named, and no other.
    assert sorted(manifest.objects) == [
        path.removeprefix("draws.zarr/") for path in ObjectStore(any_url).list("draws.zarr")
    ]


def test_vectors_and_samples_of_a_prior_have_dimensions_of_their_own(tmp_path: Path) -> None:
    plan = make_plan(x_shape=(7,), draws=None, summaries=(), levels=())
    filled(str(tmp_path / "out"), plan, range(3))
    dataset = xr.open_zarr(tmp_path / "out/draws.zarr", chunks=None)
    assert dataset["x_hat"].dims == ("sample", "feature")
    assert dataset["x_hat"].shape == (5, 7)


def test_the_next_process_does_what_is_missing_or_damaged(tmp_path: Path) -> None:
    plan, url = make_plan(), str(tmp_path / "out")
    filled(url, plan, [0, 2])
    store = DrawStore(ObjectStore(url))
    before = ObjectStore(url).read("plan.json")
    store.create(plan, IDS, {"title": "another attempt"})
    assert ObjectStore(url).read("plan.json") == before
    assert store.missing() == [1]
    with pytest.raises(IncompleteError, match="1 shards have yet to be drawn"):
        store.seal({}, {})
    with pytest.raises(IncompleteError, match="shard 1"):
        store.read("mean", 1)
    path = tmp_path / "out/draws.zarr/mean/c/2/0/0/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert store.missing() == [1, 2]


def test_shards_that_no_plan_answers_for_are_not_taken_over(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    filled(url, make_plan(), range(3))
    plan = tmp_path / "out/plan.json"
    plan.write_bytes(plan.read_bytes().replace(b"grey level", b"gray level"))
    with pytest.raises(DamageError):
        DrawStore(ObjectStore(url)).plan()
    store = DrawStore(ObjectStore(url))
    store.create(make_plan(request={"seed": 1}), IDS, {})
    assert store.missing() == [0, 1, 2]


def test_another_request_is_refused_with_the_difference(tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    store = filled(url, make_plan(), [0])
    given = make_plan(request={"seed": 0, "sampler": {"kind": "ddpm", "steps": 8}}, draws=4)
    with pytest.raises(OtherDraws) as refused:
        store.create(given, IDS, {})
    assert "request.sampler.steps: 4 -> 8" in str(refused.value)
    assert "draws: 3 -> 4" in str(refused.value)
    assert store.missing() == [1, 2]


def test_what_is_not_draws_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OtherDraws, match=r"holds thesis\.tex"):
        DrawStore(ObjectStore(str(tmp_path)))
    with pytest.raises(OtherDraws, match="is a file"):
        DrawStore(ObjectStore(str(tmp_path / "thesis.tex")))


def test_values_that_are_no_draws_are_refused(tmp_path: Path) -> None:
    plan = make_plan()
    store = DrawStore(ObjectStore(str(tmp_path / "out")))
    with pytest.raises(IncompleteError, match="call create first"):
        store.write_shard(0, arrays(plan, 0), seconds=0.0)
    store.create(plan, IDS, {})
    given = arrays(plan, 0)
    given["mean"][0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="mean of shard 0 is not finite"):
        store.write_shard(0, given, seconds=0.0)
    with pytest.raises(ValueError, match="shard 2 received"):
        store.write_shard(2, arrays(plan, 0), seconds=0.0)
    with pytest.raises(ValueError, match="shards 0 to 2"):
        store.write_shard(3, arrays(plan, 0), seconds=0.0)
