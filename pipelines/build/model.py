"""Network, schedule and training-time configs to the objects that they describe."""

from __future__ import annotations

import math
from typing import assert_never

import torch

from diffem_core.channel import Channel
from diffem_core.denoiser import Denoiser
from diffem_core.gaussian_condition import GaussianPosteriorChannel
from diffem_core.networks.diffusers_unet import DiffusersUNet
from diffem_core.networks.mlp import MLP
from diffem_core.networks.unet import UNet
from diffem_core.schedule import Schedule, VEKarras, VELogLinear
from diffem_core.seeds import derive_seed, seeded_initialization
from diffem_core.times import (
    BetaMixtureTime,
    BetaTime,
    LogNormalTime,
    TimeDistribution,
    UniformTime,
)
from pipelines.build.targets import build_target
from storage_schemas import config as models

__all__ = ["build_denoiser", "build_schedule", "build_times"]

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_schedule(config: models.ScheduleConfig) -> Schedule:
    """Build the noise schedule."""
    match config:
        case models.VELogLinear():
            return VELogLinear(sigma_min=config.sigma_min, sigma_max=config.sigma_max)
        case models.VEKarras():
            return VEKarras(sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho)
    assert_never(config)


def build_times(config: models.TimeConfig) -> TimeDistribution:
    """Build the distribution of training times."""
    match config:
        case models.BetaTime():
            return BetaTime(a=config.a, b=config.b)
        case models.BetaMixtureTime():
            first, second = (BetaTime(a=a, b=b) for a, b in (config.first, config.second))
            return BetaMixtureTime(first=first, second=second, weight=config.weight)
        case models.UniformTime():
            return UniformTime()
        case models.LogNormalTime():
            return LogNormalTime(mean=config.mean, std=config.std)
    assert_never(config)


def build_denoiser(
    config: models.RunConfig,
    channel: Channel,
    *,
    device: torch.device,
    conditional: bool = True,
) -> Denoiser:
    """Build a denoiser with the initial weights that belong to the run's seed.

    Arguments:
        config: The run's config.
        channel: The channel, which says what a conditional network sees.
        device: Where it is put.
        conditional: Whether its network sees observations.

    Raises:
        ValueError: The network does not fit the samples, or names what does not exist.
    """
    condition_channels = channel.condition_channels if conditional else 0
    preconditioning = None
    if conditional and isinstance(channel, GaussianPosteriorChannel):
        preconditioning = channel.preconditioning
    with seeded_initialization(derive_seed(config.seed, "network")):
        network = _network(
            config.network,
            channel.x_shape,
            condition_channels,
            zero_output=preconditioning is not None,
        )
    denoiser = Denoiser(
        network,
        precision=_PRECISIONS[config.precision],
        preconditioning=preconditioning,
        replay=config.runner.cuda_graphs,
    )
    return denoiser.to(device)


def _network(
    config: models.NetworkConfig,
    x_shape: tuple[int, ...],
    condition_channels: int,
    *,
    zero_output: bool,
) -> torch.nn.Module:
    """Build the network; the U-Net begins as 0 anyway."""
    match config:
        case models.UnetNetwork():
            return UNet(
                in_channels=x_shape[0],
                condition_channels=condition_channels,
                out_channels=x_shape[0],
                channels=config.channels,
                blocks=config.blocks,
                attention=config.attention,
                embedding=config.embedding,
                dropout=config.dropout,
            )
        case models.MlpNetwork():
            return MLP(
                features=math.prod(x_shape),
                condition_features=condition_channels,
                hidden=config.hidden,
                embedding=config.embedding,
                zero_output=zero_output,
            )
        case models.DiffusersNetwork():
            return DiffusersUNet(x_shape, condition_channels, config.arguments)
        case models.CustomNetwork():
            built = build_target(
                config.target,
                x_shape,
                condition_channels,
                arguments=config.arguments,
                key="network.target",
            )
            if not isinstance(built, torch.nn.Module):
                raise ValueError(
                    f"network.target {config.target!r} made a {type(built).__name__}, which is no "
                    "torch.nn.Module; subclass it"
                )
            return built
    assert_never(config)
