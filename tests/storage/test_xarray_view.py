import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from storage_schemas.errors import NotARun
from storage_schemas.run_store import RunStore
from storage_schemas.xarray_view import open_run
from tests.storage.tiny_run import (
    PROVENANCE,
    SAMPLES,
    X_SHAPE,
    draw,
    lay_out,
    make_block,
    make_blocks,
    make_config,
    make_x_hat,
    resume_run,
    write_start,
)


def test_a_run_is_a_tree(any_url: str) -> None:
    store = resume_run(any_url)
    tree = open_run(any_url)
    assert {node.path for node in tree.subtree} == {
        "/",
        "/observations",
        "/observations/params",
        "/observations/truth",
        "/start",
        "/metrics",
        "/iterations",
        "/iterations/000",
        "/iterations/001",
    }
    block = make_block(0, SAMPLES)
    observation = tree["observations/observation"]
    assert observation.dims == ("sample", "channel", "y", "x")
    assert observation.attrs["units"] == "grey level"
    assert set(observation.coords) == {"sample", "split"}
    np.testing.assert_array_equal(observation.sel(sample=[9, 3]), block.y[[3, 1]])
    np.testing.assert_array_equal(observation.coords["split"], block.holdout)
    np.testing.assert_array_equal(tree["observations/truth/clean"], block.x)
    np.testing.assert_array_equal(tree["observations/params/mask"], block.params["mask"])
    x_hat = tree["iterations/001/x_hat"]
    np.testing.assert_array_equal(x_hat, make_x_hat(1, 0, 40))
    np.testing.assert_array_equal(x_hat.sample, block.sample[~block.holdout])
    attributes = tree["iterations/001"].attrs
    assert attributes["parent_digest"] == store.parent_digest(1)
    assert attributes["config_digest"] == store.config.digest
    assert (attributes["em_iteration"], attributes["seed"], attributes["complete"]) == (1, 7, 1)
    metrics = tree["metrics"].to_dataset()
    np.testing.assert_array_equal(metrics["em_iteration"], [0, 1])
    np.testing.assert_array_equal(metrics["psnr"], [20, 21])
    np.testing.assert_array_equal(metrics["psnr_standard_error"], [0.1, 0.1])
    assert metrics["psnr"].attrs == {"long_name": "PSNR", "units": "dB"}
    assert np.isnan(metrics["distance"]).all()
    assert tree["start/psnr"].item() == 19


def test_xarray_alone_opens_the_reconstructions(complete_run: RunStore) -> None:
    """Named dimensions and sample coordinates, without a word about the store, in silence."""
    with xr.open_zarr(f"{complete_run.url}/iterations/000/reconstructions.zarr") as dataset:
        assert dataset["x_hat"].dims == ("sample", "channel", "y", "x")
        np.testing.assert_array_equal(dataset["x_hat"].sel(sample=3), make_x_hat(0, 0, 1)[0])
    with xr.open_datatree(
        f"{complete_run.url}/observations.zarr", engine="zarr", chunks=None
    ) as tree:
        assert tree["truth/clean"].shape == (SAMPLES, *X_SHAPE)


def test_a_run_that_goes_on_can_be_opened_at_every_step(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with pytest.raises(NotARun):
        open_run(url)
    store = RunStore.create(url, make_config(), PROVENANCE)
    assert [node.path for node in open_run(url).subtree] == ["/"]
    store.write_observations(make_blocks(), x_shape=X_SHAPE)
    write_start(store)
    folder = lay_out(store, 0)
    tree = open_run(url)
    assert "metrics" not in tree.children
    assert np.isnan(tree["iterations/000/x_hat"]).all()
    draw(folder, 1)
    x_hat = open_run(url)["iterations/000/x_hat"]
    np.testing.assert_array_equal(x_hat[16:32], make_x_hat(0, 16, 32))
    assert np.isnan(x_hat[:16]).all()
    assert open_run(url)["iterations/000"].attrs["complete"] == 0


def test_nothing_is_read_before_it_is_asked_for(complete_run: RunStore) -> None:
    for path in complete_run.objects.list():
        if "/x_hat/c/" in path or "/observation/c/" in path:
            complete_run.objects.write(path, b"torn")
    tree = open_run(complete_run.url)
    assert tree["observations/observation"].shape == (SAMPLES, *X_SHAPE)
    with pytest.raises(ValueError, match=r"[Cc]hecksum|index"):
        tree["iterations/000/x_hat"].load()


def test_vectors_have_features(tmp_path: Path) -> None:
    from dataclasses import replace

    store = RunStore.create(str(tmp_path), make_config(), PROVENANCE)
    block = make_block(0, 10)
    rng = np.random.default_rng(0)
    vectors = replace(
        block,
        y=rng.normal(size=(10, 2)),
        x=rng.normal(size=(10, 5)),
        params={"matrix": rng.normal(size=(10, 2, 5))},
        label=None,
    )
    store.write_observations([vectors], x_shape=(5,))
    tree = open_run(str(tmp_path))
    assert tree["observations/observation"].dims == ("sample", "measurement")
    assert tree["observations/params/matrix"].dims == ("sample", "measurement", "feature")
    folder = store.iteration(0)
    folder.create_reconstructions(
        block.sample, x_shape=(5,), shard_size=4, parent_digest="0" * 64, seed=0
    )
    folder.write_shard(2, np.ones((2, 5)), seed=0, seconds=0.0)
    x_hat = open_run(str(tmp_path))["iterations/000/x_hat"]
    assert x_hat.dims == ("sample", "feature")
    np.testing.assert_array_equal(x_hat[8:], np.ones((2, 5)))


def test_a_light_import_stays_light() -> None:
    code = "import storage_schemas.verify, sys; assert not {'zarr', 'xarray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
