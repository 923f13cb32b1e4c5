"""EM for a low-rank + isotropic covariance S = F F' + d I under any linear Gaussian channel.

With x_i the complete data, the E-step needs the posteriors' means m_i and covariances C_i, and the
M-step is probabilistic principal component analysis of

    mean(m_i m_i') - mean(m_i) mean(m_i)' + mean(C_i)

which has a closed form in its R leading eigenpairs. The means are computed (by conjugate
gradients). mean(C_i) is estimated without bias from one draw per observation: with x' ~ N(0, S)
and e' ~ N(0, sigma^2 I),

    h_i = S A_i' G_i^-1 (A_i x' + e')        w_i = x' - h_i ~ N(0, C_i)        Cov h_i = S - C_i

so that both w w' and S - h h' have mean C_i; the first has less noise where little is hidden, the
second where much is, and their weights are in inverse proportion to their noise. The only
randomness is therefore that of an average of n such draws: means and the closed form are exact,
and up to that noise every round raises the observations' likelihood. The noise is that of a
covariance estimated from n samples: factors weaker than about d sqrt(D / n) are mostly noise.
(Monte-Carlo EM on one draw of x_i each, as in Rozet et al., has the noise of the means as well.)

Memory: three float64 arrays of n D entries.

References:
    Rozet et al. 2024 (arXiv 2405.13712), Gaussian initialization; Tipping and Bishop 1999
    (Probabilistic principal component analysis), section 3.2; Papandreou and Yuille 2010 (Gaussian
    sampling by local perturbations), for w_i by perturbing and solving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.gaussian_systems import NOISE_FLOOR, Systems, noise_variance, rows_of
from diffem_core.seeds import derive_seed

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["fit_low_rank", "principal_components"]

_OVERSAMPLING = 10
_SUBSPACE_ITERATIONS = 8  # From random vectors; half as many from the factors of the round before.


def fit_low_rank(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    *,
    mean: Tensor,
    spread: float,
    rank: int,
    iterations: int,
    seed: int,
    on_progress: Callable[[int, float], None] | None,
) -> GaussianPrior:
    """Fit a low-rank + isotropic prior to observations of any linear channel.

    Arguments:
        y: Observations of shape (n, *y_shape), in the data's units.
        params: Their operator parameters.
        channel: A linear channel with Gaussian noise.
        mean: First mean, of shape (D,).
        spread: First standard deviation of every entry, in the data's units.
        rank: Number of factors, less than D.
        iterations: Rounds of EM.
        seed: Seed of the draws.
        on_progress: Called after each round with its number and NaN: iteration computes no
            likelihood.

    Returns:
        The prior.

    Raises:
        FloatingPointError: A posterior's system is too ill-conditioned to be solved.
    """
    size = len(mean)
    variance = noise_variance(channel, spread)
    floor = (NOISE_FLOOR * spread) ** 2
    prior = GaussianPrior(
        mean=mean,
        factor=mean.new_zeros(size, rank),
        diag=torch.full_like(mean, spread**2),
    )
    n = len(y)
    m, w, h = (mean.new_empty(n, size) for _ in range(3))
    for k in range(iterations):
        systems = Systems(channel, variance=variance, prior=prior, iterative=True)
        generator = torch.Generator().manual_seed(derive_seed(seed, "gaussian_start", k))
        for rows in systems.chunks(n):
            system = systems.build(rows_of(params, rows), len(y[rows]))
            m[rows] = prior.mean + system.gain(system.residual(y[rows], prior.mean))
            width = rank + size + math.prod(channel.y_shape)
            z = torch.randn(len(y[rows]), width, generator=generator, dtype=mean.dtype).to(
                y.device
            )
            u, e, e_y = z.tensor_split((rank, rank + size), dim=1)
            x = u @ prior.factor.mT + e * prior.diag.sqrt()
            h[rows] = system.gain(-system.residual(-math.sqrt(variance) * e_y, x))
            w[rows] = x - h[rows]
        center = m.mean(0)
        m -= center
        moments = _Moments(m, w, h, prior)
        factor, rest = principal_components(
            moments, rank=rank, start=prior.factor, seed=derive_seed(seed, "factor", k)
        )
        diag = torch.full_like(mean, max(rest, floor))
        prior = GaussianPrior(mean=center, factor=factor, diag=diag)
        if on_progress is not None:
            on_progress(k + 1, math.nan)
    return prior


class _Moments:
    """The covariance of x under the posteriors, mean over observations, as an operator.

    Arguments:
        m: Posterior means around their mean, of shape (n, D).
        w: Draws around the posterior means.
        h: What was taken from draws of the prior to make w of them.
        prior: The prior S of the posteriors.
    """

    def __init__(self, m: Tensor, w: Tensor, h: Tensor, prior: GaussianPrior) -> None:
        self.m, self.w, self.h, self.prior = m, w, h, prior
        n = len(m)
        square_m, square_w, square_h = (float(t.square().sum()) / n for t in (m, w, h))
        # An estimate's variance goes with the square of the trace of what it is made of.
        self.share = square_h**2 / (square_h**2 + square_w**2)
        prior_trace = float(prior.factor.square().sum() + prior.diag.sum())
        self.trace = square_m + self.share * square_w + (1 - self.share) * (prior_trace - square_h)

    def __call__(self, q: Tensor) -> Tensor:
        """Multiply by vectors q of shape (D, K)."""
        m, w, h, prior = self.m, self.w, self.h, self.prior
        drawn = m.mT @ (m @ q) + self.share * (w.mT @ (w @ q))
        drawn -= (1 - self.share) * (h.mT @ (h @ q))
        known = prior.factor @ (prior.factor.mT @ q) + prior.diag.unsqueeze(1) * q
        product: Tensor = drawn / len(m) + (1 - self.share) * known
        return product


class Covariance(Protocol):
    """A symmetric matrix of shape (D, D), known by its products and its trace."""

    @property
    def trace(self) -> float:
        """Its trace."""
        ...

    def __call__(self, q: Tensor) -> Tensor:
        """Multiply by vectors q of shape (D, K)."""
        ...


def principal_components(
    covariance: Covariance, *, rank: int, start: Tensor, seed: int
) -> tuple[Tensor, float]:
    """Fit F F' + d I to a covariance by probabilistic PCA.

    The leading eigenvectors are found by subspace iteration, without the (D, D) matrix.

    Arguments:
        covariance: The covariance.
        rank: Number R of components, less than D.
        start: Vectors of shape (D, R) near the eigenvectors, to begin with; 0 if none are known.
        seed: Seed of the other vectors to begin with.

    Returns:
        F of shape (D, R), and the mean variance d of the other directions.

    References:
        Tipping and Bishop 1999, section 3.2; Halko et al. 2011 (Finding structure with
        randomness), algorithm 4.4.
    """
    size = len(start)
    generator = torch.Generator().manual_seed(seed)
    width = min(size, rank + _OVERSAMPLING)
    q = torch.randn(size, width, generator=generator, dtype=start.dtype).to(start.device)
    scale = torch.linalg.vector_norm(start, dim=0)
    q[:, :rank] = torch.where(scale > 0, start / scale.clamp_min(1e-300), q[:, :rank])
    q, _ = torch.linalg.qr(q)
    for _ in range(_SUBSPACE_ITERATIONS // (2 if bool((scale > 0).all()) else 1)):
        q, _ = torch.linalg.qr(covariance(q))
    values, vectors = torch.linalg.eigh(q.mT @ covariance(q))
    values, vectors = values[-rank:], q @ vectors[:, -rank:]
    rest = max((covariance.trace - float(values.sum())) / (size - rank), 0.0)
    return vectors * (values - rest).clamp_min(0).sqrt(), rest
