"""Config to core objects: one function per object, the only road to the mathematics."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import assert_never

import torch

from diffem_core.channel import Channel, RandomMask, RandomMatrix
from diffem_core.denoiser import Denoiser
from diffem_core.grids import karras_grid, log_linear_grid
from diffem_core.networks.mlp import MLP
from diffem_core.networks.unet import UNet
from diffem_core.posterior import DiffusionPosterior
from diffem_core.rates import constant_rate, cosine_rate, linear_rate
from diffem_core.samplers import Sampler, ddim, ddpm, dpm_solver
from diffem_core.scaling import Scaling
from diffem_core.schedule import VELogLinear
from diffem_core.seeds import derive_seed, seeded_initialization
from diffem_core.times import BetaTime, LogNormalTime, TimeDistribution, UniformTime
from storage_schemas import config as models

__all__ = [
    "build_channel",
    "build_denoiser",
    "build_device",
    "build_grid",
    "build_learning_rate",
    "build_posterior",
    "build_sampler",
    "build_scaling",
    "build_schedule",
    "build_temperature",
    "build_times",
    "m_step_length",
]

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_device(config: models.RunnerConfig) -> torch.device:
    """Choose the device and set the number of processor threads.

    Raises:
        ValueError: If the config asks for a GPU that is not there.
    """
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"runner.device is {config.device!r} but this machine has "
            f"{torch.cuda.device_count()} CUDA devices; "
            "set runner.device to 'cpu' or 'auto'"
        )
    return device


def build_scaling(config: models.DataConfig) -> Scaling:
    """Build the change of units: `value_range` onto [-2, 2], or nothing."""
    if config.value_range is None:
        return Scaling.identity()
    return Scaling.from_range(*config.value_range)


def build_channel(config: models.ChannelConfig, x_shape: tuple[int, ...]) -> Channel:
    """Build the channel Q(y | x) for samples of a shape, (C, H, W) or (D,)."""
    match config:
        case models.RandomMaskChannel():
            return RandomMask(x_shape, keep=config.keep, noise_std=config.noise_std)
        case models.RandomMatrixChannel():
            return RandomMatrix(math.prod(x_shape), rows=config.rows, noise_std=config.noise_std)
    assert_never(config)


def build_schedule(config: models.ScheduleConfig) -> VELogLinear:
    """Build the noise schedule."""
    return VELogLinear(sigma_min=config.sigma_min, sigma_max=config.sigma_max)


def build_times(config: models.TimeConfig) -> TimeDistribution:
    """Build the distribution of training times."""
    match config:
        case models.BetaTime():
            return BetaTime(a=config.a, b=config.b)
        case models.UniformTime():
            return UniformTime()
        case models.LogNormalTime():
            return LogNormalTime(mean=config.mean, std=config.std)
    assert_never(config)


def build_denoiser(
    config: models.RunConfig, channel: Channel, *, device: torch.device
) -> Denoiser:
    """Build the conditional denoiser with the initial weights that belong to the run's seed."""
    network: torch.nn.Module
    with seeded_initialization(derive_seed(config.seed, "network")):
        match config.network:
            case models.UnetNetwork() as unet:
                bands = channel.x_shape[0]
                network = UNet(
                    in_channels=bands,
                    condition_channels=channel.condition_channels,
                    out_channels=bands,
                    channels=unet.channels,
                    blocks=unet.blocks,
                    attention=unet.attention,
                    embedding=unet.embedding,
                    dropout=unet.dropout,
                )
            case models.MlpNetwork() as mlp:
                network = MLP(
                    features=math.prod(channel.x_shape),
                    condition_features=channel.condition_channels,
                    hidden=mlp.hidden,
                    embedding=mlp.embedding,
                )
            case _:
                assert_never(config.network)
    return Denoiser(network, precision=_PRECISIONS[config.precision]).to(device)


def build_grid(config: models.SamplerConfig, schedule: models.ScheduleConfig) -> torch.Tensor:
    """Build the sampler's noise levels, shape (steps + 1,), decreasing."""
    high = config.sigma_start or schedule.sigma_max
    low = config.sigma_end or schedule.sigma_min
    match config.grid:
        case models.LogLinearGrid():
            return log_linear_grid(high, low, config.steps)
        case models.KarrasGrid():
            return karras_grid(high, low, config.steps, rho=config.grid.rho)
    assert_never(config.grid)


def build_sampler(config: models.SamplerConfig, schedule: models.ScheduleConfig) -> Sampler:
    """Build the sampler with its grid."""
    sigmas = build_grid(config, schedule)
    match config:
        case models.DdpmSampler():
            return functools.partial(ddpm, sigmas=sigmas)
        case models.DdimSampler():
            return functools.partial(ddim, sigmas=sigmas)
        case models.DpmSolverSampler():
            return functools.partial(dpm_solver, sigmas=sigmas, stochastic=config.stochastic)
    assert_never(config)


def build_posterior(
    config: models.RunConfig, channel: Channel, denoiser: Denoiser
) -> DiffusionPosterior:
    """Build the posterior that a denoiser has learned."""
    sampler = build_sampler(config.e_step.sampler, config.schedule)
    return DiffusionPosterior(denoiser, channel, build_scaling(config.data), sampler)


def build_temperature(config: models.EStepConfig, iteration: int) -> float:
    """Compute the factor on the noise of an iteration's E-step."""
    tempering = config.tempering
    if tempering is None:
        return 1.0
    progress = min(1.0, iteration / tempering.iterations)
    return tempering.first + (1 - tempering.first) * progress


def m_step_length(config: models.MStepConfig, iteration: int) -> int:
    """Count the gradient steps of an iteration."""
    return config.first_steps or config.steps if iteration == 0 else config.steps


def build_learning_rate(config: models.RunConfig, iteration: int) -> Callable[[int], float]:
    """Build the learning rate of an iteration, as a function of its own step.

    A rate that decays over the run goes on where the iteration before stopped, and reaches its
    floor with the run's last step.
    """
    rate = config.m_step.learning_rate
    lengths = [m_step_length(config.m_step, k) for k in range(config.iterations)]
    match rate:
        case models.ConstantRate():
            return constant_rate(rate.value)
        case models.LinearRate() | models.CosineRate():
            if rate.over == "run":
                span, offset = sum(lengths), sum(itertools.islice(lengths, iteration))
            else:
                span, offset = m_step_length(config.m_step, iteration), 0
            build = linear_rate if isinstance(rate, models.LinearRate) else cosine_rate
            return build(rate.value, floor=rate.floor, steps=span, offset=offset)
    assert_never(rate)
