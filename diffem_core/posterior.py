"""Posteriors q(x | y): what an E-step draws from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from diffem_core.denoiser import Denoiser
from diffem_core.noise import SampleNoise
from diffem_core.samplers import Sampler
from diffem_core.scaling import Scaling

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["DiffusionPosterior", "DiffusionPrior", "Posterior", "PseudoInverse"]


class Posterior(Protocol):
    """Anything that draws x ~ q(x | y)."""

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw one sample per observation.

        Arguments:
            y: Observations of shape (n, *y_shape), in the data's units.
            params: Their operator parameters.
            seeds: One seed per observation; a sample depends on its own observation and seed only.
            temperature: Factor on every noise that is drawn: 1 samples the posterior, less draws
                samples that lie closer to its mean.

        Returns:
            Samples of shape (n, *x_shape), in the data's units, on the device of y.
        """
        ...


class DiffusionPosterior:
    """The posterior that a conditional denoiser has learned (DiffEM's E-step).

    Arguments:
        denoiser: The conditional denoiser; put into evaluation mode at each call, never changed.
        channel: The channel, which says what the network sees of an observation.
        scaling: The change between the data's and the network's units.
        sampler: A sampler with its grid bound, for example `functools.partial(ddpm, sigmas=grid)`.
    """

    def __init__(
        self, denoiser: Denoiser, channel: Channel, scaling: Scaling, sampler: Sampler
    ) -> None:
        self.denoiser = denoiser
        self.channel = channel
        self.scaling = scaling
        self.sampler = sampler

    @torch.inference_mode()
    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw one sample per observation; see `Posterior.sample`."""
        if len(seeds) != len(y):
            raise ValueError(
                f"received {len(seeds)} seeds for {len(y)} observations; give one each"
            )
        device = next(self.denoiser.parameters()).device
        condition = self.channel.condition(
            y.to(device), {name: value.to(device) for name, value in params.items()}, self.scaling
        )
        self.denoiser.eval()

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            estimate: Tensor = self.denoiser(x_t, sigma, condition)
            return estimate

        noise = SampleNoise(seeds, device=device, dtype=torch.float32, scale=temperature)
        with self.denoiser.repeated():
            x = self.sampler(denoise, noise=noise, shape=self.channel.x_shape)
        return self.scaling.to_data(x).to(y.device)


class DiffusionPrior:
    """The prior that a denoiser has learned.

    Arguments:
        denoiser: An unconditional denoiser, or a conditional one that was trained with dropped
            conditions.
        scaling: The change between the data's and the network's units.
        sampler: A sampler with its grid bound.
        x_shape: Shape of one sample.
        condition_channels: Channels of the condition, which is 0 throughout; 0 for an
            unconditional denoiser.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scaling: Scaling,
        sampler: Sampler,
        *,
        x_shape: Sequence[int],
        condition_channels: int = 0,
    ) -> None:
        self.denoiser = denoiser
        self.scaling = scaling
        self.sampler = sampler
        self.x_shape = tuple(x_shape)
        self.condition_channels = condition_channels

    @torch.inference_mode()
    def sample(self, *, seeds: Sequence[int]) -> Tensor:
        """Draw samples of the prior.

        Arguments:
            seeds: One seed per sample.

        Returns:
            Samples of shape (n, *x_shape), in the data's units, on the denoiser's device.
        """
        device = next(self.denoiser.parameters()).device
        condition = None
        if self.condition_channels:
            shape = (len(seeds), self.condition_channels, *self.x_shape[1:])
            condition = torch.zeros(shape, device=device)
        self.denoiser.eval()

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            estimate: Tensor = self.denoiser(x_t, sigma, condition)
            return estimate

        noise = SampleNoise(seeds, device=device)
        with self.denoiser.repeated():
            x = self.sampler(denoise, noise=noise, shape=self.x_shape)
        return self.scaling.to_data(x)


class PseudoInverse:
    """The simplest first E-step, whatever the seeds: A_dagger y.

    Where A is not linear but y has the shape of x (saturation, JPEG), y itself is the estimate.

    Arguments:
        channel: A linear channel, or one whose observations have the shape of x.

    Raises:
        ValueError: The channel is neither.
    """

    def __init__(self, channel: Channel) -> None:
        if not channel.linear and channel.y_shape != channel.x_shape:
            raise ValueError(
                f"PseudoInverse received a {type(channel).__name__} that is not linear and whose "
                f"observations have shape {channel.y_shape}, not that of x, {channel.x_shape}: "
                "there is neither A_dagger y nor y to begin with; choose another start, for "
                "example a trained prior"
            )
        self.channel = channel

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        """Compute A_dagger y, or return y; see `Posterior.sample`."""
        return self.channel.A_dagger(y, params) if self.channel.linear else y
