"""Linear systems of Gaussian posteriors, G_i = A_i S A_i' + sigma^2 I, without their matrices.

    G v = A (F (F' A' v) + d * (A' v)) + sigma^2 v,       S = F F' + diag(d)

needs only the operator, its adjoint and the prior's factors, and G v = r is solved by conjugate
gradients to a relative residual of 1e-5. The vectors are float64, but the channel may compute in
float32. Then the residual can stall above 1e-5 (up to 1e-3 is let pass; more is an error), by
rounding along the leading directions of S, which moves x by no more than about 1e-7 |S| |v|.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.linear_solvers import solve

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["TOLERANCE", "IterativeSystem"]

TOLERANCE = (
    1e-5  # |r - G v| / |r|; the error of x is at most about this times sqrt(S) |r| / sigma.
)


class IterativeSystem:
    """G_i for any linear operator, solved by conjugate gradients.

    Arguments:
        prior: The prior.
        variance: Variance of the noise.
        channel: The channel.
        params: Operator parameters of the batch.
    """

    def __init__(
        self,
        prior: GaussianPrior,
        variance: float,
        channel: Channel,
        params: Mapping[str, Tensor],
    ) -> None:
        self.prior = prior
        self.variance = variance
        self.channel = channel
        self.params = params

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """Compute y - A x, of shape (n, M), for x of shape (D,) or (n, D)."""
        return y.flatten(1).to(x.dtype) - self._forward(x.expand(len(y), -1))

    def weights(self, residual: Tensor) -> Tensor:
        """Compute A' G^-1 r, of shape (n, D).

        Raises:
            FloatingPointError: The iteration does not converge.
        """

        def gram(v: Tensor) -> Tensor:
            return self._forward(self._spread(self._adjoint(v))) + self.variance * v

        return self._adjoint(solve(gram, residual, tolerance=TOLERANCE))

    def gain(self, residual: Tensor) -> Tensor:
        """Compute S A' G^-1 r, of shape (n, D)."""
        return self._spread(self.weights(residual))

    def information(self) -> Tensor:
        """Refuse: EM on a dense covariance builds dense systems."""
        raise NotImplementedError("EM on a dense covariance builds dense systems")

    def log_density(self, residual: Tensor) -> Tensor:
        """Refuse: iteration gives no determinant."""
        raise NotImplementedError("log-densities take dense systems")

    def variances(self) -> Tensor:
        """Refuse: conjugate gradients solve for one right-hand side, and know no diagonal."""
        raise NotImplementedError("conjugate gradients give no posterior variances")

    def covariances(self) -> Tensor:
        """Refuse, as `variances` does."""
        raise NotImplementedError("conjugate gradients give no posterior covariances")

    def _spread(self, x: Tensor) -> Tensor:
        return (x @ self.prior.factor) @ self.prior.factor.mT + self.prior.diag * x

    def _forward(self, x: Tensor) -> Tensor:
        image = x.reshape(len(x), *self.channel.x_shape)
        return self.channel.A(image, self.params).flatten(1)

    def _adjoint(self, v: Tensor) -> Tensor:
        seen = v.reshape(len(v), *self.channel.y_shape)
        return self.channel.A_adjoint(seen, self.params).flatten(1)
