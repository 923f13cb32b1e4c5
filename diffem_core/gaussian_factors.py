"""EM for the factor model x = m + F u + e of partly hidden x, with u ~ N(0, I), e ~ N(0, diag(d)).

On a seen entry j, y_j = x_j + noise; with w_j = d_j / (d_j + sigma^2) there and w_j = 0 on hidden
entries,

    E[x_j | u, y] - m_j = (1 - w_j) F_j u + w_j r_j          Var[x_j | u, y] = d_j (1 - w_j)

and u given y is Gaussian. The M-step regresses x on (u, 1), which updates F and m together, and
takes d from what is left. Every round raises the likelihood, at a cost linear in the number of
observations and of entries.

References:
    Rubin and Thayer 1982 (EM algorithms for ML factor analysis), here with missing data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.gaussian_systems import NOISE_FLOOR, FactorSystem, blocks, rows_of

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["fit_factors"]


def fit_factors(
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
    """Fit a low-rank + diagonal prior to observations of a channel that selects entries.

    Arguments:
        y: Observations of shape (n, *y_shape), in the data's units.
        params: Their operator parameters.
        channel: A channel that selects entries.
        mean: First mean, of shape (D,), for entries that nobody sees.
        spread: The data's scale.
        rank: Number of factors.
        iterations: Rounds of EM.
        seed: Seed of the start's random projection.
        on_progress: Called after each round with its number and the mean log-likelihood before it.

    Returns:
        The prior.
    """
    floor = (NOISE_FLOOR * spread) ** 2
    variance = max((channel.noise_std or 0.0) ** 2, floor)
    prior = _start(y, params, channel, mean, spread, rank, seed)
    for k in range(iterations):
        sums = _Sums(prior, variance)
        for rows in blocks(len(y), max(len(mean), rank * rank)):
            sums.add(y[rows], _selection(channel, rows_of(params, rows)))
        prior = sums.maximize(floor)
        if on_progress is not None:
            on_progress(k + 1, sums.log_density / len(y))
    return prior


class _Sums:
    """Sums over samples of the posterior moments of x - m and (u, 1) in one round."""

    def __init__(self, prior: GaussianPrior, variance: float) -> None:
        size, rank = prior.factor.shape
        self.prior = prior
        self.variance = variance
        self.log_density = 0.0
        self.u_moment = prior.mean.new_zeros(rank + 1, rank + 1)  # of (u, 1) (u, 1)'
        # Over the samples that see entry j only:
        self.count = prior.mean.new_zeros(size)
        self.r_square = prior.mean.new_zeros(size)
        self.r_u = prior.mean.new_zeros(size, rank + 1)  # of r_j (u, 1)'
        self.u = prior.mean.new_zeros(size, rank)
        self.uu = prior.mean.new_zeros(size, rank * rank)

    def add(self, y: Tensor, seen: Tensor) -> None:
        system = FactorSystem(self.prior, self.variance, seen)
        seen = system.seen
        r = system.residual(y, self.prior.mean)
        self.log_density += float(system.log_density(r).sum())
        u = system.factors(r)
        uu = torch.cholesky_inverse(system.cholesky) + u.unsqueeze(2) * u.unsqueeze(1)
        self.u_moment[:-1, :-1] += uu.sum(0)
        self.u_moment[:-1, -1] += u.sum(0)
        self.u_moment[-1, :-1] += u.sum(0)
        self.u_moment[-1, -1] += len(u)
        self.count += seen.sum(0)
        self.r_square += r.square().sum(0)
        self.r_u[:, :-1] += r.mT @ u
        self.r_u[:, -1] += r.sum(0)
        self.u += seen.mT @ u
        self.uu += seen.mT @ uu.flatten(1)

    def maximize(self, floor: float) -> GaussianPrior:
        prior = self.prior
        size, rank = prior.factor.shape
        w = prior.diag / (prior.diag + self.variance)
        n = self.u_moment[-1, -1]
        uu = self.uu.reshape(size, rank, rank)
        all_uu = self.u_moment[:-1, :-1]
        # E[x_j (u, 1)']: F_j E[u (u, 1)'] on hidden entries; (1 - w_j) of it and w_j r_j (u, 1)'
        # on seen ones.
        f_uu = prior.factor @ all_uu - w.unsqueeze(1) * torch.einsum(
            "dr,drs->ds", prior.factor, uu
        )
        f_u = prior.factor @ self.u_moment[:-1, -1] - w * (prior.factor * self.u).sum(1)
        cross = torch.cat([f_uu, f_u.unsqueeze(1)], dim=1) + w.unsqueeze(1) * self.r_u
        # E[x_j^2], likewise, and the variance that u and y leave.
        everywhere = ((prior.factor @ all_uu) * prior.factor).sum(1)
        on_seen = torch.einsum("dr,drs,ds->d", prior.factor, uu, prior.factor)
        square = everywhere + ((1 - w).square() - 1) * on_seen
        square = square + 2 * (1 - w) * w * (prior.factor * self.r_u[:, :-1]).sum(1)
        square = square + w.square() * self.r_square + prior.diag * (n - w * self.count)
        solution = torch.linalg.solve(self.u_moment, cross.mT).mT
        diag = ((square - (solution * cross).sum(1)) / n).clamp_min(floor)
        return GaussianPrior(
            mean=prior.mean + solution[:, -1], factor=solution[:, :-1].contiguous(), diag=diag
        )


def _start(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    mean: Tensor,
    spread: float,
    rank: int,
    seed: int,
) -> GaussianPrior:
    """Start from the leading directions of the covariance of entries that are seen together."""
    size = len(mean)
    count, total = mean.new_zeros(size), mean.new_zeros(size)
    for rows in blocks(len(y), size):
        seen = _selection(channel, rows_of(params, rows)).to(mean.dtype)
        count += seen.sum(0)
        total += (y[rows].flatten(1).to(mean.dtype) * seen).sum(0)
    mean = torch.where(count > 0, total / count.clamp_min(1), mean)
    pairs, products = mean.new_zeros(size, size), mean.new_zeros(size, size)
    for rows in blocks(len(y), size):
        seen = _selection(channel, rows_of(params, rows)).to(mean.dtype)
        r = (y[rows].flatten(1).to(mean.dtype) - mean) * seen
        pairs += seen.mT @ seen
        products += r.mT @ r
    covariance = products / pairs.clamp_min(1)
    covariance.diagonal().sub_((channel.noise_std or 0.0) ** 2)
    generator = torch.Generator(mean.device).manual_seed(seed)
    width = min(size, rank + 8)
    q = torch.randn(size, width, generator=generator, dtype=mean.dtype, device=mean.device)
    for _ in range(8):
        q, _ = torch.linalg.qr(covariance @ q)
    values, vectors = torch.linalg.eigh(q.mT @ covariance @ q)
    floor = (0.1 * spread) ** 2
    factor = (q @ vectors[:, -rank:]) * values[-rank:].clamp_min(floor / size).sqrt()
    diag = (covariance.diagonal() - factor.square().sum(1)).clamp_min(floor)
    return GaussianPrior(mean=mean, factor=factor, diag=diag)


def _selection(channel: Channel, params: Mapping[str, Tensor]) -> Tensor:
    seen = channel.selection(params)
    assert seen is not None
    return seen
