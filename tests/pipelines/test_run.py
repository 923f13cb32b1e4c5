"""A run from end to end, through the real parts: flows, stores, network."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from diffem_core.seeds import derive_seed
from diffem_core.training import TrainingState
from pipelines.cli import app
from pipelines.config_io import load_config
from pipelines.faults import StageFailed
from pipelines.flows import em_run
from pipelines.stages import iterations, judge, observations, start, training
from pipelines.status import read_status
from storage_schemas.observations import ObservationBlock
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify

pytestmark = pytest.mark.usefixtures("prefect_server")


TRUTH_NEEDED = {
    *("psnr_sample", "psnr_mean", "rmse_sample", "rmse_mean", "distance", "accuracy"),
    *("hidden_rmse_sample", "hidden_rmse_mean", "spread_ratio", "coverage_50", "coverage_90"),
}
"""Metrics that only a benchmark can have, whose clean samples are known."""


def results_of(url: Path | str) -> dict[str, str]:
    """Return the checksums of everything that a run computed."""
    store = RunStore.open(str(url))
    manifests = [store.start().manifest(), *store.completed()]
    assert len(manifests) == store.config.iterations + 1
    found = {}
    for number, manifest in enumerate(manifests):
        assert manifest is not None
        for path, record in manifest.objects.items():
            if path.endswith((".safetensors", "metrics.json")) or "/x_hat/c/" in path:
                found[f"{number}/{path}"] = record.sha256
    return found


def make_run(url: Path, config: Path, *overrides: str) -> dict[str, Any]:
    RunStore.create(str(url), load_config(str(config), overrides))
    return em_run(str(url))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, prefect_server: None
) -> Iterator[Path]:
    """A finished run. Tests look at it and leave it as it is."""
    url = tmp_path_factory.mktemp("runs") / "tiny"
    make_run(url, tiny_config)
    before = results_of(url)
    yield url
    assert results_of(url) == before


def test_the_reconstructions_open_in_xarray_with_names_and_ids(finished: Path) -> None:
    dataset = xr.open_zarr(finished / "iterations/001/reconstructions.zarr")
    assert dataset["x_hat"].dims == ("sample", "channel", "y", "x")
    assert dataset["x_hat"].shape == (200, 1, 8, 8)
    observations = RunStore.open(str(finished)).observations("train")
    np.testing.assert_array_equal(dataset["sample"], observations.sample_ids)
    assert np.isfinite(dataset["x_hat"]).all()


def test_observations_are_the_digits_corrupted_once_in_their_own_order(finished: Path) -> None:
    from sklearn.datasets import load_digits

    everything = RunStore.open(str(finished)).observations()
    np.testing.assert_array_equal(everything.sample_ids, np.arange(240))
    truth = everything.truth()
    assert truth is not None
    np.testing.assert_array_equal(truth[:, 0], load_digits().images[:240])
    mask = everything.params()["mask"]
    hidden = mask == 0
    assert set(np.unique(mask)) == {0, 1}
    # 240 x 64 pixels seen with probability 1/2: the standard error of the mean is 0.5 /
    # sqrt(15360) = 0.004.
    assert abs(mask.mean() - 0.5) < 5 * 0.004
    assert not everything.y()[hidden].any()
    noise = (everything.y() - truth)[~hidden]
    # About 7,680 noises: the standard error of their standard deviation is 0.4 / sqrt(2 x 7680) =
    # 0.0032.
    assert abs(noise.std() - 0.4) < 5 * 0.0032


def test_held_out_observations_are_not_reconstructed(finished: Path) -> None:
    store = RunStore.open(str(finished))
    held_out = store.observations("holdout").sample_ids
    assert len(held_out) == 40
    assert not np.isin(store.iteration(1).sample_ids(), held_out).any()


def test_status_has_every_number_of_every_iteration(finished: Path) -> None:
    result = CliRunner().invoke(app, ["status", str(finished), "--json"])
    assert result.exit_code == 0
    status = json.loads(result.stdout)
    assert status["state"] == "complete"
    assert [step["iteration"] for step in status["history"]] == [0, 1]
    for step in (status["start"], *status["history"]):
        metrics = RunStore.open(str(finished)).start().metrics()
        assert metrics is not None
        assert step["metrics"].keys() == metrics.values.keys()
        assert all(metric["value"] is not None for metric in step["metrics"].values())
        assert all(stage["seconds"] > 0 for stage in step["stages"].values())


def test_pictures_are_pictures(finished: Path) -> None:
    for folder in ("start", "iterations/000", "iterations/001"):
        assert (finished / folder / "preview.png").read_bytes().startswith(b"\x89PNG")


def test_verify_finds_nothing_in_an_undisturbed_run(finished: Path) -> None:
    report = verify(str(finished))
    assert report.ok, report
    assert report.objects > 40
    assert CliRunner().invoke(app, ["verify", str(finished)]).exit_code == 0


def test_a_second_run_executes_no_e_step_and_no_m_step(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a finished run must not compute")

    for module, name in (
        (iterations, "e_step"),
        (training, "m_step"),
        (start, "fit_gaussian_prior"),
        (judge, "evaluate"),
    ):
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, refuse)
    summary = em_run(str(finished))
    assert summary["iterations"] == {}
    assert summary["start_reused"]
    assert summary["check"]["findings"] == []


def test_raising_the_iterations_goes_on_where_the_run_stopped(
    tiny_config: Path, tmp_path: Path, finished: Path
) -> None:
    url = tmp_path / "run"
    make_run(url, tiny_config, "iterations=1")
    summary = make_run(url, tiny_config)
    assert list(summary["iterations"]) == ["1"]
    assert results_of(url) == results_of(finished)


def test_a_run_interrupted_in_the_m_step_ends_with_the_same_bytes(
    tiny_config: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "run"
    real, steps_done = training.m_step, []

    def counted(*args: Any, on_step: Callable[[TrainingState], None], **kwargs: Any) -> Any:
        def watch(state: TrainingState) -> None:
            steps_done.append(state.step)
            on_step(state)
            if len(steps_done) == 7:
                raise KeyboardInterrupt

        return real(*args, on_step=watch, **kwargs)

    monkeypatch.setattr(training, "m_step", counted)
    # So short an interval makes every step a checkpoint.
    with pytest.raises(KeyboardInterrupt):
        make_run(url, tiny_config, "m_step.checkpoint_seconds=1e-9")
    assert (url / "iterations/000/checkpoint/state.safetensors").exists()
    summary = make_run(url, tiny_config)
    assert summary["iterations"]["0"]["shards_reused"] == 4
    assert steps_done == [*range(1, 8), *range(8, 13), *range(1, 13)]
    assert results_of(url) == results_of(finished)
    assert not (url / "iterations/000/checkpoint/state.safetensors").exists()


def test_what_prefect_remembers_never_overrules_the_store(
    tiny_config: Path, tmp_path: Path, finished: Path
) -> None:
    import shutil

    url = tmp_path / "run"
    make_run(url, tiny_config)
    (url / "iterations/001/iteration.json").unlink()
    (url / "iterations/001/stages/evaluate.json").unlink()
    for number in (0, 1):
        shutil.rmtree(url / f"iterations/00{number}/shards")
    # Prefect's cache still holds a record of every shard, M-step and evaluation of this config.
    summary = make_run(url, tiny_config)
    assert summary["iterations"]["0"]["shards_reused"] == 0
    assert results_of(url) == results_of(finished)
    assert verify(str(url)).ok


def test_a_failed_shard_keeps_the_others(
    tiny_config: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "run"
    real, calls = iterations.e_step, []

    def fail_third(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise OSError("the device went away")
        return real(*args, **kwargs)

    monkeypatch.setattr(iterations, "e_step", fail_third)
    with pytest.raises(StageFailed, match=r"shard 00002: OSError: the device went away"):
        make_run(url, tiny_config, "runner.retries=0")
    done = len(RunStore.open(str(url)).iteration(0).shards())
    assert done == 3
    calls.clear()
    calls.extend([0, 0, 0])  # the third call was the failing one
    summary = make_run(url, tiny_config)
    assert summary["iterations"]["0"]["shards_reused"] == done
    assert results_of(url) == results_of(finished)


@pytest.mark.parametrize(
    "victim",
    [
        "iterations/000/reconstructions.zarr/x_hat/c/2/0/0/0",
        "iterations/000/model.safetensors",
        "iterations/001/metrics.json",
        "start/model.safetensors",
        "observations.zarr/observation/c/0/0/0/0",
    ],
)
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_damage_is_named_and_repaired(
    tiny_config: Path, tmp_path: Path, finished: Path, victim: str, harm: str
) -> None:
    import shutil

    url = tmp_path / "run"
    shutil.copytree(finished, url)
    path = url / victim
    data = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data if harm == "flip" else data[: len(data) // 2])
    result = CliRunner().invoke(app, ["verify", str(url)])
    assert result.exit_code == 1
    assert victim in result.stdout
    summary = make_run(url, tiny_config)
    assert any(victim in line for line in summary["check"]["findings"])
    assert results_of(url) == results_of(finished)
    assert verify(str(url)).ok


def test_clean_samples_change_nothing_but_the_evaluation(
    tiny_config: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_truth(**fields: Any) -> ObservationBlock:
        return ObservationBlock(**{**fields, "x": None, "label": None})

    monkeypatch.setattr(observations, "ObservationBlock", without_truth)
    url = tmp_path / "run"
    make_run(url, tiny_config)
    assert RunStore.open(str(url)).observations("train").truth() is None
    ours, theirs = results_of(url), results_of(finished)
    metrics = {path for path in theirs if path.endswith("metrics.json")}
    assert {p: ours[p] for p in theirs if p not in metrics} == {
        p: theirs[p] for p in theirs if p not in metrics
    }
    status = read_status(RunStore.open(str(url)))
    names = set(status.start.metrics)
    assert {"divergence", "divergence_floor", "sliced_wasserstein"} <= names
    assert not names & TRUTH_NEEDED


def test_another_seed_is_another_run(tiny_config: Path, tmp_path: Path, finished: Path) -> None:
    url = tmp_path / "run"
    make_run(url, tiny_config, "seed=1", "iterations=1")
    ours = results_of(url)
    theirs = results_of(finished)
    assert all(ours[path] != theirs[path] for path in ours if path.endswith(".safetensors"))


def test_shards_and_batches_do_not_change_the_reconstructions(
    tiny_config: Path, tmp_path: Path, finished: Path
) -> None:
    url = tmp_path / "run"
    make_run(url, tiny_config, "iterations=1", "e_step.shard_size=37", "e_step.batch_size=200")
    ours = RunStore.open(str(url)).iteration(0).read_reconstructions()
    theirs = RunStore.open(str(finished)).iteration(0).read_reconstructions()
    # The noise is the same; solves and convolutions of another batch size round differently.
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_seeds_belong_to_iteration_and_sample() -> None:
    seeds = {derive_seed(0, "e_step", k) for k in range(100)}
    assert len(seeds) == 100
