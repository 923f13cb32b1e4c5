"""Linear systems of Gaussian posteriors, one per observation: G_i = A_i S A_i' + sigma^2 I.

A system computes, for residuals r_i = y_i - A_i x_i: the weights A_i' G_i^-1 r_i, the gain S A_i'
G_i^-1 r_i, the log-density log N(r_i; 0, G_i), the sum of the informations A_i' G_i^-1 A_i, and
what is left of the covariance, C_i = S - S A_i' G_i^-1 A_i S.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Protocol, Self

import torch
from torch import Tensor

from diffem_core.gaussian_iterative import IterativeSystem
from diffem_core.gaussian_prior import GaussianPrior

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = [
    "NOISE_FLOOR",
    "FactorSystem",
    "Solver",
    "System",
    "Systems",
    "blocks",
    "dense_is_small",
    "noise_variance",
    "require_linear_gaussian",
    "require_small_dense",
    "rows_of",
]

_CHUNK_VALUES = 2**24  # Float64 values of the largest temporary: 128 MB.
_ITERATIVE_VALUES = 2**19  # Of one vector of a batch that is iterated on: 4 MB, near the caches.
# Largest sizes of dense systems, in float64 values. A system costs about size^1.5 operations.
_SHARED_VALUES = 2**24  # D x max(M, D), for an operator that all samples share: once.
_SELECTED_VALUES = 2**20  # D x D, for one that selects entries: a small part of it per sample.
_OWN_VALUES = 2**16  # M x D, for any other: per sample, and D applications of A to write it down.
_OWN_VALUES_ASKED = 2**18  # The same where nothing else will do: full covariances, likelihoods.
NOISE_FLOOR = 1e-3  # Least noise assumed, as a fraction of the spread: keeps every G_i regular.


Solver = Literal["auto", "dense", "iterative"]


class System(Protocol):
    """What every kind of system computes, for residuals of the form that it makes itself."""

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Compute y - A x, for x of shape (D,) or (n, D)."""
        ...

    def weights(self, residual: Tensor) -> Tensor:
        """Compute A' G^-1 r, of shape (n, D)."""
        ...

    def gain(self, residual: Tensor) -> Tensor:
        """Compute S A' G^-1 r, of shape (n, D)."""
        ...

    def information(self) -> Tensor:
        """Compute the sum over the batch of A' G^-1 A, of shape (D, D)."""
        ...

    def log_density(self, residual: Tensor) -> Tensor:
        """Compute log N(r; 0, G), of shape (n,), in nats."""
        ...

    def variances(self) -> Tensor:
        """Compute the diagonals of C = S - S A' G^-1 A S, of shape (n, D)."""
        ...

    def covariances(self) -> Tensor:
        """Compute C = S - S A' G^-1 A S, of shape (n, D, D)."""
        ...


class _Factorized:
    """What is left of the covariance, S - W'W with W = L^-1 A S, where G = L L' is factorized."""

    covariance: Tensor
    cholesky: Tensor

    def observed(self) -> Tensor:
        """Compute A S."""
        raise NotImplementedError

    def variances(self) -> Tensor:
        return self.covariance.diagonal() - self._white().square().sum(-2)

    def covariances(self) -> Tensor:
        white = self._white()
        return self.covariance - white.mT @ white

    def _white(self) -> Tensor:
        white: Tensor = torch.linalg.solve_triangular(self.cholesky, self.observed(), upper=False)
        return white


class _SelectedSystem(_Factorized):
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

    def observed(self) -> Tensor:
        return self.covariance[self.order] * self.valid.unsqueeze(2)


class _DenseSystem(_Factorized):
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

    def observed(self) -> Tensor:
        return self.matrix @ self.covariance


class _SharedSystem(_Factorized):
    """G for an operator that is the same for all samples: one factorization serves all."""

    def __init__(self, covariance: Tensor, variance: float, matrix: Tensor) -> None:
        self.covariance = covariance
        self.matrix = matrix.to(covariance.device)
        self.count = 0
        gram = self.matrix @ covariance @ self.matrix.mT
        gram.diagonal().add_(variance)
        self.cholesky = torch.linalg.cholesky(gram)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        return y.flatten(1).to(x.dtype) - x @ self.matrix.mT

    def weights(self, residual: Tensor) -> Tensor:
        return torch.cholesky_solve(residual.mT, self.cholesky).mT @ self.matrix

    def gain(self, residual: Tensor) -> Tensor:
        return self.weights(residual) @ self.covariance

    def information(self) -> Tensor:
        white = torch.linalg.solve_triangular(self.cholesky, self.matrix, upper=False)
        total: Tensor = self.count * (white.mT @ white)
        return total

    def log_density(self, residual: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(self.cholesky, residual.mT, upper=False)
        log_det = 2 * self.cholesky.diagonal().log().sum()
        constant = log_det + residual.shape[1] * math.log(2 * math.pi)
        density: Tensor = -0.5 * (white.square().sum(0) + constant)
        return density

    def variances(self) -> Tensor:
        return super().variances().expand(self.count, -1)

    def covariances(self) -> Tensor:
        return super().covariances().expand(self.count, -1, -1)

    def observed(self) -> Tensor:
        return self.matrix @ self.covariance


class FactorSystem:
    """G_i for operators that select entries, solved in the space of the prior's factors.

    With p = seen / (d + sigma^2) and L = I + F' diag(p) F, Woodbury's identity gives

        A' G^-1 r = p r - p F L^-1 F' (p r)
    """

    def __init__(self, prior: GaussianPrior, variance: float, seen: Tensor) -> None:
        self.factor = prior.factor
        self.diag = prior.diag
        self.seen = seen.to(prior.mean.dtype)
        self.precision = self.seen / (prior.diag + variance)
        rank = prior.factor.shape[1]
        outer = (prior.factor.unsqueeze(2) * prior.factor.unsqueeze(1)).flatten(1)
        inner = (self.precision @ outer).reshape(-1, rank, rank)
        inner.diagonal(dim1=1, dim2=2).add_(1.0)
        self.cholesky = torch.linalg.cholesky(inner)

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Compute y - x on seen entries, 0 on hidden ones, of shape (n, D)."""
        return (y.flatten(1).to(x.dtype) - x) * self.seen

    def factors(self, residual: Tensor) -> Tensor:
        """Compute E[u | y], of shape (n, R)."""
        projected = (residual * self.precision) @ self.factor
        return torch.cholesky_solve(projected.unsqueeze(2), self.cholesky).squeeze(2)

    def weights(self, residual: Tensor) -> Tensor:
        """Compute A' G^-1 r, of shape (n, D)."""
        return self.precision * (residual - self.factors(residual) @ self.factor.mT)

    def gain(self, residual: Tensor) -> Tensor:
        """Compute S A' G^-1 r, of shape (n, D)."""
        weights = self.weights(residual)
        return weights * self.diag + (weights @ self.factor) @ self.factor.mT

    def information(self) -> Tensor:
        """Refuse: EM on a dense covariance builds dense systems."""
        raise NotImplementedError("EM on a dense covariance builds dense systems")

    def log_density(self, residual: Tensor) -> Tensor:
        """Compute log N(r; 0, G), of shape (n,), in nats."""
        explained = ((residual * self.precision) @ self.factor * self.factors(residual)).sum(1)
        square = (residual.square() * self.precision).sum(1) - explained
        log_det = 2 * self.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        log_det = log_det - torch.where(self.seen > 0, self.precision, 1.0).log().sum(1)
        density: Tensor = -0.5 * (square + log_det + self.seen.sum(1) * math.log(2 * math.pi))
        return density

    def variances(self) -> Tensor:
        """Compute diag(C) = d h + h^2 diag(F L^-1 F') with h = 1 - d p, of shape (n, D)."""
        left, white = self._left()
        variances: Tensor = self.diag * left + white.square().sum(1)
        return variances

    def covariances(self) -> Tensor:
        """Compute C = diag(d h) + diag(h) F L^-1 F' diag(h), of shape (n, D, D)."""
        left, white = self._left()
        covariances: Tensor = torch.diag_embed(self.diag * left) + white.mT @ white
        return covariances

    def _left(self) -> tuple[Tensor, Tensor]:
        """Compute h = 1 - d p, of shape (n, D), and chol(L)^-1 F' diag(h), (n, R, D)."""
        left = 1 - self.diag * self.precision
        white = torch.linalg.solve_triangular(
            self.cholesky, self.factor.mT.expand(len(left), -1, -1), upper=False
        )
        return left, white * left.unsqueeze(1)


class Systems:
    """Builds the systems of one channel and one covariance, batch by batch.

    Arguments:
        channel: A linear channel with Gaussian noise.
        covariance: Dense covariance of x, of shape (D, D), for dense systems; None to work with a
            prior's factors instead.
        variance: Variance of the noise.
        prior: The prior with these factors.
        iterative: Whether its systems are solved by conjugate gradients, for any linear channel;
            otherwise in the space of its factors, for channels that select entries.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        variance: float,
        covariance: Tensor | None = None,
        prior: GaussianPrior | None = None,
        iterative: bool = False,
    ) -> None:
        assert (covariance is None) != (prior is None)
        self.channel = channel
        self.variance = variance
        self.covariance = covariance
        self.prior = prior
        self.iterative = iterative
        self._one: _SharedSystem | None = None

    @classmethod
    def of(
        cls,
        prior: GaussianPrior,
        channel: Channel,
        *,
        solver: Solver = "auto",
    ) -> Self:
        """Choose how the systems of a prior are solved.

        Arguments:
            prior: The prior.
            channel: A linear channel with Gaussian noise.
            solver: `auto` takes the factors' space if A selects entries and R <= D / 4; else dense
                systems if they are small (`dense_is_small`); else conjugate gradients.
        """
        spread = math.sqrt(float((prior.factor.square().sum(1) + prior.diag).mean()))
        variance = noise_variance(channel, spread)
        size, rank = prior.factor.shape
        if solver == "auto":
            if channel.selects and 4 * rank <= size:
                return cls(channel, variance=variance, prior=prior)
            solver = "dense" if dense_is_small(channel) else "iterative"
        if solver == "iterative":
            return cls(channel, variance=variance, prior=prior, iterative=True)
        return cls(channel, variance=variance, covariance=prior.covariance())

    def build(self, params: Mapping[str, Tensor], n: int) -> System:
        """Build the system of a batch of n observations from their operator parameters."""
        if self.iterative:
            assert self.prior is not None
            return IterativeSystem(self.prior, self.variance, self.channel, params)
        if not self.channel.params_spec:
            return self._shared(n)
        seen = self.channel.selection(params)
        if self.prior is not None:
            assert seen is not None
            return FactorSystem(self.prior, self.variance, seen)
        assert self.covariance is not None
        if seen is not None:
            return _SelectedSystem(self.covariance, self.variance, seen)
        matrix = self.channel.matrix(params, dtype=self.covariance.dtype)
        return _DenseSystem(self.covariance, self.variance, matrix)

    def _shared(self, n: int) -> System:
        assert self.covariance is not None
        if self._one is None:
            matrix = self.channel.matrix({}, dtype=self.covariance.dtype)[0]
            self._one = _SharedSystem(self.covariance, self.variance, matrix)
        self._one.count = n
        return self._one

    def chunks(self, n: int) -> Iterator[slice]:
        """Split n observations so that the largest temporary stays within its bound."""
        m, d = _sizes(self.channel)
        if self.iterative:
            return blocks(n, max(m, d) * (_CHUNK_VALUES // _ITERATIVE_VALUES))
        if not self.channel.params_spec:
            return blocks(n, max(m, d))
        if self.prior is not None:
            return blocks(n, max(d, self.prior.factor.shape[1] ** 2))
        return blocks(n, m * max(m, d))


def require_linear_gaussian(channel: Channel, what: str, remedy: str) -> None:
    """Refuse channels that are not linear with Gaussian noise; `what` names who needs one."""
    if not channel.linear or channel.noise_std is None:
        raise ValueError(
            f"{what} needs a linear channel with Gaussian noise, but {type(channel).__name__} is "
            f"not; {remedy}"
        )


def dense_is_small(channel: Channel, *, asked: bool = False) -> bool:
    """Say whether the dense systems of a channel are small enough to be built.

    With D entries of x and M of y, they are if D max(M, D) <= 2^24 for an operator that all
    samples share, if D^2 <= 2^20 for one that selects entries, and if M D <= 2^16 (2^18 where
    nothing else will do) for any other.

    Arguments:
        channel: A linear channel.
        asked: Whether nothing else will do.
    """
    count, limit = _dense_values(channel, asked=asked)
    return count <= limit


def require_small_dense(channel: Channel, what: str, remedy: str) -> None:
    """Refuse channels whose dense systems are too large; `what` names who needs them."""
    count, limit = _dense_values(channel, asked=True)
    if count > limit:
        m, d = _sizes(channel)
        raise ValueError(
            f"{what} builds dense systems, of {count} values for {type(channel).__name__} with "
            f"{d} entries of x and {m} of y, where {limit} is the largest size; {remedy}"
        )


def noise_variance(channel: Channel, spread: float) -> float:
    """Return the variance of the noise, or the floor that keeps systems regular if it is less."""
    return max(channel.noise_std or 0.0, NOISE_FLOOR * spread) ** 2


def rows_of(params: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Return the parameters of some observations."""
    return {name: value[rows] for name, value in params.items()}


def blocks(n: int, values: int) -> Iterator[slice]:
    """Split n samples with `values` float64 values each."""
    step = max(1, _CHUNK_VALUES // max(1, values))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _dense_values(channel: Channel, *, asked: bool) -> tuple[int, int]:
    """Count the values of a channel's dense systems, and how many may be built."""
    m, d = _sizes(channel)
    if not channel.params_spec:
        return d * max(m, d), _SHARED_VALUES
    if channel.selects:
        return d * d, _SELECTED_VALUES
    return m * d, _OWN_VALUES_ASKED if asked else _OWN_VALUES


def _sizes(channel: Channel) -> tuple[int, int]:
    return math.prod(channel.y_shape), math.prod(channel.x_shape)


def _log_density(residual: Tensor, cholesky: Tensor, counts: Tensor) -> Tensor:
    white = torch.linalg.solve_triangular(cholesky, residual.unsqueeze(2), upper=False).squeeze(2)
    log_det: Tensor = 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
    density: Tensor = -0.5 * (white.square().sum(1) + log_det + counts * math.log(2 * math.pi))
    return density
