"""Conditions that hold the best linear estimate of x as well.

A network that sees random projections has to learn to invert the operator of each sample, which is
most of what there is to learn. Shown the posterior mean under the Gaussian prior of the start, it
begins where that ends, and learns what is not Gaussian. With the posterior's spread as well, the
denoiser can be built around that posterior (`preconditioning`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffem_core.channel import Channel, Params
from diffem_core.gaussian import GaussianPosterior
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.preconditioning import FactorPreconditioning, MomentsPreconditioning
from diffem_core.scaling import Scaling

__all__ = ["GaussianMeanChannel", "GaussianPosteriorChannel"]

_WHOLE = 16  # Entries of a vector up to which its whole covariance is part of the condition.


class GaussianMeanChannel(Channel):
    """A channel whose condition ends with E[x | y] under a Gaussian prior.

    It corrupts as the channel does that it is made of; only what the network sees is more: the
    bands (for vectors, the entries) of x.

    Arguments:
        channel: A linear channel with Gaussian noise; it stays as it is.
        prior: The prior, in the data's units.

    Raises:
        ValueError: The channel is not linear or not Gaussian, or the prior has another size.
    """

    def __init__(self, channel: Channel, prior: GaussianPrior) -> None:
        super().__init__(
            physics=channel.physics,
            generator=channel.generator,
            x_shape=channel.x_shape,
            y_shape=channel.y_shape,
            params_spec=channel.params_spec,
            noise_std=channel.noise_std,
            linear=channel.linear,
        )
        self.channel = channel
        self.selects = channel.selects
        self._prior = prior
        self._posteriors: dict[torch.device, GaussianPosterior] = {}
        self._posterior(prior.mean.device)  # refuses what it cannot serve

    @property
    def condition_channels(self) -> int:
        """Those of the channel, and the bands of x."""
        return self.channel.condition_channels + self.x_shape[0]

    def condition(self, y: Tensor, params: Params, scaling: Scaling) -> Tensor:
        """Build the channel's condition, followed by E[x | y] in network units."""
        mean = scaling.to_network(self._posterior(y.device).mean(y, params))
        return torch.cat([self.channel.condition(y, params, scaling), mean], dim=1)

    def _posterior(self, device: torch.device) -> GaussianPosterior:
        if device not in self._posteriors:
            self._posteriors[device] = GaussianPosterior(self._prior.to(device), self.channel)
        return self._posteriors[device]

    def draw_params(self, n: int, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw fresh operator parameters; see `Channel.draw_params`."""
        return self.channel.draw_params(n, generator=generator)

    def corrupt(self, x: Tensor, params: Params, *, generator: torch.Generator) -> Tensor:
        """Draw y ~ Q(. | x, params); see `Channel.corrupt`."""
        return self.channel.corrupt(x, params, generator=generator)

    def A(self, x: Tensor, params: Params) -> Tensor:
        """Apply the operator without noise; see `Channel.A`."""
        return self.channel.A(x, params)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        """Apply the operator's adjoint; see `Channel.A_adjoint`."""
        return self.channel.A_adjoint(y, params)

    def A_dagger(self, y: Tensor, params: Params) -> Tensor:
        """Apply the operator's pseudo-inverse; see `Channel.A_dagger`."""
        return self.channel.A_dagger(y, params)

    def selection(self, params: Params) -> Tensor | None:
        """Return which entries of x are observed; see `Channel.selection`."""
        return self.channel.selection(params)

    def matrix(self, params: Params, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Write the operator as one dense matrix per sample; see `Channel.matrix`."""
        return self.channel.matrix(params, dtype=dtype)


class GaussianPosteriorChannel(GaussianMeanChannel):
    """A channel whose condition ends with the Gaussian posterior of x: E[x | y] and its spread.

    Where x is a vector of at most 16 entries, the spread is a triangular factor of the covariance;
    otherwise, standard deviations entry by entry.

    Arguments:
        channel: A linear channel with Gaussian noise; it stays as it is.
        prior: The prior, in the data's units.

    Raises:
        ValueError: The channel is not linear or not Gaussian, the prior has another size, or the
            systems are so large that they are solved by conjugate gradients.
    """

    def __init__(self, channel: Channel, prior: GaussianPrior) -> None:
        super().__init__(channel, prior)
        if self._posterior(prior.mean.device).iterative:
            size = len(prior.mean)
            raise ValueError(
                f"condition 'gaussian_posterior' needs posterior variances, which conjugate "
                f"gradients do not give; the systems of {type(channel).__name__} with {size} "
                "entries of x are too large for any other solver: take 'gaussian_mean'"
            )

    @property
    def whole(self) -> bool:
        """Whether the condition holds the whole covariance."""
        return len(self.x_shape) == 1 and self.x_shape[0] <= _WHOLE

    @property
    def preconditioning(self) -> FactorPreconditioning | MomentsPreconditioning:
        """What builds a denoiser around the posterior that the condition holds."""
        if self.whole:
            return FactorPreconditioning(dimension=self.x_shape[0])
        return MomentsPreconditioning(bands=self.x_shape[0])

    @property
    def condition_channels(self) -> int:
        """Those of the channel, the bands of x, and what its spread takes."""
        bands = self.x_shape[0]
        return self.channel.condition_channels + bands + (bands**2 if self.whole else bands)

    def condition(self, y: Tensor, params: Params, scaling: Scaling) -> Tensor:
        """Build the channel's condition, followed by the posterior in network units."""
        mean, spread = self._posterior(y.device).moments(y, params, full=self.whole)
        if self.whole:
            spread = spread.flatten(1)
        return torch.cat(
            [
                self.channel.condition(y, params, scaling),
                scaling.to_network(mean),
                scaling.scale * spread,
            ],
            dim=1,
        )
