"""A Gaussian prior fitted to corrupted observations by EM, and its exact posterior.

    x ~ N(m, S),  S = F F' + diag(d)          y_i = A_i x_i + e_i,  e_i ~ N(0, sigma^2 I)

With r_i = y_i - A_i m, G_i = A_i S A_i' + sigma^2 I and a_i = A_i' G_i^-1 r_i, the posterior of
x_i has mean m + S a_i and covariance S - S A_i' G_i^-1 A_i S. The EM update of the moments is
therefore, in closed form,

    m <- m + S mean(a)          S <- S + S (mean(a a') - mean(a) mean(a)' - mean(A' G^-1 A)) S

which raises the observations' likelihood at every round. For many dimensions, EM for the factor
model x = m + F u + e with u ~ N(0, I_R), e ~ N(0, diag(d)) does the same at a cost linear in the
number of dimensions and observations: in closed form where A selects entries, and by conjugate
gradients and draws for any other A (`gaussian_low_rank`).

Everything here is computed in float64 and in the data's own units, up to what the channel itself
computes in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from diffem_core.gaussian_factors import fit_factors
from diffem_core.gaussian_low_rank import fit_low_rank
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.gaussian_systems import (
    Solver,
    System,
    Systems,
    blocks,
    noise_variance,
    require_linear_gaussian,
    require_small_dense,
    rows_of,
)
from diffem_core.noise import SampleNoise

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = [
    "GaussianPosterior",
    "GaussianPrior",
    "fit_gaussian_prior",
    "log_likelihood",
    "require_fittable",
]

_JITTER = 1e-12  # Of the mean variance: rounding may leave an exactly seen direction below 0.


def fit_gaussian_prior(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    *,
    rank: int | None = None,
    iterations: int = 16,
    seed: int = 0,
    on_progress: Callable[[int, float], None] | None = None,
) -> GaussianPrior:
    """Fit a Gaussian prior to observations by EM.

    Arguments:
        y: Observations of shape (n, *y_shape), in the data's units.
        params: Their operator parameters.
        channel: A linear channel with Gaussian noise.
        rank: Rank of the low-rank + diagonal covariance, less than D; None for a full covariance.
            Where A selects entries, EM is in closed form and the diagonal free. For any other A
            the diagonal is one number, posterior means are solved for by conjugate gradients (to a
            relative residual of 1e-5), and the mean posterior covariance is estimated from one
            draw per observation.
        iterations: Rounds of EM.
        seed: Seed of the low-rank start's random projection and draws.
        on_progress: Called after each round with its number (from 1) and the mean log-likelihood
            of an observation, in nats, under the prior that the round started from; NaN with a
            rank where A does not select entries, since conjugate gradients give no likelihood.

    Returns:
        The prior, float64, on the device of y.

    Raises:
        ValueError: The channel is not linear or not Gaussian, the rank does not fit, or a full
            covariance would need systems that are too large.
        FloatingPointError: Conjugate gradients do not converge.

    References:
        Rozet et al. 2024 (arXiv 2405.13712) and DiffEM (arXiv 2510.12691): Gaussian
        initialization.
    """
    require_fittable(channel, rank)
    if iterations < 1:
        raise ValueError(f"fit_gaussian_prior received {iterations} iterations; give at least 1")
    size = math.prod(channel.x_shape)
    mean, spread = _first_moments(y, params, channel)
    if rank is None:
        covariance = torch.eye(size, dtype=torch.float64, device=y.device) * spread**2
        return _fit_full(y, params, channel, mean, covariance, iterations, on_progress)
    fit = fit_factors if channel.selects else fit_low_rank
    return fit(
        y,
        params,
        channel,
        mean=mean,
        spread=spread,
        rank=rank,
        iterations=iterations,
        seed=seed,
        on_progress=on_progress,
    )


def require_fittable(channel: Channel, rank: int | None) -> None:
    """Refuse what `fit_gaussian_prior` cannot do, without any data.

    Arguments:
        channel: The channel.
        rank: Rank of the covariance; None for a full one.

    Raises:
        ValueError: The channel is not linear or not Gaussian, the rank does not fit, or a full
            covariance would need systems that are too large.
    """
    require_linear_gaussian(channel, "the Gaussian start", "take start.kind 'pseudo_inverse'")
    size = math.prod(channel.x_shape)
    if rank is None:
        require_small_dense(channel, "a full covariance", "set rank, to 32 for example")
    elif not 1 <= rank < size + channel.selects:
        raise ValueError(
            f"the Gaussian start received rank {rank}; give 1 to {size - 1 + channel.selects}, or "
            "None"
        )


def log_likelihood(
    prior: GaussianPrior, y: Tensor, params: Mapping[str, Tensor], channel: Channel
) -> float:
    """Compute the mean log-likelihood of an observation under a prior.

    Arguments:
        prior: The prior.
        y: Observations of shape (n, *y_shape), in the data's units.
        params: Their operator parameters.
        channel: A linear channel with Gaussian noise.

    Returns:
        mean_i log N(y_i; A_i m, A_i S A_i' + sigma^2 I), in nats; entries that a selecting A hides
        do not count.

    Raises:
        ValueError: The channel is not linear or not Gaussian, or its systems are too large.
    """
    require_linear_gaussian(channel, "a Gaussian likelihood", "it has none")
    systems = Systems.of(prior, channel)
    if systems.iterative:
        remedy = "compare restorations of held-out observations instead"
        require_small_dense(channel, "a Gaussian likelihood", remedy)
        systems = Systems.of(prior, channel, solver="dense")
    total = 0.0
    for rows in systems.chunks(len(y)):
        system = systems.build(rows_of(params, rows), len(y[rows]))
        total += float(system.log_density(system.residual(y[rows], prior.mean)).sum())
    return total / len(y)


class GaussianPosterior:
    """The exact posterior of x given y under a Gaussian prior and a linear Gaussian channel.

    Samples are drawn by perturbing and solving (Matheron's rule): with x' ~ prior and y' = A x' +
    e, the sample is x' + S A' G^-1 (y - y').

    Arguments:
        prior: The prior, in the data's units.
        channel: A linear channel with Gaussian noise.
        solver: How G v = r is solved. `dense` factorizes G; `iterative` takes conjugate gradients
            to a relative residual of 1e-5, sample by sample, through A and A' only. With D entries
            of x and M of y, `auto` works in the space of the prior's R factors if A selects
            entries and R <= D / 4; else it is dense if D max(M, D) <= 2^24 for an operator that
            all samples share, D^2 <= 2^20 for one that selects entries, M D <= 2^16 for any other;
            else iterative.

    Raises:
        ValueError: The channel is not linear or not Gaussian, or the prior does not fit it.
    """

    def __init__(
        self,
        prior: GaussianPrior,
        channel: Channel,
        *,
        solver: Solver = "auto",
    ) -> None:
        require_linear_gaussian(channel, "a Gaussian posterior", "it has none")
        if solver not in get_args(Solver):
            raise ValueError(
                f"GaussianPosterior received solver {solver!r}; known are {get_args(Solver)}"
            )
        if len(prior.mean) != math.prod(channel.x_shape):
            raise ValueError(
                f"the prior has {len(prior.mean)} dimensions but the channel's samples have shape "
                f"{channel.x_shape}; fit the prior with this channel"
            )
        self.prior = prior
        self.channel = channel
        self._systems = Systems.of(prior, channel, solver=solver)

    @property
    def iterative(self) -> bool:
        """Whether systems are solved by conjugate gradients."""
        return self._systems.iterative

    def mean(self, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Compute E[x | y], of shape (n, *x_shape), in the data's units and the type of y."""
        parts = []
        for rows in self._systems.chunks(len(y)):
            system = self._systems.build(rows_of(params, rows), len(y[rows]))
            parts.append(self._mean(system, y[rows]))
        return torch.cat(parts).reshape(len(y), *self.channel.x_shape).to(y.dtype)

    def _mean(self, system: System, y: Tensor) -> Tensor:
        return self.prior.mean + system.gain(system.residual(y, self.prior.mean))

    def moments(
        self, y: Tensor, params: Mapping[str, Tensor], *, full: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the mean and the spread of x given y.

        Arguments:
            y: Observations of shape (n, *y_shape), in the data's units.
            params: Their operator parameters.
            full: Whether the spread is the whole covariance, instead of its diagonal.

        Returns:
            E[x | y], of shape (n, *x_shape), in the data's units and the type of y; and the
            standard deviations of its entries, likewise, or a lower triangular factor K of shape
            (n, D, D) with Cov[x | y] = K K'.

        Raises:
            ValueError: The systems are solved by conjugate gradients, which know no variances.
        """
        if self._systems.iterative:
            raise ValueError(
                f"posterior variances need factorized systems, but those of the "
                f"{type(self.channel).__name__} are large and solved by conjugate gradients; make "
                "do with the mean"
            )
        means, spreads = [], []
        for rows in self._systems.chunks(len(y)):
            system = self._systems.build(rows_of(params, rows), len(y[rows]))
            means.append(self._mean(system, y[rows]))
            if full:
                left = system.covariances()
                scale = left.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
                left = left + torch.diag_embed((_JITTER * scale).expand(-1, left.shape[-1]))
                spreads.append(torch.linalg.cholesky(left))
            else:
                spreads.append(system.variances().clamp_min(0.0).sqrt())
        shape = (len(y), *self.channel.x_shape)
        spread = torch.cat(spreads).to(y.dtype)
        return (
            torch.cat(means).reshape(shape).to(y.dtype),
            spread if full else spread.reshape(shape),
        )

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
        prior = self.prior
        parts = []
        for rows in self._systems.chunks(len(y)):
            noise = SampleNoise(
                seeds[rows], device=y.device, dtype=torch.float64, scale=temperature
            )
            x = prior.mean + noise.normal((prior.factor.shape[1],)) @ prior.factor.mT
            x = x + noise.normal((len(prior.mean),)) * prior.diag.sqrt()
            e = noise.normal(self.channel.y_shape).flatten(1) * math.sqrt(self._systems.variance)
            system = self._systems.build(rows_of(params, rows), len(y[rows]))
            parts.append(x + system.gain(system.residual(y[rows].flatten(1) - e, x)))
        return torch.cat(parts).reshape(len(y), *self.channel.x_shape).to(y.dtype)


def _fit_full(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    mean: Tensor,
    covariance: Tensor,
    iterations: int,
    on_progress: Callable[[int, float], None] | None,
) -> GaussianPrior:
    variance = noise_variance(channel, math.sqrt(float(covariance.diagonal().mean())))
    n = len(y)
    for k in range(iterations):
        first, second, information = (torch.zeros_like(t) for t in (mean, covariance, covariance))
        log_density = 0.0
        systems = Systems(channel, variance=variance, covariance=covariance)
        for rows in systems.chunks(n):
            system = systems.build(rows_of(params, rows), len(y[rows]))
            residual = system.residual(y[rows], mean)
            log_density += float(system.log_density(residual).sum())
            a = system.weights(residual)
            first += a.sum(0)
            second += a.mT @ a
            information += system.information()
        first, second, information = first / n, second / n, information / n
        mean = mean + covariance @ first
        update = covariance @ (second - torch.outer(first, first) - information) @ covariance
        covariance = covariance + update
        covariance = (covariance + covariance.mT) / 2
        if on_progress is not None:
            on_progress(k + 1, log_density / n)
    return GaussianPrior.from_moments(mean, covariance)


def _first_moments(
    y: Tensor, params: Mapping[str, Tensor], channel: Channel
) -> tuple[Tensor, float]:
    """Fit a constant c and a spread s in y ~ A(c 1 + s z): EM starts at the data's scale."""
    generator = torch.Generator(y.device).manual_seed(0)
    shape = channel.x_shape
    ones_y = ones_ones = y_y = probe_probe = 0.0
    for rows in blocks(len(y), math.prod(shape)):
        part, part_params = y[rows].double(), rows_of(params, rows)
        ones = channel.A(part.new_ones(len(part), *shape), part_params)
        probe = torch.randn(
            len(part), *shape, generator=generator, dtype=part.dtype, device=y.device
        )
        ones_y += float((ones * part).sum())
        ones_ones += float(ones.square().sum())
        y_y += float(part.square().sum())
        probe_probe += float(channel.A(probe, part_params).square().sum())
    if ones_ones == 0 or probe_probe == 0:
        raise ValueError("the observations see nothing: every operator is 0; check the masks")
    center = ones_y / ones_ones
    spread = math.sqrt(max(y_y - center * ones_y, 0.0) / probe_probe)
    if spread == 0:
        raise ValueError(
            f"all observations are the constant {center}; a Gaussian prior cannot be fitted to "
            "them"
        )
    size = math.prod(shape)
    return torch.full((size,), center, dtype=torch.float64, device=y.device), spread
