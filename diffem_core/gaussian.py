"""A Gaussian prior fitted to corrupted observations by EM, and its exact posterior.

    x ~ N(m, S),  S = F F' + diag(d)          y_i = A_i x_i + e_i,  e_i ~ N(0, sigma^2 I)

With r_i = y_i - A_i m, G_i = A_i S A_i' + sigma^2 I and a_i = A_i' G_i^-1 r_i, the posterior of
x_i has mean m + S a_i and covariance S - S A_i' G_i^-1 A_i S. The EM update of the moments is
therefore, in closed form,

    m <- m + S mean(a)          S <- S + S (mean(a a') - mean(a) mean(a)' - mean(A' G^-1 A)) S

which raises the observations' likelihood at every round. For many dimensions, EM for the factor
model x = m + F u + e with u ~ N(0, I_R), e ~ N(0, diag(d)) does the same at a cost linear in the
number of dimensions and observations.

Everything here is computed in float64 and in the data's own units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from diffem_core.noise import SampleNoise

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["GaussianPosterior", "GaussianPrior", "fit_gaussian_prior", "log_likelihood"]

_CHUNK_VALUES = 2**24  # Float64 values of the largest temporary: 128 MB.
_NOISE_FLOOR = 1e-3  # Least noise assumed, as a fraction of the spread: keeps every G_i regular.


@dataclass(frozen=True, kw_only=True)
class GaussianPrior:
    """N(mean, factor factor' + diag(diag)) over the flattened entries of x.

    Arguments:
        mean: Of shape (D,).
        factor: Of shape (D, R).
        diag: Of shape (D,), not negative.
    """

    mean: Tensor
    factor: Tensor
    diag: Tensor

    def __post_init__(self) -> None:
        size = len(self.mean)
        if self.factor.ndim != 2 or len(self.factor) != size or self.diag.shape != (size,):
            raise ValueError(
                f"GaussianPrior received mean {tuple(self.mean.shape)}, factor "
                f"{tuple(self.factor.shape)} and diag "
                f"{tuple(self.diag.shape)}; give (D,), (D, R) and (D,)"
            )

    def covariance(self) -> Tensor:
        """Compute the covariance, of shape (D, D)."""
        return self.factor @ self.factor.mT + torch.diag(self.diag)

    def tensors(self) -> dict[str, Tensor]:
        """Return the prior as named tensors."""
        return {"mean": self.mean, "factor": self.factor, "diag": self.diag}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Build a prior from what `tensors` returned."""
        return cls(**{name: tensors[name].double() for name in ("mean", "factor", "diag")})

    @classmethod
    def from_samples(cls, x: Tensor, *, rank: int) -> Self:
        """Fit a prior to samples by probabilistic principal component analysis.

        Arguments:
            x: Samples of shape (n, ...).
            rank: Number of components, at least 1 and less than the number of entries of a sample.

        Returns:
            The prior whose factor holds the leading components and whose diagonal is the mean
            variance of the others.

        References:
            Tipping and Bishop 1999 (Mixtures of probabilistic principal component analysers),
            appendix A.
        """
        x = x.flatten(1).double()
        size = x.shape[1]
        if not 1 <= rank < size:
            raise ValueError(
                f"from_samples received rank {rank} for {size} entries; give 1 to {size - 1}"
            )
        mean = x.mean(0)
        covariance = torch.cov(x.mT, correction=0)
        values, vectors = torch.linalg.eigh(covariance)
        rest = (values.sum() - values[-rank:].sum()).clamp_min(0) / (size - rank)
        factor = vectors[:, -rank:] * (values[-rank:] - rest).clamp_min(0).sqrt()
        return cls(mean=mean, factor=factor, diag=torch.full_like(mean, float(rest)))

    def rescaled(self, center: float, scale: float) -> Self:
        """Return the prior of scale (x - center)."""
        return type(self)(
            mean=(self.mean - center) * scale,
            factor=self.factor * scale,
            diag=self.diag * scale**2,
        )

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Self:
        """Build a prior with a full covariance, whose eigenvalues below 0 count as 0."""
        values, vectors = torch.linalg.eigh(covariance)
        factor = vectors * values.clamp_min(0).sqrt()
        return cls(mean=mean, factor=factor, diag=torch.zeros_like(mean))


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
        rank: Rank of the low-rank + diagonal covariance (channels that select entries only); None
            for a full covariance.
        iterations: Rounds of EM.
        seed: Seed of the low-rank start's random projection.
        on_progress: Called after each round with its number (from 1) and the mean log-likelihood
            of an observation, in nats, under the prior that the round started from.

    Returns:
        The prior, float64, on the device of y.

    Raises:
        ValueError: The channel is not linear or not Gaussian, or the rank does not fit.

    References:
        DiffEM (arXiv 2510.12691), section 5 (initialization); Rozet et al. 2024 (arXiv
        2405.13712), appendix on the Gaussian initialization.
    """
    _check_channel(channel, "the Gaussian start")
    if iterations < 1:
        raise ValueError(f"fit_gaussian_prior received {iterations} iterations; give at least 1")
    mean, spread = _first_moments(y, params, channel)
    size = math.prod(channel.x_shape)
    if rank is None:
        covariance = torch.eye(size, dtype=torch.float64, device=y.device) * spread**2
        return _fit_full(y, params, channel, mean, covariance, iterations, on_progress)
    if not 1 <= rank <= size:
        raise ValueError(f"fit_gaussian_prior received rank {rank}; give 1 to {size}, or None")
    if channel.selection(params) is None:
        raise ValueError(
            f"{type(channel).__name__} does not just select entries, so its Gaussian start has no "
            "low-rank form; "
            "leave rank unset for a full covariance"
        )
    return _fit_factors(y, params, channel, mean, spread, rank, iterations, seed, on_progress)


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
        mean_i log N(y_i; A_i m, A_i S A_i' + sigma^2 I), in nats; hidden entries do not count.
    """
    _check_channel(channel, "a Gaussian likelihood")
    covariance = prior.covariance()
    variance = _noise_variance(channel, covariance)
    total = 0.0
    for rows in _chunks(y, channel):
        system = _system(covariance, variance, channel, _rows(params, rows))
        total += float(system.log_density(system.residual(y[rows], prior.mean)).sum())
    return total / len(y)


class GaussianPosterior:
    """The exact posterior of x given y under a Gaussian prior and a linear Gaussian channel.

    Samples are drawn by perturbing and solving (Matheron's rule): with x' ~ prior and y' = A x' +
    e, the sample is x' + S A' G^-1 (y - y').

    Arguments:
        prior: The prior, in the data's units.
        channel: A linear channel with Gaussian noise.
    """

    def __init__(self, prior: GaussianPrior, channel: Channel) -> None:
        _check_channel(channel, "a Gaussian posterior")
        if len(prior.mean) != math.prod(channel.x_shape):
            raise ValueError(
                f"the prior has {len(prior.mean)} dimensions but the channel's samples have shape "
                f"{channel.x_shape}; "
                "fit the prior with this channel"
            )
        self.prior = prior
        self.channel = channel
        self._covariance = prior.covariance()
        self._variance = _noise_variance(channel, self._covariance)

    def mean(self, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Compute E[x | y], of shape (n, *x_shape), in the data's units and the type of y."""
        parts = []
        for rows in _chunks(y, self.channel):
            system = _system(self._covariance, self._variance, self.channel, _rows(params, rows))
            parts.append(self.prior.mean + system.gain(system.residual(y[rows], self.prior.mean)))
        return torch.cat(parts).reshape(len(y), *self.channel.x_shape).to(y.dtype)

    def sample(self, y: Tensor, params: Mapping[str, Tensor], *, seeds: Sequence[int]) -> Tensor:
        """Draw one sample per observation; see `Posterior.sample`."""
        if len(seeds) != len(y):
            raise ValueError(
                f"received {len(seeds)} seeds for {len(y)} observations; give one each"
            )
        prior = self.prior
        parts = []
        for rows in _chunks(y, self.channel):
            noise = SampleNoise(seeds[rows], device=y.device, dtype=torch.float64)
            x = prior.mean + noise.normal((prior.factor.shape[1],)) @ prior.factor.mT
            x = x + noise.normal((len(prior.mean),)) * prior.diag.sqrt()
            e = noise.normal(self.channel.y_shape).flatten(1) * math.sqrt(self._variance)
            system = _system(self._covariance, self._variance, self.channel, _rows(params, rows))
            parts.append(x + system.gain(system.residual(y[rows].flatten(1) - e, x)))
        return torch.cat(parts).reshape(len(y), *self.channel.x_shape).to(y.dtype)


# ------------------------------------------------------------------------------------------ G_i =
# A_i S A_i' + sigma^2 I


class _SelectedSystem:
    """G_i for operators that select entries: the seen ones, padded to the longest sample."""

    def __init__(self, covariance: Tensor, variance: float, seen: Tensor) -> None:
        self.covariance = covariance
        self.seen = seen
        longest = max(1, int(seen.sum(1).max()))
        self.order = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
        self.valid = seen.gather(1, self.order).to(covariance.dtype)
        gram = covariance[self.order.unsqueeze(2), self.order.unsqueeze(1)]
        gram = gram * self.valid.unsqueeze(2) * self.valid.unsqueeze(1)
        # Padded entries get a unit diagonal: they solve to 0 and add nothing to the determinant.
        gram.diagonal(dim1=1, dim2=2).add_(variance * self.valid + (1 - self.valid))
        self.cholesky = torch.linalg.cholesky(gram)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        return (y.flatten(1).to(x.dtype) - x).gather(1, self.order) * self.valid

    def weights(self, residual: Tensor) -> Tensor:
        v = torch.cholesky_solve(residual.unsqueeze(2), self.cholesky).squeeze(2)
        return torch.zeros_like(self.seen, dtype=v.dtype).scatter_add(
            1, self.order, v * self.valid
        )

    def gain(self, residual: Tensor) -> Tensor:
        return self.weights(residual) @ self.covariance

    def information(self) -> Tensor:
        size = len(self.covariance)
        inverse = torch.cholesky_inverse(self.cholesky)
        inverse = inverse * self.valid.unsqueeze(2) * self.valid.unsqueeze(1)
        index = self.order.unsqueeze(2) * size + self.order.unsqueeze(1)
        total = inverse.new_zeros(size * size).index_add_(0, index.flatten(), inverse.flatten())
        return total.reshape(size, size)

    def log_density(self, residual: Tensor) -> Tensor:
        return _log_density(residual, self.cholesky, self.valid.sum(1))


class _DenseSystem:
    """G_i for operators that are given as one dense matrix per sample."""

    def __init__(self, covariance: Tensor, variance: float, matrix: Tensor) -> None:
        self.covariance = covariance
        self.matrix = matrix
        gram = matrix @ covariance @ matrix.mT
        gram.diagonal(dim1=1, dim2=2).add_(variance)
        self.cholesky = torch.linalg.cholesky(gram)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        return y.flatten(1).to(x.dtype) - (self.matrix @ x.unsqueeze(-1)).squeeze(-1)

    def weights(self, residual: Tensor) -> Tensor:
        v = torch.cholesky_solve(residual.unsqueeze(2), self.cholesky)
        return (self.matrix.mT @ v).squeeze(2)

    def gain(self, residual: Tensor) -> Tensor:
        return self.weights(residual) @ self.covariance

    def information(self) -> Tensor:
        white = torch.linalg.solve_triangular(self.cholesky, self.matrix, upper=False).flatten(
            0, 1
        )
        total: Tensor = white.mT @ white
        return total

    def log_density(self, residual: Tensor) -> Tensor:
        return _log_density(
            residual, self.cholesky, torch.full_like(residual[:, 0], residual.shape[1])
        )


def _log_density(residual: Tensor, cholesky: Tensor, counts: Tensor) -> Tensor:
    white = torch.linalg.solve_triangular(cholesky, residual.unsqueeze(2), upper=False).squeeze(2)
    log_det: Tensor = 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
    density: Tensor = -0.5 * (white.square().sum(1) + log_det + counts * math.log(2 * math.pi))
    return density


def _system(
    covariance: Tensor, variance: float, channel: Channel, params: Mapping[str, Tensor]
) -> _SelectedSystem | _DenseSystem:
    seen = channel.selection(params)
    if seen is not None:
        return _SelectedSystem(covariance, variance, seen)
    return _DenseSystem(covariance, variance, channel.matrix(params, dtype=covariance.dtype))


# -------------------------------------------------------------------------------------------------
# -------------- fitting


def _fit_full(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    mean: Tensor,
    covariance: Tensor,
    iterations: int,
    on_progress: Callable[[int, float], None] | None,
) -> GaussianPrior:
    variance = _noise_variance(channel, covariance)
    n = len(y)
    for k in range(iterations):
        first, second, information = (torch.zeros_like(t) for t in (mean, covariance, covariance))
        log_density = 0.0
        for rows in _chunks(y, channel):
            system = _system(covariance, variance, channel, _rows(params, rows))
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


def _fit_factors(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    mean: Tensor,
    spread: float,
    rank: int,
    iterations: int,
    seed: int,
    on_progress: Callable[[int, float], None] | None,
) -> GaussianPrior:
    mean, factor, diag = _first_factors(y, params, channel, mean, spread, rank, seed)
    variance = max(channel.noise_std or 0.0, _NOISE_FLOOR * spread) ** 2
    floor = (_NOISE_FLOOR * spread) ** 2
    n, size = len(y), len(mean)
    eye = torch.eye(rank, dtype=mean.dtype, device=mean.device)
    for k in range(iterations):
        precision = 1 / (diag + variance)
        w = diag * precision  # E[e | u, y] = w (r - F u) on seen entries
        outer = (factor.unsqueeze(2) * factor.unsqueeze(1)).flatten(1)
        moment = mean.new_zeros(rank + 1, rank + 1)  # sum E[(u, 1) (u, 1)']
        hidden_moment = mean.new_zeros(size, rank * rank)  # sum over samples that see j of E[u u']
        data = mean.new_zeros(size, rank + 1)  # sum over samples that see j of r_j E[(u, 1)]
        square = torch.zeros_like(mean)  # sum over samples that see j of r_j^2
        seen_u = mean.new_zeros(size, rank)  # sum over samples that see j of E[u]
        seen_count = torch.zeros_like(mean)
        log_density = 0.0
        for rows in _blocks(n, max(size, rank * rank)):
            seen = _selection(channel, _rows(params, rows)).to(mean.dtype)
            r = (y[rows].flatten(1).to(mean.dtype) - mean) * seen
            lam = ((seen * precision) @ outer).reshape(-1, rank, rank) + eye
            cholesky = torch.linalg.cholesky(lam)
            projected = (r * precision) @ factor
            u = torch.cholesky_solve(projected.unsqueeze(2), cholesky).squeeze(2)
            uu = torch.cholesky_inverse(cholesky) + u.unsqueeze(2) * u.unsqueeze(1)
            log_density += float(
                -0.5
                * (
                    (r.square() * precision).sum()
                    - (projected * u).sum()
                    + 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum()
                    - (seen * precision.log()).sum()
                    + seen.sum() * math.log(2 * math.pi)
                )
            )
            moment[:rank, :rank] += uu.sum(0)
            moment[:rank, rank] += u.sum(0)
            moment[rank, rank] += len(u)
            hidden_moment += seen.mT @ uu.flatten(1)
            data[:, :rank] += r.mT @ u
            data[:, rank] += r.sum(0)
            square += r.square().sum(0)
            seen_u += seen.mT @ u
            seen_count += seen.sum(0)
        moment[rank, :rank] = moment[:rank, rank]
        # E[x_j u'] = F_j E[u u'] off the seen entries, (1 - w_j) F_j E[u u'] + w_j r_j E[u]' on
        # them; x_j is centred here.
        full = moment[:rank, :rank].flatten() - w.unsqueeze(1) * hidden_moment
        f_uu = (factor.unsqueeze(1) @ full.reshape(size, rank, rank)).squeeze(1)
        f_u = factor @ moment[:rank, rank] - w * (factor * seen_u).sum(1)
        cross = torch.cat([f_uu, f_u.unsqueeze(1)], dim=1) + w.unsqueeze(1) * data
        quadratic = _quadratic(factor, moment[:rank, :rank], hidden_moment, w)
        x_square = (
            quadratic + 2 * (1 - w) * w * (factor * data[:, :rank]).sum(1) + w.square() * square
        )
        x_square = x_square + diag * (n - w * seen_count)
        solution = torch.linalg.solve(moment, cross.mT).mT
        diag = ((x_square - (solution * cross).sum(1)) / n).clamp_min(floor)
        factor, mean = solution[:, :rank], mean + solution[:, rank]
        if on_progress is not None:
            on_progress(k + 1, log_density / n)
    return GaussianPrior(mean=mean, factor=factor, diag=diag)


def _quadratic(factor: Tensor, moment: Tensor, seen_moment: Tensor, w: Tensor) -> Tensor:
    # sum_i (1 - w_j s_ij)^2 F_j E[u_i u_i'] F_j', with s_ij = 1 where sample i sees entry j.
    rank = factor.shape[1]
    everywhere: Tensor = (factor @ moment * factor).sum(1)
    seen = ((factor.unsqueeze(1) @ seen_moment.reshape(-1, rank, rank)).squeeze(1) * factor).sum(1)
    return everywhere + ((1 - w).square() - 1) * seen


def _first_factors(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    mean: Tensor,
    spread: float,
    rank: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Start from the leading directions of the covariance of pairs that are seen together."""
    size = len(mean)
    count = mean.new_zeros(size)
    total = mean.new_zeros(size)
    for rows in _blocks(len(y), size):
        seen = _selection(channel, _rows(params, rows)).to(mean.dtype)
        count += seen.sum(0)
        total += (y[rows].flatten(1).to(mean.dtype) * seen).sum(0)
    mean = torch.where(count > 0, total / count.clamp_min(1), mean)
    pairs, products = mean.new_zeros(size, size), mean.new_zeros(size, size)
    for rows in _blocks(len(y), size):
        seen = _selection(channel, _rows(params, rows)).to(mean.dtype)
        r = (y[rows].flatten(1).to(mean.dtype) - mean) * seen
        pairs += seen.mT @ seen
        products += r.mT @ r
    covariance = products / pairs.clamp_min(1)
    covariance.diagonal().sub_((channel.noise_std or 0.0) ** 2)
    generator = torch.Generator(mean.device).manual_seed(seed)
    q = torch.randn(
        size, min(size, rank + 8), generator=generator, dtype=mean.dtype, device=mean.device
    )
    for _ in range(8):
        q, _ = torch.linalg.qr(covariance @ q)
    values, vectors = torch.linalg.eigh(q.mT @ covariance @ q)
    floor = (0.1 * spread) ** 2
    factor = (q @ vectors[:, -rank:]) * values[-rank:].clamp_min(floor / size).sqrt()
    diag = (covariance.diagonal() - factor.square().sum(1)).clamp_min(floor)
    return mean, factor, diag


def _first_moments(
    y: Tensor, params: Mapping[str, Tensor], channel: Channel
) -> tuple[Tensor, float]:
    """Fit a constant c and a spread s in y ~ A(c 1 + s z): EM starts at the data's scale."""
    generator = torch.Generator(y.device).manual_seed(0)
    shape = channel.x_shape
    ones_y = ones_ones = y_y = probe_probe = 0.0
    for rows in _blocks(len(y), math.prod(shape)):
        part, part_params = y[rows].double(), _rows(params, rows)
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


def _check_channel(channel: Channel, what: str) -> None:
    if not channel.linear or channel.noise_std is None:
        raise ValueError(
            f"{what} needs a linear channel with Gaussian noise, but {type(channel).__name__} is "
            "not; "
            "choose another start"
        )


def _noise_variance(channel: Channel, covariance: Tensor) -> float:
    spread = math.sqrt(float(covariance.diagonal().mean()))
    return max(channel.noise_std or 0.0, _NOISE_FLOOR * spread) ** 2


def _selection(channel: Channel, params: Mapping[str, Tensor]) -> Tensor:
    seen = channel.selection(params)
    assert seen is not None
    return seen


def _rows(params: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in params.items()}


def _chunks(y: Tensor, channel: Channel) -> Iterator[slice]:
    m, d = math.prod(channel.y_shape), math.prod(channel.x_shape)
    return _blocks(len(y), m * max(m, d))


def _blocks(n: int, values: int) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // max(1, values))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))
