"""Every way to run EM, from end to end on a tiny run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.flows import em_run
from pipelines.stages import iterations, training
from pipelines.stages.bench import Bench
from pipelines.status import read_status
from storage_schemas.run_store import RunStore
from storage_schemas.verify import verify
from tests.pipelines.test_run import make_run

pytestmark = pytest.mark.usefixtures("prefect_server")


def weights_of(url: Path, iteration: int) -> dict[str, Any]:
    return RunStore.open(str(url)).iteration(iteration).read_tensors("model")[0]


def kind_of(url: Path, iteration: int) -> str:
    kind: str = RunStore.open(str(url)).iteration(iteration).read_tensors("model")[1]["kind"]
    return kind


@pytest.mark.parametrize("covariance", ["tweedie", "cov_x"])
def test_em_mmps_trains_a_network_that_sees_no_observation(
    covariance: str, tiny_config: Path, tmp_path: Path
) -> None:
    url = tmp_path / "run"
    make_run(url, tiny_config, "method=em-mmps", f"mmps.covariance={covariance}")
    assert kind_of(url, 0) == kind_of(url, 1) == "unconditional denoiser"
    store = RunStore.open(str(url))
    assert store.objects.exists("iterations/001/cov_x.safetensors") == (covariance == "cov_x")
    assert verify(str(url)).ok
    # Its posterior samples agree with what was observed, up to the noise.
    bench = Bench.open(str(url))
    observations = store.observations("train")
    y, mask = observations.y(), observations.params()["mask"]
    x_hat = store.iteration(1).read_reconstructions()
    misfit = np.sqrt(np.square((x_hat - y)[mask > 0]).mean())
    assert misfit < 4 * (bench.channel.noise_std or 0.0)


def test_a_warm_start_is_em_mmps_and_then_diffem(tiny_config: Path, tmp_path: Path) -> None:
    warm, cold = tmp_path / "warm", tmp_path / "cold"
    overrides = ["start={kind: mmps, laps: 1, gaussian: {iterations: 4}}", "m_step.first_steps=15"]
    make_run(warm, tiny_config, *overrides)
    make_run(cold, tiny_config, "method=em-mmps", "iterations=1", "m_step.first_steps=15")
    assert kind_of(warm, 0) == "unconditional denoiser"
    assert kind_of(warm, 1) == "conditional denoiser"
    for name, value in weights_of(cold, 0).items():
        np.testing.assert_array_equal(weights_of(warm, 0)[name], value)
    # Both networks begin anew, so both take the steps of a first M-step.
    steps = [
        RunStore.open(str(warm)).iteration(k).stage("m_step").units  # type: ignore[union-attr]
        for k in (0, 1)
    ]
    assert steps == [15, 15]


def test_the_pseudo_inverse_serves_as_start_of_any_channel(
    tiny_config: Path, tmp_path: Path
) -> None:
    masked, jpeg = tmp_path / "masked", tmp_path / "jpeg"
    make_run(masked, tiny_config, "start={kind: pseudo_inverse}", "iterations=1")
    store = RunStore.open(str(masked))
    observations = store.observations("train")
    np.testing.assert_array_equal(
        store.iteration(0).read_reconstructions(), observations.y() * observations.params()["mask"]
    )
    make_run(
        jpeg,
        tiny_config,
        "start={kind: pseudo_inverse}",
        "channel={kind: jpeg, quality: 20, low: 0, high: 16}",
        "iterations=1",
    )
    store = RunStore.open(str(jpeg))
    np.testing.assert_array_equal(
        store.iteration(0).read_reconstructions(), store.observations("train").y()
    )
    assert "divergence" in read_status(store).history[0].metrics


def test_a_model_that_exists_goes_on(tiny_config: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make_run(first, tiny_config)
    model = first / "iterations/001/model.safetensors"
    make_run(
        second,
        tiny_config,
        f"start={{kind: model, url: {model}}}",
        "iterations=1",
        "m_step.learning_rate={kind: constant, value: 1.0e-9}",
    )
    for name, value in weights_of(first, 1).items():
        copied = RunStore.open(str(second)).start().read_tensors("model")[0][name]
        np.testing.assert_array_equal(copied, value)
        # Twelve steps at so small a learning rate leave the weights where they began.
        np.testing.assert_allclose(weights_of(second, 0)[name], value, atol=1e-7)
    ours, theirs = (read_status(RunStore.open(str(url))) for url in (second, first))
    # The start is judged with the same draws as the iteration that made the model.
    for name in ("rmse_sample", "divergence"):
        assert ours.start.metrics[name].value == theirs.history[1].metrics[name].value


@pytest.mark.parametrize("kind", ["unconditional", "joint"])
def test_a_prior_is_made_after_the_last_iteration(
    kind: str, tiny_config: Path, tmp_path: Path
) -> None:
    url = tmp_path / "run"
    given = "{kind: joint, samples: 64}"
    if kind == "unconditional":
        given = "{kind: unconditional, steps: 10, batch_size: 16, samples: 64}"
    make_run(url, tiny_config, f"prior={given}", "iterations=1")
    store = RunStore.open(str(url))
    status = read_status(store)
    assert status.state == "complete"
    assert status.prior is not None
    assert {"divergence", "distance"} <= set(status.prior.metrics)
    assert store.prior().read_tensors("samples")[0]["x"].shape == (64, 1, 8, 8)
    assert verify(str(url)).ok
    assert em_run(str(url))["prior_reused"]

    # Further iterations make it stale: it is made anew, of the last of them.
    before = store.prior().manifest()
    make_run(url, tiny_config, f"prior={given}", "iterations=2")
    after = store.prior().manifest()
    assert before is not None
    assert after is not None
    assert (before.iteration, after.iteration) == (0, 1)
    assert before.model_digest != after.model_digest
    assert verify(str(url)).ok


def test_damage_to_a_prior_is_named_and_repaired(tiny_config: Path, tmp_path: Path) -> None:
    url = tmp_path / "run"
    given = "prior={kind: unconditional, steps: 10, batch_size: 16, samples: 64}"
    make_run(url, tiny_config, given, "iterations=1")
    model = url / "prior/model.safetensors"
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert [f.path for f in verify(str(url)).damaged] == ["prior/model.safetensors"]
    em_run(str(url))
    assert model.read_bytes() == good
    assert verify(str(url)).ok


def test_a_lazy_e_step_redraws_a_part(tiny_config: Path, tmp_path: Path) -> None:
    url = tmp_path / "run"
    make_run(url, tiny_config, "e_step.refresh=0.25", "iterations=5")
    store = RunStore.open(str(url))
    drawn = [store.iteration(k).read_reconstructions() for k in range(5)]
    changed = np.stack(
        [(drawn[k + 1] != drawn[k]).reshape(len(drawn[0]), -1).any(axis=1) for k in range(4)]
    )
    # In four iterations of a quarter each, every reconstruction has its turn exactly once.
    assert (changed.sum(axis=0) == 1).all()
    # 200 observations, a quarter of them: 50, standard deviation sqrt(200 * 3 / 16) = 6.1.
    assert (abs(changed.sum(axis=1) - 50) < 5 * 6.1).all()


def test_reconstructions_may_be_stored_at_half_the_size(tiny_config: Path, tmp_path: Path) -> None:
    url = tmp_path / "run"
    make_run(url, tiny_config, "e_step.stored_as=float16")
    for iteration in (0, 1):
        drawn = RunStore.open(str(url)).iteration(iteration).read_reconstructions()
        assert drawn.dtype == np.float16
    assert verify(str(url)).ok


def test_what_is_kept_out_never_trains(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "run"
    seen = []
    real = iterations.train

    def watch(bench: Any, folder: Any, denoiser: Any, x_hat: Any, plan: Any, *rest: Any) -> Any:
        assert plan.validation is not None
        seen.append((x_hat, plan.validation.x_hat))
        return real(bench, folder, denoiser, x_hat, plan, *rest)

    monkeypatch.setattr(iterations, "train", watch)
    make_run(url, tiny_config, "m_step.validation={fraction: 0.1, every: 5}")
    store = RunStore.open(str(url))
    for k, (learned, kept) in enumerate(seen):
        assert (len(learned), len(kept)) == (180, 20)
        x_hat = torch.from_numpy(store.iteration(k).read_reconstructions())
        rows = [int((x_hat == row).flatten(1).all(1).nonzero()[0]) for row in kept]
        others = [int((x_hat == row).flatten(1).all(1).nonzero()[0]) for row in learned]
        assert not set(rows) & set(others)
        seen[k] = rows
    assert seen[0] == seen[1], "the same observations are kept out in every iteration"
    losses = json.loads((url / "iterations/001/losses.json").read_text())
    assert [step for step, _ in losses["validation"]] == [5, 10, 12]


@pytest.mark.slow
def test_the_network_may_see_the_gaussian_mean(tiny_config: Path, tmp_path: Path) -> None:
    plain, shown = tmp_path / "plain", tmp_path / "shown"
    overrides = [
        "start={kind: mmps, laps: 1, gaussian: {iterations: 4}}",
        "channel.operators=observed",
        "prior={kind: joint, samples: 64}",
    ]
    make_run(plain, tiny_config, *overrides)
    make_run(shown, tiny_config, *overrides, "condition=gaussian_mean")
    shapes = [{k: v.shape for k, v in weights_of(url, 1).items()} for url in (plain, shown)]
    differing = [(shapes[0][k], shapes[1][k]) for k in shapes[0] if shapes[0][k] != shapes[1][k]]
    assert len(differing) == 1, "the first layer alone sees the condition"
    assert differing[0][1][1] == differing[0][0][1] + 1, "one band more"
    for name, value in weights_of(plain, 0).items():
        np.testing.assert_array_equal(weights_of(shown, 0)[name], value)
    bench = Bench.open(str(shown))
    prior = bench.store.start().read_tensors("model")[0]["mean"]
    posterior = bench.conditioning_channel
    nothing = torch.zeros(1, 1, 8, 8)
    seen = posterior.condition(nothing, {"mask": nothing}, bench.scaling)[0, -1]
    # Of an observation that sees nothing, the posterior mean is the prior's.
    expected = bench.scaling.to_network(torch.from_numpy(prior).reshape(8, 8).float())
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ["m_step.validation={fraction: 0.1, every: 2, patience: 1}", "m_step.batch_size=4"],
        pytest.param(["e_step.refresh=0.5"], marks=pytest.mark.slow),
        pytest.param(
            ["start={kind: mmps, laps: 1, gaussian: {iterations: 4}}"], marks=pytest.mark.slow
        ),
        ["condition=gaussian_posterior"],
        pytest.param(
            ["prior={kind: unconditional, steps: 10, batch_size: 16, samples: 64}"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_interrupted_and_resumed_it_ends_with_the_same_bytes(
    overrides: list[str], tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    make_run(whole, tiny_config, *overrides)
    real, steps = training.m_step, 0

    def interrupted(*args: Any, on_step: Any, **kwargs: Any) -> Any:
        def watch(state: Any) -> None:
            nonlocal steps
            on_step(state)
            steps += 1
            if steps % 5 == 0:
                raise KeyboardInterrupt

        return real(*args, on_step=watch, **kwargs)

    monkeypatch.setattr(training, "m_step", interrupted)
    often = [*overrides, "m_step.checkpoint_seconds=1e-9"]
    for _ in range(12):
        try:
            make_run(parted, tiny_config, *often)
            break
        except KeyboardInterrupt:
            continue
    assert steps > 5, "it was interrupted at least once"
    ours, theirs = (
        {
            path: RunStore.open(str(url)).objects.read(path)
            for path in RunStore.open(str(url)).objects.list()
            if path.endswith(("model.safetensors", "metrics.json", "losses.json"))
        }
        for url in (parted, whole)
    )
    assert ours == theirs


def test_masks_are_those_of_the_observations(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "run"
    drawn = []
    real = iterations.train

    def watch(bench: Any, folder: Any, denoiser: Any, x_hat: Any, plan: Any, *rest: Any) -> Any:
        drawn.append(plan.channel.draw_params(50, generator=torch.Generator().manual_seed(0)))
        return real(bench, folder, denoiser, x_hat, plan, *rest)

    monkeypatch.setattr(iterations, "train", watch)
    make_run(url, tiny_config, "channel.operators=observed", "iterations=1")
    observed = RunStore.open(str(url)).observations("train").params()["mask"]
    known = {mask.tobytes() for mask in observed}
    assert all(mask.numpy().tobytes() in known for mask in drawn[0]["mask"])


def test_every_first_class_channel_runs(tiny_config: Path, tmp_path: Path) -> None:
    channels = {
        "denoising": "{kind: denoising, noise_std: 4}",
        "super_resolution": "{kind: super_resolution, factor: 2, noise_std: 0.4}",
        "gaussian_blur": "{kind: gaussian_blur, sigma: [0.5, 1.5], noise_std: 0.4}",
        "compressed_sensing": "{kind: compressed_sensing, measurements: 32, noise_std: 0.4}",
        "mri": "{kind: mri, acceleration: 2, center: 0.25, noise_std: 0.4}",
        "deepinv": "{kind: deepinv, physics: Inpainting, generator: {name: "
        "BernoulliSplittingMaskGenerator, arguments: {split_ratio: 0.5, pixelwise: true}}, "
        "maps: [mask], noise: {name: GaussianNoise, arguments: {sigma: 0.4}}}",
    }
    for name, channel in channels.items():
        url = tmp_path / name
        data = "{kind: digits, limit: 240, holdout: 40, phase: smooth}" if name == "mri" else ""
        make_run(
            url,
            tiny_config,
            f"channel={channel}",
            "iterations=1",
            "evaluation.distance=null",
            *([f"data={data}"] if data else []),
        )
        metrics = read_status(RunStore.open(str(url))).history[0].metrics
        assert {"divergence", "rmse_sample", "psnr_mean"} <= set(metrics), name
        assert verify(str(url)).ok
