"""Channel config to channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from diffem_core.channel import Channel, RandomMask, RandomMatrix
from diffem_core.deepinv_channels import deepinv_channel
from diffem_core.gaussian_condition import GaussianMeanChannel, GaussianPosteriorChannel
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.observed_operators import with_observed_operators
from diffem_core.physics_channels import (
    accelerated_mri,
    compressed_sensing,
    denoising,
    gaussian_blur,
    jpeg,
    poisson,
    quantization,
    super_resolution,
)
from pipelines.build.targets import build_target
from storage_schemas import config as models

__all__ = [
    "build_channel",
    "build_conditioning_channel",
    "build_recorrupting_channel",
    "resamples_operators",
    "stand_in_prior",
]


def build_channel(config: models.ChannelConfig, x_shape: tuple[int, ...]) -> Channel:
    """Build the channel Q(y | x) for samples of a shape, (C, H, W) or (D,).

    Raises:
        ValueError: The channel does not fit the samples, or names what does not exist.
    """
    match config:
        case models.RandomMaskChannel():
            return RandomMask(x_shape, keep=config.keep, noise_std=config.noise_std)
        case models.RandomMatrixChannel():
            return RandomMatrix(math.prod(x_shape), rows=config.rows, noise_std=config.noise_std)
        case models.DenoisingChannel():
            return denoising(x_shape, noise_std=config.noise_std)
        case models.SuperResolutionChannel():
            return super_resolution(
                x_shape, factor=config.factor, noise_std=config.noise_std, shifts=config.shifts
            )
        case models.GaussianBlurChannel():
            return gaussian_blur(x_shape, sigma=config.sigma, noise_std=config.noise_std)
        case models.CompressedSensingChannel():
            return compressed_sensing(
                x_shape,
                measurements=config.measurements,
                noise_std=config.noise_std,
                seed=config.seed,
                fixed=config.fixed,
            )
        case models.MriChannel():
            return _mri(config, x_shape)
        case models.PoissonChannel():
            return poisson(x_shape, gain=config.gain)
        case models.QuantizationChannel():
            return quantization(
                x_shape,
                low=config.low,
                high=config.high,
                levels=config.levels,
                noise_std=config.noise_std,
            )
        case models.JpegChannel():
            return jpeg(x_shape, quality=config.quality, low=config.low, high=config.high)
        case models.DeepinvChannel():
            return deepinv_channel(
                x_shape,
                physics=config.physics,
                arguments=config.arguments,
                generator=_part(config.generator),
                noise=_part(config.noise),
                estimate=config.estimate,
                maps=config.maps,
            )
        case models.CustomChannel():
            return _custom(config, x_shape)
    assert_never(config)


def resamples_operators(config: models.ChannelConfig) -> bool:
    """Tell whether the M-step takes its operators from the observations."""
    return getattr(config, "operators", "drawn") == "observed"


def build_recorrupting_channel(
    config: models.ChannelConfig, channel: Channel, observed: Mapping[str, Tensor]
) -> Channel:
    """Build the channel that corrupts reconstructions.

    Arguments:
        config: Its config.
        channel: The channel that made the observations.
        observed: Operator parameters of the training observations.

    Returns:
        The same channel, or one whose operators are resampled from those of the observations.
    """
    if not resamples_operators(config):
        return channel
    if not channel.params_spec:
        raise ValueError(
            "channel.operators is 'observed' but the operator is the same for all samples; set "
            "channel.operators: drawn"
        )
    return with_observed_operators(channel, observed)


def build_conditioning_channel(
    config: models.RunConfig, channel: Channel, prior: GaussianPrior | None
) -> Channel:
    """Build the channel that says what the network sees.

    Arguments:
        config: The run's config.
        channel: The channel that corrupts.
        prior: The Gaussian prior of the start, for the conditions that it serves.

    Raises:
        ValueError: The channel does not fit the condition.
    """
    if config.condition == "observation":
        return channel
    assert prior is not None, "these conditions come with a Gaussian start"
    if config.condition == "gaussian_mean":
        return GaussianMeanChannel(channel, prior)
    return GaussianPosteriorChannel(channel, prior)


def stand_in_prior(channel: Channel) -> GaussianPrior:
    """Build N(0, I), for those who look at shapes before there is a start."""
    size = math.prod(channel.x_shape)
    zeros, ones = (f(size, dtype=torch.float64) for f in (torch.zeros, torch.ones))
    return GaussianPrior(mean=zeros, factor=zeros.unsqueeze(1), diag=ones)


def _mri(config: models.MriChannel, x_shape: tuple[int, ...]) -> Channel:
    if len(x_shape) != 3 or x_shape[0] != 2:
        raise ValueError(
            f"channel.kind 'mri' received samples of shape {x_shape} but MRI images are complex: "
            "two bands (real, imaginary), (2, H, W); give complex data (for the bundled digits "
            "set data.phase: smooth)"
        )
    return accelerated_mri(
        (x_shape[1], x_shape[2]),
        acceleration=config.acceleration,
        center=config.center,
        noise_std=config.noise_std,
    )


def _part(part: models.DeepinvPart | None) -> tuple[str, Mapping[str, object]] | None:
    return None if part is None else (part.name, part.arguments)


def _custom(config: models.CustomChannel, x_shape: tuple[int, ...]) -> Channel:
    built = build_target(config.target, x_shape, arguments=config.arguments, key="channel.target")
    if not isinstance(built, Channel):
        raise ValueError(
            f"channel.target {config.target!r} made a {type(built).__name__}, which is no "
            "diffem_core.Channel; subclass it, or return a PhysicsChannel"
        )
    if built.x_shape != x_shape:
        raise ValueError(
            f"channel.target {config.target!r} made a channel for samples of shape "
            f"{built.x_shape} but the data's have {x_shape}; build it for the x_shape it is given"
        )
    return built
