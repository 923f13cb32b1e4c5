"""Moment-matching posterior sampling (MMPS): E[x | x_t, y] from an unconditional denoiser.

With a denoiser f(x_t) ~ E[x | x_t] and a linear channel y = A x + e, e ~ N(0, sigma_y^2 I), the
distribution of x given x_t is approximated by a Gaussian of mean f(x_t) and covariance V, so that

    E[x | x_t, y] = f(x_t) + sigma_t^2 J' A' v,      (sigma_y^2 I + A V A') v = y - A f(x_t)

with J = df / dx_t. V is sigma_t^2 J, the exact covariance by Tweedie's formula, or the covariance
of x given x_t under a Gaussian prior of x, sigma_t^2 I - sigma_t^4 (S + sigma_t^2 I)^-1 (the
`cov_x` heuristic: cheaper, and regular). The system is solved by conjugate gradients, in which
every sample has step lengths of its own.

References:
    Rozet et al. 2024 (arXiv 2405.13712), moment matching posterior sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffem_core.denoiser import Denoiser
from diffem_core.gaussian import GaussianPrior
from diffem_core.linear_solvers import conjugate_gradients
from diffem_core.noise import SampleNoise
from diffem_core.samplers import Denoise, Sampler
from diffem_core.scaling import Scaling

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["MMPSPosterior", "mmps_denoise"]

Operator = Callable[[Tensor], Tensor]


def mmps_denoise(
    denoise: Denoise,
    x_t: Tensor,
    sigma_t: Tensor,
    y: Tensor,
    *,
    A: Operator,
    A_adjoint: Operator,
    noise_variance: float,
    covariance: GaussianPrior | None = None,
    iterations: int = 1,
    tolerance: float = 1e-3,
) -> Tensor:
    """Estimate E[x | x_t, y] by moment matching.

    Arguments:
        denoise: The unconditional denoiser f(x_t, sigma_t), differentiable in x_t.
        x_t: Noisy samples of shape (n, ...).
        sigma_t: Noise levels of shape (n,), or (1,) for one level shared by all.
        y: Observations of shape (n, ...).
        A: The linear operator.
        A_adjoint: Its adjoint.
        noise_variance: Variance of the observations' noise.
        covariance: Gaussian prior whose covariance gives V (`cov_x`); None for Tweedie's
            covariance.
        iterations: Iterations of conjugate gradients.
        tolerance: Their relative tolerance.

    Returns:
        Estimates of the shape of x_t.

    References:
        Rozet et al. 2024 (arXiv 2405.13712), moment matching posterior sampling.
    """
    variance = sigma_t.reshape(-1, *[1] * (x_t.ndim - 1)).square()
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        x_hat = denoise(x_t, sigma_t)

    def vjp(u: Tensor) -> Tensor:
        gradients = torch.autograd.grad(x_hat, x_t, grad_outputs=u, retain_graph=True)
        return gradients[0]

    def tweedie(u: Tensor) -> Tensor:
        return variance * vjp(u)

    spread = tweedie if covariance is None else _gaussian_spread(covariance, variance)

    def system(v: Tensor) -> Tensor:
        return noise_variance * v + A(spread(A_adjoint(v)))

    with torch.no_grad():
        estimate = x_hat.detach()
        # The Jacobian of a network is not quite symmetric and non-negative, as a covariance is.
        # Where the system falls below its noise alone, a step would run away: it ends there.
        v = conjugate_gradients(
            system,
            y - A(estimate),
            iterations=iterations,
            tolerance=tolerance,
            least=0.5 * noise_variance,
        )
        return estimate + variance * vjp(A_adjoint(v))


class MMPSPosterior:
    """The posterior of an unconditional denoiser and a linear Gaussian channel (EM-MMPS's E-step).

    Arguments:
        denoiser: The unconditional denoiser.
        channel: A linear channel with Gaussian noise.
        scaling: The change between the data's and the network's units.
        sampler: A sampler with its grid bound, for example `functools.partial(ddpm, sigmas=grid)`.
        covariance: Gaussian prior of x, in the data's units, for the `cov_x` heuristic; None for
            Tweedie's covariance.
        iterations: Iterations of conjugate gradients (the paper takes 1).
        tolerance: Their relative tolerance.

    Raises:
        ValueError: The channel is not linear or its noise not Gaussian.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        channel: Channel,
        scaling: Scaling,
        sampler: Sampler,
        *,
        covariance: GaussianPrior | None = None,
        iterations: int = 1,
        tolerance: float = 1e-3,
    ) -> None:
        if not channel.linear or channel.noise_std is None:
            raise ValueError(
                f"MMPS needs a linear channel with Gaussian noise, but {type(channel).__name__} "
                "is not; use a conditional denoiser (DiffEM) instead"
            )
        if iterations < 1:
            raise ValueError(f"MMPS received {iterations} iterations; give at least 1")
        self.denoiser = denoiser
        self.channel = channel
        self.scaling = scaling
        self.sampler = sampler
        self.iterations = iterations
        self.tolerance = tolerance
        self.covariance = covariance and covariance.rescaled(scaling.center, scaling.scale)

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
        channel, scaling = self.channel, self.scaling
        device = next(self.denoiser.parameters()).device
        params = {name: value.to(device) for name, value in params.items()}
        observed = y.to(device)
        center = observed.new_full((len(y), *channel.x_shape), scaling.center)
        # In network units u = scale (x - center): scale (y - A center) = A u + scale e.
        observed = scaling.scale * (observed - channel.A(center, params))
        self.denoiser.eval()

        def unconditional(x_t: Tensor, sigma: Tensor) -> Tensor:
            estimate: Tensor = self.denoiser(x_t, sigma)
            return estimate

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            return mmps_denoise(
                unconditional,
                x_t,
                sigma,
                observed,
                A=lambda x: channel.A(x, params),
                A_adjoint=lambda v: channel.A_adjoint(v, params),
                noise_variance=((channel.noise_std or 0.0) * scaling.scale) ** 2,
                covariance=self.covariance,
                iterations=self.iterations,
                tolerance=self.tolerance,
            )

        noise = SampleNoise(seeds, device=device, dtype=observed.dtype, scale=temperature)
        with torch.no_grad():
            x = self.sampler(denoise, noise=noise, shape=channel.x_shape)
        return scaling.to_data(x).to(y.device)


def _gaussian_spread(prior: GaussianPrior, variance: Tensor) -> Operator:
    """Return u -> s S (S + s I)^-1 u, for s = sigma_t^2 of each sample."""
    values, vectors = (t.to(variance.device, variance.dtype) for t in prior.spectrum)
    flat = variance.reshape(-1, 1)
    shrink = values * flat / (values + flat)

    def spread(u: Tensor) -> Tensor:
        spread_u: Tensor = ((u.flatten(1) @ vectors) * shrink) @ vectors.mT
        return spread_u.reshape(u.shape)

    return spread
