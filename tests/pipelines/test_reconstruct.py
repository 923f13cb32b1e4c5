"""New observations, restored into a store that xarray opens; samples of the prior."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from PIL import Image

from pipelines import cancellation
from pipelines.runners.devices import WorkerDied
from pipelines.using import reconstruct as work
from pipelines.using.drawing import draw_shards
from pipelines.using.incoming import opened_observations
from pipelines.using.request import ReconstructRequest
from pipelines.using.run import Run, RunPosterior
from tests.command_line import diffem
from tests.conftest import TINY
from tests.pipelines.used_run import bytes_of, observed, run, used  # noqa: F401

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def new(run: Run, tmp_path: Path) -> Path:  # noqa: F811
    """Ten held-out observations in a file."""
    path = tmp_path / "new.npz"
    np.savez(path, **observed(run, 10))  # type: ignore[arg-type]
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_LARGEST_SHARD", 4)


def refused(*arguments: object) -> str:
    result = diffem(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    return str(result.stderr)


def arrays_of(out: Path) -> dict[str, bytes]:
    return {k: v for k, v in bytes_of(out).items() if k.startswith("draws.zarr")}


@pytest.mark.usefixtures("small_shards")
def test_the_store_holds_the_draws_of_the_api_and_their_summaries(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    result = diffem(
        "reconstruct", run.url, new, out, "--draws", 3, "--summary", "mean,std,quantiles",
        "--seed", 5, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["samples"], summary["shards"], summary["reused"]) == (10, 3, 0)
    dataset = xr.open_zarr(out / "draws.zarr")
    assert dataset["x_hat"].dims == ("sample", "draw", "channel", "y", "x")
    assert dataset["quantiles"].dims == ("sample", "quantile", "channel", "y", "x")
    np.testing.assert_array_equal(dataset["sample"], np.arange(10))
    np.testing.assert_array_equal(dataset["quantile"], [0.05, 0.5, 0.95])
    given = observed(run, 10)
    draws = run.posterior().sample(given["y"], {"mask": given["mask"]}, draws=3, seed=5).numpy()
    np.testing.assert_allclose(dataset["x_hat"], np.moveaxis(draws, 0, 1), atol=1e-3)
    stored = dataset["x_hat"].values.astype(np.float64)
    np.testing.assert_allclose(dataset["mean"], stored.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(dataset["std"], stored.std(axis=1, ddof=1), atol=1e-4)
    np.testing.assert_allclose(
        dataset["quantiles"], np.moveaxis(np.quantile(stored, [0.05, 0.5, 0.95], axis=1), 0, 1),
        atol=1e-4,
    )  # fmt: skip
    assert dataset.attrs["model_digest"] == run.iterations[-1].model_digest
    assert dataset.attrs["config_digest"] == run.store.manifest.config_digest
    assert dataset.attrs["seed"] == 5
    assert dataset.attrs["code_version"]


@pytest.mark.usefixtures("small_shards")
def test_what_was_interrupted_goes_on_and_ends_with_the_same_bytes(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ("reconstruct", run.url, new, "--draws", 2)
    assert diffem(*command, whole).exit_code == 0
    sample, calls = RunPosterior.sample, []

    def interrupted(self: RunPosterior, *arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, *arguments, **named)

    monkeypatch.setattr(RunPosterior, "sample", interrupted)
    result = diffem(*command, broken)
    assert result.exit_code == 130
    assert "goes on where it stopped" in result.stderr
    assert not (broken / "draws.json").exists()
    result = diffem(*command, broken, "--json")
    assert json.loads(result.stdout)["reused"] == 1
    assert len(calls) == 4
    assert arrays_of(broken) == arrays_of(whole)
    before = bytes_of(broken)
    result = diffem(*command, broken, "--json")
    assert json.loads(result.stdout)["reused"] == 3
    assert len(calls) == 4
    after = bytes_of(broken)
    assert {k: v for k, v in after.items() if "lease" not in k} == {
        k: v for k, v in before.items() if "lease" not in k
    }
    # A damaged object is found, and drawn again.
    damaged = broken / "draws.zarr/x_hat/c/1/0/0/0/0"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert json.loads(diffem(*command, broken, "--json").stdout)["reused"] == 2
    assert arrays_of(broken) == arrays_of(whole)


def test_another_request_at_the_same_place_is_refused_with_the_difference(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    assert diffem("reconstruct", run.url, new, out, "--draws", 2).exit_code == 0
    before = bytes_of(out)
    assert "request.seed: 0 -> 1" in refused(
        "reconstruct", run.url, new, out, "--draws", 2, "--seed", 1
    )
    assert "draws: 2 -> 3" in refused("reconstruct", run.url, new, out, "--draws", 3)
    assert "request.iteration: 1 -> 0" in refused(
        "reconstruct", run.url, new, out, "--draws", 2, "--iteration", 0
    )
    np.savez(tmp_path / "other.npz", **(observed(run, 10) | {"y": np.ones((10, 1, 8, 8))}))
    assert "request.observations" in refused(
        "reconstruct", run.url, tmp_path / "other.npz", out, "--draws", 2
    )
    assert bytes_of(out) == before


def test_what_cannot_be_restored_is_refused_before_anything_is_written(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    given = observed(run, 10)
    y, mask = given["y"], given["mask"]
    np.savez(tmp_path / "wide.npz", y=y.repeat(2, axis=3), mask=mask.repeat(2, axis=3))
    message = refused("reconstruct", run.url, tmp_path / "wide.npz", out)
    assert "(n, 1, 8, 16) but the model was trained on (n, 1, 8, 8)" in message
    np.savez(tmp_path / "bare.npz", y=y)
    message = refused("reconstruct", run.url, tmp_path / "bare.npz", out)
    assert "'mask'" in message
    assert "--param NAME[=ARRAY]" in message
    spoiled = y.copy()
    spoiled[7, 0, 3, 3] = np.nan
    np.savez(tmp_path / "nan.npz", y=spoiled, mask=mask)
    assert "sample 7" in refused("reconstruct", run.url, tmp_path / "nan.npz", out)
    np.savez(tmp_path / "names.npz", a=y, b=y, mask=mask)
    assert "--y NAME" in refused("reconstruct", run.url, tmp_path / "names.npz", out)
    assert "there is nothing at" in refused("reconstruct", run.url, tmp_path / "no.npz", out)
    assert "are clean samples" in refused("reconstruct", run.url, "bundled:digits", out)
    assert "is not a run" in refused("reconstruct", tmp_path, new, out)
    assert "--draws is 0" in refused("reconstruct", run.url, new, out, "--draws", 0)
    assert "'median' is no summary" in refused(
        "reconstruct", run.url, new, out, "--summary", "mean,median"
    )
    assert "would keep nothing" in refused(
        "reconstruct", run.url, new, out, "--no-draws", "--summary", "none"
    )
    assert "at least 2 draws" in refused(
        "reconstruct", run.url, new, out, "--draws", 1, "--summary", "std"
    )
    assert "belong together" in refused("reconstruct", run.url, new, out, "--using", "prior")
    assert "give a number, such as 3" in refused(
        "reconstruct", run.url, new, out, "--iteration", "last"
    )
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert "holds thesis.tex" in refused("reconstruct", run.url, new, out)


def test_one_observation_and_names_of_ones_own_are_enough(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = observed(run, 1)
    path, out = tmp_path / "one.npz", tmp_path / "out"
    np.savez(path, seen=given["y"][:, 0], where=given["mask"][:, 0] > 0)
    result = diffem(
        "reconstruct", run.url, path, out, "--y", "seen", "--param", "mask=where", "--draws", 2,
        "--no-draws", "--summary", "mean",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    dataset = xr.open_zarr(out / "draws.zarr")
    assert set(dataset.data_vars) == {"mean"}
    draws = run.posterior().sample(given["y"], {"mask": given["mask"]}, draws=2)
    np.testing.assert_allclose(dataset["mean"][0], draws.mean(dim=0)[0], atol=1e-3)


def test_a_sealed_store_is_read_with_its_ids(run: Run, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    result = diffem("reconstruct", run.url, run.url, out, "--limit", 6, "--draws", 2)
    assert result.exit_code == 0, result.output
    everything = run.store.observations()
    dataset = xr.open_zarr(out / "draws.zarr")
    np.testing.assert_array_equal(dataset["sample"], everything.sample_ids[:6])
    draws = run.posterior().sample(
        everything.y(slice(0, 6)),
        everything.params(slice(0, 6)),
        draws=2,
        numbers=everything.sample_ids[:6].tolist(),
    )
    np.testing.assert_allclose(dataset["x_hat"], draws.transpose(0, 1), atol=1e-3)
    message = refused("reconstruct", run.url, run.url, tmp_path / "x", "--param", "mask")
    assert "leave --y, --param" in message


def test_observations_that_were_added_to_a_store_are_read_as_well(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
) -> None:
    grown, out = tmp_path / "grown", tmp_path / "out"
    for more in ((), ("--append",)):
        result = diffem("ingest", new, grown, "--y", "y", "--param", "mask", *more)
        assert result.exit_code == 0, result.output
    result = diffem("reconstruct", run.url, grown, out, "--draws", 1)
    assert result.exit_code == 0, result.output
    dataset = xr.open_zarr(out / "draws.zarr")
    assert len(set(dataset["sample"].values.tolist())) == 20


def test_observations_unlike_those_of_the_run_are_pointed_out(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    given = observed(run, 40)
    alike, bright = tmp_path / "alike.npz", tmp_path / "bright.npz"
    np.savez(alike, **observed(run, 40, "train"))  # type: ignore[arg-type]
    np.savez(bright, y=given["mask"] * (16 - given["y"]), mask=given["mask"])
    ratios = {}
    for path in (alike, bright):
        result = diffem("reconstruct", run.url, path, tmp_path / path.stem, "--draws", 1, "--json")
        ratios[path.stem] = json.loads(result.stdout)["likeness"]["ratio"]
        assert ("warning: " in result.stderr) == (path is bright)
    # Forty digits of the run: 1.04 on average, 1.12 at most in forty trials; inverted ones 3.6.
    assert ratios["alike"] < 1.25
    assert ratios["bright"] > 2


def test_the_prior_inverts_the_channel_of_another_config(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    config, out = tmp_path / "blind.yaml", tmp_path / "out"
    channel = {"kind": "denoising", "noise_std": 2.0}
    config.write_text(yaml.safe_dump({**TINY, "channel": channel}))
    x = run.store.observations("holdout").truth(slice(0, 20))
    assert x is not None
    y = x + 2.0 * np.random.default_rng(0).normal(size=x.shape)
    np.save(tmp_path / "noisy.npy", y)
    result = diffem(
        "reconstruct", run.url, tmp_path / "noisy.npy", out, "--using", "prior", "--channel",
        config, "--draws", 2, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["using"] == "prior"
    dataset = xr.open_zarr(out / "draws.zarr")
    assert dataset.attrs["channel"] == "denoising"
    # Draws stay within about the noise of the observations: 20 x 64 values of standard deviation
    # 2, while x itself has one of 6.
    residual = np.sqrt(np.square(dataset["x_hat"].values - y[:, None]).mean())
    assert residual < 1.5 * 2.0
    other = diffem(
        "reconstruct", run.url, tmp_path / "noisy.npy", out, "--using", "prior", "--channel",
        config, "--draws", 2, "--solver-iterations", 1,
    )  # fmt: skip
    assert "solver_iterations: 3 -> 1" in other.stderr


def test_samples_of_the_prior_are_stored_and_drawn(run: Run, tmp_path: Path) -> None:  # noqa: F811
    out, png = tmp_path / "out", tmp_path / "grid.png"
    result = diffem("sample", run.url, out, "-n", 10, "--seed", 3, "--png", png, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["reused"] == 0
    dataset = xr.open_zarr(out / "draws.zarr")
    assert dataset["x_hat"].dims == ("sample", "channel", "y", "x")
    np.testing.assert_allclose(dataset["x_hat"], run.prior().sample(10, seed=3), atol=1e-3)
    # 10 samples of 8 x 8 pixels, 6-fold, in rows of 4, two pixels apart.
    with Image.open(png) as picture:
        assert picture.size == (4 * 50 - 2, 3 * 50 - 2)
        first = np.asarray(picture)[:48:6, :48:6, 0]
    grey = np.clip(dataset["x_hat"].values[0, 0] / 16, 0, 1) * 255
    np.testing.assert_allclose(first, grey, atol=0.51)
    assert (
        json.loads(diffem("sample", run.url, out, "-n", 10, "--seed", 3, "--json").stdout)[
            "reused"
        ]
        == 1
    )
    assert "samples: 10 -> 11" in refused("sample", run.url, out, "-n", 11, "--seed", 3)
    assert "-n is 0" in refused("sample", run.url, tmp_path / "x", "-n", 0)
    assert "no folder" in refused("sample", run.url, tmp_path / "x", "-n", 1, "--png", "no/a.png")


def test_a_run_without_a_prior_says_how_to_get_one(
    used: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    without = tmp_path / "run"
    shutil.copytree(used, without)
    shutil.rmtree(without / "prior")
    message = refused("sample", without, tmp_path / "out", "-n", 4)
    assert "finish the run with `diffem run`" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_shards")
def test_two_workers_draw_the_bytes_of_one(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    command = ("reconstruct", run.url, new, "--draws", 2)
    assert diffem(*command, alone).exit_code == 0
    result = diffem(*command, together, "--set", "runner.workers=2", "--json")
    assert result.exit_code == 0, result.output
    assert arrays_of(together) == arrays_of(alone)
    for number, draws in ((1, 16), (2, 4)):
        assert f"drawing · part {number} of 2: {draws} of {draws} draws" in result.stderr
    # What is there is left, also by workers.
    (together / "draws.json").unlink()
    (together / "shards/00001.json").unlink()
    result = diffem(*command, together, "--set", "runner.workers=2", "--json")
    assert json.loads(result.stdout)["reused"] == 2
    assert arrays_of(together) == arrays_of(alone)


def test_a_worker_that_finds_another_model_refuses(run: Run, new: Path, tmp_path: Path) -> None:  # noqa: F811
    request = ReconstructRequest(
        run=run.url, observations=str(new), out=str(tmp_path / "out"), draws=1
    )
    assert ReconstructRequest.of(request.encoded()) == request
    work.reconstruct(request)
    (tmp_path / "out/shards/00000.json").unlink()
    with pytest.raises(ValueError, match="see that all processes read the same run"):
        draw_shards(replace(request, iteration=0).encoded(), [0], "drawing")
    assert draw_shards(request.encoded(), [0], "drawing") == 1
    assert draw_shards(request.encoded(), [0], "drawing") == 0


def test_an_end_that_an_earlier_run_was_asked_for_ends_nothing_here(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
) -> None:
    cancellation.request("of an earlier run")
    assert diffem("reconstruct", run.url, new, tmp_path / "out", "--draws", 1).exit_code == 0


def test_only_where_to_draw_can_be_set(run: Run, new: Path, tmp_path: Path) -> None:  # noqa: F811
    command = ("reconstruct", run.url, new, tmp_path / "out")
    said = refused(*command, "--set", "m_step.steps=3")
    assert "'m_step.steps=3'" in said
    assert "give runner.KEY=VALUE" in said
    said = refused(*command, "--set", "runner.workers=0")
    assert "runner.workers: received 0" in said
    said = refused(*command, "--set", "runner.kind=ray", "--set", "runner.workers=2")
    assert "runner.workers: unknown key" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_blocks_begin_anywhere(
    run: Run,  # noqa: F811
    tmp_path: Path,
    rows: int,
) -> None:
    np.savez(tmp_path / "all.npz", **observed(run, 40))  # type: ignore[arg-type]
    for source in (str(tmp_path / "all.npz"), run.url):
        with opened_observations(source, run.posterior().channel) as incoming:
            whole = list(incoming.blocks(rows))
            for first in range(len(whole)):
                rest = list(incoming.blocks(rows, first))
                assert len(rest) == len(whole) - first
                for ours, theirs in zip(rest, whole[first:], strict=True):
                    for name, values in theirs.arrays().items():
                        np.testing.assert_array_equal(ours.arrays()[name], values)


def test_workers_that_die_are_told_without_a_traceback(
    run: Run,  # noqa: F811
    new: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dies(*_: Any, **__: Any) -> None:
        raise WorkerDied("worker 1 (processor) was ended by SIGKILL")

    monkeypatch.setattr(work, "draw", dies)
    result = diffem("reconstruct", run.url, new, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "diffem: worker 1 (processor) was ended by SIGKILL"
