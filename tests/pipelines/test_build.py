"""Every field of a config reaches the object that it is for."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipelines import build
from pipelines.config_io import load_config
from storage_schemas.config import RunConfig

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
    built = build.build_channel(
        config.channel, (5,) if config.data.kind == "manifold" else (1, 8, 8)
    )
    return type(built), built.noise_std, built.y_shape, getattr(built, "keep", None)


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


@pytest.mark.parametrize(
    ("source", "override", "object_of"),
    [
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
        for step in range(build.m_step_length(config.m_step, k))
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
