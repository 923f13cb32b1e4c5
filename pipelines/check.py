"""Does a config describe something that can run? Asked before anything is written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffem_core.channel import Channel
from diffem_core.gaussian import require_fittable
from diffem_core.gaussian_systems import require_linear_gaussian
from diffem_core.posterior import PseudoInverse
from pipelines import build
from pipelines.ingest.stored import require_fit, stored_seal
from pipelines.memory import require_memory, require_memory_of_channel
from pipelines.model_files import load_weights, read_model
from pipelines.sources import require_patches
from storage_schemas.config import (
    CustomNetwork,
    GaussianStart,
    JointPrior,
    MMPSStart,
    ModelStart,
    PhotosData,
    PseudoInverseStart,
    RunConfig,
    StoreData,
)

__all__ = ["check_config"]


def check_config(config: RunConfig) -> None:
    """Build everything that a config names, and pass one sample of zeros through it.

    Observations of one's own are looked up, and compared with the channel. Networks are built
    without content, so that this takes neither memory nor time for large ones.

    Arguments:
        config: The config.

    Raises:
        ValueError: A part is unknown, does not fit the data or another part, or would not fit
            into memory; the message names it by its path in the config.
    """
    samples, holdout = _amounts(config)
    with _about("channel"):
        require_memory_of_channel(config)
        channel = build.build_channel(config.channel, config.data.x_shape)
    with _about("network"):
        require_memory(config, channel, samples=samples, holdout=holdout)
    with _about("data.value_range"):
        scaling = build.build_scaling(config.data)
    generator = torch.Generator().manual_seed(0)
    with _about("channel"):
        params = channel.draw_params(1, generator=generator)
        x = torch.full((1, *channel.x_shape), scaling.center)
        try:
            y = channel.corrupt(x, params, generator=generator)
        except RuntimeError as error:  # PyTorch's word for numbers that a distribution refuses
            raise ValueError(
                f"channel.kind {config.channel.kind!r} cannot corrupt a constant sample of value "
                f"{scaling.center:g} ({error}); check its numbers, and data.value_range"
            ) from error
        _check_observation(config, channel, y)
        if build.resamples_operators(config.channel):
            build.build_recorrupting_channel(config.channel, channel, params)
    if isinstance(config.data, StoreData):
        require_fit(
            config.data,
            y_shape=channel.y_shape,
            parameters=channel.params_spec,
            channel=config.channel.kind,
        )
    with _about("start"):
        _check_methods(config, channel)
    channel = build.build_conditioning_channel(config, channel, build.stand_in_prior(channel))
    condition = channel.condition(y, params, scaling)
    build.check_monitors(config.evaluation, channel, scaling, y, params)
    build.check_set_metrics(config.evaluation, channel.x_shape, scaling)
    if not torch.isfinite(condition).all():
        raise ValueError(
            "condition: what the network would see is not finite; check channel and "
            "data.value_range for numbers that are far too large or small"
        )
    modes = {not config.is_mmps(k) for k in range(config.iterations)}
    if config.prior is not None:
        modes.add(isinstance(config.prior, JointPrior))
    for conditional in sorted(modes):
        with _about("network"):
            _check_network(config, channel, condition if conditional else None)
    with _about("start"):
        _check_model(config, channel)
    with _about("time"):
        t = build.build_times(config.time).sample(
            2, schedule=build.build_schedule(config.schedule), generator=generator
        )
        if not ((t >= 0) & (t <= 1)).all():
            raise ValueError("times are not within 0 and 1; give it less extreme numbers")
    with _about("e_step.sampler"):
        for iteration in (0, None):
            sampler = build.sampler_of(config.e_step, iteration)
            levels = build.build_grid(sampler, config.schedule)[:-1].float()
            if not ((levels > 0) & torch.isfinite(levels)).all():
                raise ValueError(
                    "its noise levels are not positive and finite; give the grid a smaller rho"
                )
            build.build_sampler(sampler, config.schedule)
    with _about("m_step.augmentation"):
        _check_augmentation(config, channel, x)


@contextmanager
def _about(path: str) -> Iterator[None]:
    """Put the path of a part in front of a message that does not name a value of the config."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if _NAMES_A_VALUE.search(text):
            raise
        raise ValueError(f"{path}: {text}") from error


_NAMES_A_VALUE = re.compile(rf"\b({'|'.join(RunConfig.model_fields)})[.:][a-z_ ]")


def _amounts(config: RunConfig) -> tuple[int, int]:
    """Return how many observations there are, and how many of them are held out."""
    data = config.data
    if isinstance(data, StoreData):
        seal = stored_seal(data)
        return seal.samples, seal.holdout
    if isinstance(data, PhotosData):
        require_patches(data)
    return data.count, data.holdout


def _check_observation(config: RunConfig, channel: Channel, y: torch.Tensor) -> None:
    if tuple(y.shape[1:]) != channel.y_shape:
        raise ValueError(
            f"channel.kind {config.channel.kind!r} makes observations of shape "
            f"{tuple(y.shape[1:])} but says that they have {channel.y_shape}; correct its y_shape"
        )
    if not torch.isfinite(y).all():
        raise ValueError(
            f"channel.kind {config.channel.kind!r} makes observations that are not finite of a "
            "constant sample in the middle of data.value_range; check its numbers, and that range"
        )


def _check_augmentation(config: RunConfig, channel: Channel, x: torch.Tensor) -> None:
    augmentation = build.build_augmentation(config.m_step)
    if augmentation is None:
        return
    if len(channel.x_shape) != 3:
        raise ValueError(
            f"m_step.augmentation changes images but samples have shape {channel.x_shape}; "
            "leave it out"
        )
    augmentation(x, generator=torch.Generator().manual_seed(0))


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
    if config.method == "em-mmps":
        require_linear_gaussian(channel, "method 'em-mmps'", "set method: diffem")
    mmps = any(config.is_mmps(k) for k in range(config.iterations))
    if mmps and config.mmps.covariance == "cov_x":
        build.cov_x_rank(config, channel)


def _check_model(config: RunConfig, channel: Channel) -> None:
    """Read the weights that a run starts from, once the network is known to fit the samples."""
    if not isinstance(config.start, ModelStart):
        return
    weights = read_model(config.start.url)
    conditional = not config.is_mmps(0)
    denoiser = build.build_denoiser(
        config, channel, device=torch.device("cpu"), conditional=conditional
    )
    load_weights(denoiser, {name: torch.from_numpy(a) for name, a in weights.items()})


def _check_network(config: RunConfig, channel: Channel, condition: torch.Tensor | None) -> None:
    # Modules of the user's own may not know the device without content.
    device = torch.device("cpu" if isinstance(config.network, CustomNetwork) else "meta")
    x, sigma = torch.zeros(1, *channel.x_shape, device=device), torch.ones(1, device=device)
    with device:
        denoiser = build.build_denoiser(
            config, channel, device=device, conditional=condition is not None
        )
    denoiser.eval()
    try:
        with torch.inference_mode():
            denoiser(x, sigma, None if condition is None else condition.to(device))
    except ValueError:
        raise
    except Exception as error:
        if not isinstance(config.network, CustomNetwork):
            raise
        raise ValueError(
            f"network.target {config.network.target!r} failed on a sample of zeros: {error} "
            f"({type(error).__name__}); it is called as network(x, c_noise, condition), here with "
            f"x of shape {tuple(x.shape)} and "
            f"{'no condition' if condition is None else f'a condition {tuple(condition.shape)}'}"
        ) from error
