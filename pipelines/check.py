"""Does a config describe something that can run? Asked before anything is written."""

from __future__ import annotations

import torch

from diffem_core.channel import Channel
from diffem_core.gaussian import require_fittable
from diffem_core.gaussian_systems import require_linear_gaussian
from diffem_core.posterior import PseudoInverse
from pipelines import build
from pipelines.ingest.stored import require_fit
from pipelines.model_files import load_weights, read_model
from storage_schemas.config import (
    GaussianStart,
    JointPrior,
    MMPSStart,
    ModelStart,
    PseudoInverseStart,
    RunConfig,
    StoreData,
)

__all__ = ["check_config"]


def check_config(config: RunConfig) -> None:
    """Build everything that a config names, and pass one sample of zeros through it.

    Observations of one's own are looked up, and compared with the channel.

    Arguments:
        config: The config.

    Raises:
        ValueError: A part is unknown, or does not fit the data or another part.
    """
    channel = build.build_channel(config.channel, config.data.x_shape)
    generator = torch.Generator().manual_seed(0)
    params = channel.draw_params(1, generator=generator)
    x = torch.full((1, *channel.x_shape), build.build_scaling(config.data).center)
    y = channel.corrupt(x, params, generator=generator)
    if tuple(y.shape[1:]) != channel.y_shape:
        raise ValueError(
            f"channel.kind {config.channel.kind!r} makes observations of shape "
            f"{tuple(y.shape[1:])} but says that they have {channel.y_shape}; correct its y_shape"
        )
    if isinstance(config.data, StoreData):
        require_fit(
            config.data,
            y_shape=channel.y_shape,
            parameters=channel.params_spec,
            channel=config.channel.kind,
        )
    if build.resamples_operators(config.channel):
        build.build_recorrupting_channel(config.channel, channel, params)
    _check_methods(config, channel)
    channel = build.build_conditioning_channel(config, channel, build.stand_in_prior(channel))
    condition = channel.condition(y, params, build.build_scaling(config.data))
    modes = {not config.is_mmps(k) for k in range(config.iterations)}
    if config.prior is not None:
        modes.add(isinstance(config.prior, JointPrior))
    for conditional in sorted(modes):
        _check_network(config, channel, condition if conditional else None)
    build.build_times(config.time).sample(
        2, schedule=build.build_schedule(config.schedule), generator=generator
    )
    for iteration in (0, None):
        sampler = build.sampler_of(config.e_step, iteration)
        build.build_sampler(sampler, config.schedule)
    augmentation = build.build_augmentation(config.m_step)
    if augmentation is not None:
        if len(channel.x_shape) != 3:
            raise ValueError(
                f"m_step.augmentation changes images but samples have shape {channel.x_shape}; "
                "leave it out"
            )
        augmentation(x, generator=generator)


def _check_methods(config: RunConfig, channel: Channel) -> None:
    start = config.start
    match start:
        case GaussianStart():
            require_fittable(channel, start.rank)
        case MMPSStart():
            require_fittable(channel, start.gaussian.rank)
        case PseudoInverseStart():
            PseudoInverse(channel)
        case ModelStart():
            if config.method == "em-mmps" and config.mmps.covariance == "cov_x":
                raise ValueError(
                    "start.kind 'model' has no reconstructions from which mmps.covariance 'cov_x' "
                    "could be taken; set mmps.covariance: tweedie"
                )
            weights = read_model(start.url)
            denoiser = build.build_denoiser(
                config, channel, device=torch.device("cpu"), conditional=not config.is_mmps(0)
            )
            load_weights(denoiser, {name: torch.from_numpy(a) for name, a in weights.items()})
    if config.method == "em-mmps":
        require_linear_gaussian(channel, "method 'em-mmps'", "set method: diffem")
    mmps = any(config.is_mmps(k) for k in range(config.iterations))
    if mmps and config.mmps.covariance == "cov_x":
        build.cov_x_rank(config, channel)


def _check_network(config: RunConfig, channel: Channel, condition: torch.Tensor | None) -> None:
    conditional = condition is not None
    device = torch.device("cpu")
    denoiser = build.build_denoiser(config, channel, device=device, conditional=conditional)
    denoiser.eval()
    with torch.inference_mode():
        denoiser(torch.zeros(1, *channel.x_shape), torch.ones(1), condition)
