"""Every field of a config reaches the object that it is for."""

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffem_core.noise import SampleNoise
from diffem_core.samplers import ddpm
from diffem_core.scaling import Scaling
from diffem_core.times import BetaTime
from pipelines import build
from pipelines.config_io import load_config
from pipelines.evaluation import classifier
from storage_schemas.config import GaussianStart, LocalRunner, RunConfig

DIGITS = "deploy/experiments/digits.yaml"
MANIFOLD = "deploy/experiments/manifold.yaml"
CPU = torch.device("cpu")


def network(config: RunConfig) -> list[tuple[str, tuple[int, ...]]]:
    shape = (5,) if config.data.kind == "manifold" else (1, 8, 8)
    channel = build.build_channel(config.channel, shape)
    denoiser = build.build_denoiser(config, channel, device=CPU)
    return [(name, tuple(p.shape)) for name, p in denoiser.named_parameters()]


def weights(config: RunConfig) -> float:
    channel = build.build_channel(config.channel, (1, 8, 8))
    return float(
        next(build.build_denoiser(config, channel, device=CPU).parameters()).detach().sum()
    )


def modules(config: RunConfig) -> str:
    channel = build.build_channel(config.channel, (1, 8, 8))
    denoiser = build.build_denoiser(config, channel, device=CPU)
    rates = [m.rate for m in denoiser.modules() if type(m).__name__ == "Dropout"]
    return f"{denoiser.precision} {rates}"


def channel(config: RunConfig) -> tuple[Any, ...]:
    """Return what the channel of a config does to fixed samples."""
    shape = (5,) if config.data.kind == "manifold" else (1, 8, 8)
    if config.channel.kind == "mri":
        shape = (2, 8, 8)
    built = build.build_channel(config.channel, shape)
    generator = torch.Generator().manual_seed(0)
    x = 8 + 8 * torch.rand(4, *shape, generator=generator)
    params = built.draw_params(4, generator=generator)
    y = built.corrupt(x, params, generator=generator)
    seen = built.condition(y, params, build.build_scaling(config.data))
    return type(built), built.y_shape, y.flatten().tolist(), seen.flatten().tolist()


def sampler(config: RunConfig) -> tuple[Any, ...]:
    built = build.build_sampler(config.e_step.sampler, config.schedule)
    assert isinstance(built, functools.partial)
    keywords = dict(built.keywords)
    return built.func, tuple(keywords.pop("sigmas").tolist()), tuple(sorted(keywords.items()))


def times(config: RunConfig) -> list[float]:
    return (
        build.build_times(config.time)
        .sample(
            16,
            schedule=build.build_schedule(config.schedule),
            generator=torch.Generator().manual_seed(0),
        )
        .tolist()
    )


def rates(config: RunConfig) -> list[float]:
    rate = build.build_learning_rate(config, 1)
    return [rate(step) for step in (0, 50, 139)]


def temperatures(config: RunConfig) -> list[float]:
    return [build.build_temperature(config.e_step, k) for k in range(4)]


def scaling(config: RunConfig) -> Any:
    return build.build_scaling(config.data)


def schedule(config: RunConfig) -> Any:
    return build.build_schedule(config.schedule)


def augmentation(config: RunConfig) -> Any:
    return build.build_augmentation(config.m_step)


def steps(config: RunConfig) -> list[int]:
    return [build.sampler_of(config.e_step, k).steps for k in (0, 1, 2, 3)]


CHANNELS = {
    "denoising": {"noise_std": 1.0},
    "super_resolution": {"factor": 2, "noise_std": 0.5},
    "gaussian_blur": {"sigma": 1.0, "noise_std": 0.5},
    "compressed_sensing": {"measurements": 20, "noise_std": 0.5},
    "mri": {"acceleration": 2.0, "center": 0.25, "noise_std": 0.5},
    "poisson": {"gain": 0.5},
    "quantization": {"low": 0.0, "high": 16.0, "levels": 4},
    "jpeg": {"quality": 30, "low": 0.0, "high": 16.0},
    "deepinv": {
        "physics": "Inpainting",
        "arguments": {"mask": 0.5, "seed": 0},
        "noise": {"name": "GaussianNoise", "arguments": {"sigma": 0.5}},
    },
    "custom": {
        "target": "diffem_core.physics_channels:denoising",
        "arguments": {"noise_std": 0.5},
    },
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("denoising", "noise_std", 2.0),
        ("super_resolution", "factor", 4),
        ("super_resolution", "noise_std", 1.0),
        ("super_resolution", "shifts", False),
        ("gaussian_blur", "sigma", 2.0),
        ("gaussian_blur", "sigma", [0.5, 1.0]),
        ("gaussian_blur", "noise_std", 1.0),
        ("compressed_sensing", "measurements", 30),
        ("compressed_sensing", "noise_std", 1.0),
        ("compressed_sensing", "seed", 1),
        ("compressed_sensing", "fixed", True),
        ("mri", "acceleration", 4.0),
        ("mri", "center", 0.0),
        ("mri", "noise_std", 1.0),
        ("poisson", "gain", 1.0),
        ("quantization", "low", 4.0),
        ("quantization", "high", 12.0),
        ("quantization", "levels", 8),
        ("quantization", "noise_std", 1.0),
        ("jpeg", "quality", 90),
        ("jpeg", "low", -8.0),
        ("jpeg", "high", 32.0),
        ("deepinv", "physics", "Denoising"),
        ("deepinv", "arguments", {"mask": 0.25, "seed": 0}),
        ("deepinv", "noise", None),
        ("deepinv", "generator", {"name": "BernoulliSplittingMaskGenerator"}),
        ("deepinv", "estimate", "y"),
        ("custom", "target", "diffem_core.physics_channels:poisson"),
        ("custom", "arguments", {"noise_std": 1.0}),
    ],
)
def test_a_field_of_a_channel_changes_what_it_does(kind: str, field: str, value: Any) -> None:
    before = {"kind": kind, **CHANNELS[kind]}
    after = {**before, field: value}
    if kind == "deepinv" and field == "physics":
        after["arguments"] = {}
    if kind == "deepinv" and field == "generator":
        after["generator"]["arguments"] = {"split_ratio": 0.5, "pixelwise": True}
        after["arguments"] = {}
    if kind == "custom" and field == "target":
        after["arguments"] = {"gain": 1.0}
    data = "data={kind: digits, phase: smooth}" if kind == "mri" else "seed=0"
    first, second = (
        load_config(DIGITS, [data, f"channel={json.dumps(given)}"]) for given in (before, after)
    )
    assert channel(first) != channel(second)
    assert channel(first) == channel(first)


@pytest.mark.parametrize(
    ("source", "override", "object_of"),
    [
        (DIGITS, "schedule={kind: ve_karras, sigma_min: 0.15, sigma_max: 10}", schedule),
        (DIGITS, "schedule={kind: ve_karras, rho: 5}", schedule),
        (DIGITS, "time={kind: beta_mixture}", times),
        (DIGITS, "time={kind: beta_mixture, first: [1, 5]}", times),
        (DIGITS, "time={kind: beta_mixture, second: [5, 1]}", times),
        (DIGITS, "time={kind: beta_mixture, weight: 0.3}", times),
        (DIGITS, "e_step.sampler.kind=heun", sampler),
        (DIGITS, "e_step.sampler.kind=predictor_corrector", sampler),
        (
            DIGITS,
            "e_step.sampler={kind: predictor_corrector, steps: 8, corrections: 2}",
            sampler,
        ),
        (DIGITS, "e_step.sampler={kind: predictor_corrector, steps: 8, tau: 0.2}", sampler),
        (DIGITS, "e_step.annealing={first: 2, iterations: 3}", steps),
        (DIGITS, "e_step.annealing={first: 4, iterations: 2}", steps),
        (DIGITS, "m_step.augmentation={flip: true}", augmentation),
        (DIGITS, "m_step.augmentation={flip: true, hue: 0.1}", augmentation),
        (DIGITS, "m_step.augmentation={flip: true, saturation: [0.9, 1.1]}", augmentation),
        (DIGITS, "m_step.augmentation={flip: false}", augmentation),
        (DIGITS, "network.channels=[16,64]", network),
        (DIGITS, "network.blocks=[2,2]", network),
        (DIGITS, "network.attention={1: 4}", network),
        (DIGITS, "network.embedding=32", network),
        (DIGITS, "network.dropout=0.3", modules),
        (DIGITS, "precision=bfloat16", modules),
        (DIGITS, "seed=1", weights),
        (MANIFOLD, "network.hidden=[64]", network),
        (MANIFOLD, "network.embedding=32", network),
        (DIGITS, "channel.keep=0.25", channel),
        (DIGITS, "channel.noise_std=1.0", channel),
        (MANIFOLD, "channel.rows=3", channel),
        (MANIFOLD, "channel.noise_std=1.0", channel),
        (DIGITS, "data.value_range=[0,255]", scaling),
        (DIGITS, "schedule.sigma_min=0.01", schedule),
        (DIGITS, "schedule.sigma_max=50", schedule),
        (DIGITS, "time.mean=0.0", times),
        (DIGITS, "time.std=1.0", times),
        (DIGITS, "time={kind: beta}", times),
        (MANIFOLD, "time={kind: beta, a: 2}", times),
        (MANIFOLD, "time={kind: beta, b: 2}", times),
        (DIGITS, "time={kind: uniform}", times),
        (DIGITS, "e_step.sampler.steps=9", sampler),
        (DIGITS, "e_step.sampler.kind=ddpm", sampler),
        (DIGITS, "e_step.sampler.kind=ddim", sampler),
        (DIGITS, "e_step.sampler.stochastic=false", sampler),
        (DIGITS, "e_step.sampler.sigma_start=5", sampler),
        (DIGITS, "e_step.sampler.sigma_end=0.2", sampler),
        (DIGITS, "e_step.sampler.grid.rho=7", sampler),
        (DIGITS, "e_step.sampler.grid={kind: log_linear}", sampler),
        (DIGITS, "schedule.sigma_max=50", sampler),
        (DIGITS, "e_step.tempering=null", temperatures),
        (DIGITS, "e_step.tempering.first=0.9", temperatures),
        (DIGITS, "e_step.tempering.iterations=2", temperatures),
        (DIGITS, "m_step.learning_rate.value=1e-3", rates),
        (DIGITS, "m_step.learning_rate.floor=0.5", rates),
        (DIGITS, "m_step.learning_rate.over=iteration", rates),
        (DIGITS, "m_step.learning_rate.kind=linear", rates),
        (DIGITS, "m_step.learning_rate={kind: constant}", rates),
        (DIGITS, "m_step.first_steps=50", rates),
        (DIGITS, "iterations=5", rates),
    ],
)
def test_a_field_changes_its_object(
    source: str, override: str, object_of: Callable[[RunConfig], Any]
) -> None:
    config = load_config(source)
    sets = [override]
    if override.startswith("e_step.sampler.kind="):
        # The other samplers have no `stochastic`; build them from what they share.
        steps = config.e_step.sampler.steps
        sets = [f"e_step.sampler={{kind: {override.partition('=')[2]}, steps: {steps}}}"]
    assert object_of(load_config(source, sets)) != object_of(config)


def test_a_rate_over_the_run_goes_on_from_iteration_to_iteration() -> None:
    config = load_config(DIGITS, ["m_step.steps=10", "m_step.first_steps=30", "iterations=3"])
    course = [
        build.build_learning_rate(config, k)(step)
        for k in range(3)
        for step in range(build.m_step_length(config, k))
    ]
    assert len(course) == 50
    assert all(a > b for a, b in itertools.pairwise(course))
    rate = config.m_step.learning_rate
    assert course[0] == pytest.approx(rate.value)
    assert course[-1] == pytest.approx(rate.value * getattr(rate, "floor", 1), rel=1e-6)


def test_tempering_ends_at_the_samplers_own_noise() -> None:
    config = load_config(DIGITS, ["e_step.tempering={first: 0.5, iterations: 2}"])
    assert temperatures(config) == [0.5, 0.75, 1.0, 1.0]


def test_initial_weights_do_not_depend_on_what_was_drawn_before() -> None:
    config = load_config(DIGITS)
    first = weights(config)
    torch.rand(7)
    assert weights(config) == first


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set runner\.device to 'cpu' or 'auto'"):
        build.build_device(load_config(DIGITS, ["runner.device=cuda:99"]).runner)


def test_the_number_of_threads_is_set() -> None:
    before = torch.get_num_threads()
    try:
        build.build_device(load_config(DIGITS, ["runner.threads=1", "runner.device=cpu"]).runner)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_annealing_ends_at_the_samplers_own_steps() -> None:
    config = load_config(
        DIGITS, ["e_step.annealing={first: 2, iterations: 3}", "e_step.sampler.steps=8"]
    )
    assert steps(config) == [2, 4, 6, 8]
    assert build.sampler_of(config.e_step).steps == 8, "evaluations take all steps"


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm_solver", "heun", "predictor_corrector"])
def test_network_calls_are_counted(kind: str) -> None:
    config = load_config(DIGITS, [f"e_step.sampler={{kind: {kind}, steps: 5}}"])
    calls = []

    def denoise(x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(float(sigma))
        return 0.5 * x_t

    noise = SampleNoise([1, 2])
    build.build_sampler(config.e_step.sampler, config.schedule)(denoise, noise=noise, shape=(3,))
    assert len(calls) == build.network_calls(config.e_step.sampler)


def test_the_network_sees_the_observation_only_where_it_is_conditional() -> None:
    config = load_config(DIGITS)
    channel = build.build_channel(config.channel, (1, 8, 8))
    shapes = [
        next(
            build.build_denoiser(config, channel, device=CPU, conditional=given).parameters()
        ).shape
        for given in (True, False)
    ]
    assert shapes[0] != shapes[1]


def test_the_defaults_are_the_paper_s_network_and_settings() -> None:
    config = load_config(
        DIGITS,
        [
            "data={kind: photos, size: 32, bands: 3}",
            "channel={kind: random_mask, keep: 0.25, noise_std: 0.01}",
            "network={kind: unet}",
            "schedule={kind: ve_log_linear}",
            "time={kind: beta}",
            "e_step={}",
            "m_step={steps: 1}",
            "start={kind: gaussian}",
            "evaluation={}",
        ],
    )
    channel = build.build_channel(config.channel, config.data.x_shape)
    denoiser = build.build_denoiser(config, channel, device=CPU)
    # The official conditional network at the CIFAR-10 configuration.
    assert sum(p.numel() for p in denoiser.parameters()) == pytest.approx(57_564_294, rel=1e-4)
    built = build.build_schedule(config.schedule)
    assert (built.sigma_min, built.sigma_max) == (1e-3, 1e2)
    assert build.build_times(config.time) == BetaTime(a=3.0, b=3.0)
    assert build.build_scaling(config.data).to_network(torch.tensor([0.0, 255.0])).tolist() == [
        -2,
        2,
    ]
    drawn = build.build_sampler(config.e_step.sampler, config.schedule)
    assert isinstance(drawn, functools.partial)
    assert drawn.func is ddpm
    assert len(drawn.keywords["sigmas"]) == 257
    rate = build.build_learning_rate(config, 3)
    assert rate(0) == rate(1000) == 2e-4
    assert (config.m_step.ema_decay, config.m_step.clip_norm) == (0.9999, 1.0)
    assert config.start == GaussianStart(iterations=16)


def test_cuda_graphs_reach_the_denoiser() -> None:
    for told, expected in (("true", True), ("false", False)):
        config = load_config(DIGITS, [f"runner.cuda_graphs={told}"])
        channel = build.build_channel(config.channel, config.data.x_shape)
        denoiser = build.build_denoiser(config, channel, device=torch.device("cpu"))
        assert denoiser.replay is expected
        assert not denoiser.replays, "a processor has nothing to replay"


def test_a_gpu_trains_in_a_fixed_order_unless_it_need_not() -> None:
    """What PyTorch does with that is tried on a GPU, in tests/gpu."""
    gpu = torch.device("cuda")
    enabled = torch.are_deterministic_algorithms_enabled
    with build.repeatable(LocalRunner(), gpu):
        assert enabled()
    assert not enabled()
    for runner, device in ((LocalRunner(deterministic=False), gpu), (LocalRunner(), CPU)):
        with build.repeatable(runner, device):
            assert not enabled()
    unordered = "upsample_bicubic2d does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(ValueError, match=r"\(upsample_bicubic2d\).*set runner\.deterministic to"),
        build.repeatable(LocalRunner(), gpu),
    ):
        raise RuntimeError(unordered)
    assert not enabled()
    with (
        pytest.raises(RuntimeError, match="the GPU is gone"),
        build.repeatable(LocalRunner(), gpu),
    ):
        raise RuntimeError("the GPU is gone")


def test_the_classifier_of_clean_images_is_fitted_by_few_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    class Fitted(torch.nn.Module):
        @classmethod
        def fit(cls, *arguments: object, **more: object) -> "Fitted":
            seen.append(torch.get_num_threads())
            return cls()

    monkeypatch.setattr(classifier, "DigitClassifier", Fitted)
    before = torch.get_num_threads()
    torch.set_num_threads(9)
    try:
        x, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2)
        scaling = Scaling.from_range(0, 1)
        classifier.fit_classifier(
            x, labels, scaling=scaling, seed=0, epochs=1, runner=LocalRunner(), device=CPU
        )
        assert seen == [4]
        assert torch.get_num_threads() == 9
    finally:
        torch.set_num_threads(before)
