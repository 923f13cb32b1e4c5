"""What surrounds the network of a denoiser, so that it has little left to learn.

Around the prior's mean 0 and standard deviation s (EDM):

    f = c_skip x_t + c_out F(c_in x_t, c_noise, y)
    c_skip = s^2 / (sigma^2 + s^2)      c_out = sigma s / sqrt(sigma^2 + s^2)
    c_in = 1 / sqrt(sigma^2 + s^2)      c_noise = log sigma

Around the Gaussian posterior N(m_y, C_y) of an observation, where x_t tells what y does not:

    f = m_y + C_y (C_y + sigma^2 I)^-1 (x_t - m_y) + B F(., c_noise, y),
    B B' = (C_y^-1 + sigma^-2 I)^-1

which is the exact E[x | x_t, y] where x is Gaussian and F = 0: the network learns what is not
Gaussian, and never has to learn how exact an observation is. With only the diagonal s^2 of C_y,
this is EDM's preconditioning of x_t - m_y, entry by entry. With a factor C_y = K K',

    K'K + sigma^2 I = R R',   w = R^-1 K' (x_t - m_y),   f = m_y + K R'^-1 (w + sigma F),

and the network sees the Gaussian estimate, F = 0, in the place of x_t.

References:
    Karras et al. 2022 (EDM, arXiv 2206.00364), table 1 and equation 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "EDMPreconditioning",
    "FactorPreconditioning",
    "MomentsPreconditioning",
    "Preconditioning",
]


class Preconditioning(Protocol):
    """How a denoiser is made of a network."""

    def __call__(
        self,
        network: Callable[[Tensor], Tensor],
        x_t: Tensor,
        sigma_t: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """Estimate E[x | x_t, y].

        Arguments:
            network: The network at these noise levels and this condition.
            x_t: Noisy samples of shape (n, ...), in network units.
            sigma_t: Noise levels of shape (n,) or (1,).
            condition: The condition, or None.

        Returns:
            Estimates of the shape of x_t.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EDMPreconditioning:
    """EDM's preconditioning, of samples around 0.

    Arguments:
        sigma_data: Standard deviation s of the data, in network units, positive.
    """

    sigma_data: float = 1.0

    def __call__(
        self,
        network: Callable[[Tensor], Tensor],
        x_t: Tensor,
        sigma_t: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """Estimate E[x | x_t, y]; see `Preconditioning`."""
        return _around_zero(network, x_t, sigma_t, self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class MomentsPreconditioning:
    """Around the Gaussian posterior's mean, with its standard deviation entry by entry.

    Arguments:
        bands: Bands of an image, or entries of a vector: the condition ends with so many of m_y
            and as many of s.
    """

    bands: int

    def __call__(
        self,
        network: Callable[[Tensor], Tensor],
        x_t: Tensor,
        sigma_t: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """Estimate E[x | x_t, y]; see `Preconditioning`."""
        assert condition is not None, "the condition holds the moments"
        mean, spread = condition[:, -2 * self.bands :].chunk(2, dim=1)
        return mean + _around_zero(network, x_t - mean, sigma_t, spread)


@dataclass(frozen=True, kw_only=True)
class FactorPreconditioning:
    """Around the Gaussian posterior of a vector, with its whole covariance.

    Arguments:
        dimension: Entries D of a vector: the condition ends with D of m_y and D D of K, row by
            row.
    """

    dimension: int

    def __call__(
        self,
        network: Callable[[Tensor], Tensor],
        x_t: Tensor,
        sigma_t: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        """Estimate E[x | x_t, y]; see `Preconditioning`."""
        assert condition is not None, "the condition holds the moments"
        size = self.dimension
        mean = condition[:, -size * (size + 1) : -size * size]
        factor = condition[:, -size * size :].reshape(-1, size, size)
        sigma = sigma_t.reshape(-1, 1)
        inner = factor.mT @ factor + torch.diag_embed(sigma.square().expand(-1, size))
        # A GPU would have to be waited for, to be asked whether it worked: what did not is NaN.
        root, failed = torch.linalg.cholesky_ex(inner)
        root = root.masked_fill((failed > 0)[:, None, None], math.nan)
        projected = factor.mT @ (x_t - mean).unsqueeze(2)
        white = torch.linalg.solve_triangular(root, projected, upper=False)

        def spread(v: Tensor) -> Tensor:
            scaled: Tensor = factor @ torch.linalg.solve_triangular(root.mT, v, upper=True)
            return scaled.squeeze(2)

        estimate = mean + spread(white)
        return estimate + sigma * spread(network(estimate).unsqueeze(2))


def _around_zero(
    network: Callable[[Tensor], Tensor], x_t: Tensor, sigma_t: Tensor, s: float | Tensor
) -> Tensor:
    """Estimate x of mean 0 and standard deviation s (EDM)."""
    sigma = sigma_t.reshape(-1, *[1] * (x_t.ndim - 1))
    c_in = (sigma.square() + s**2).rsqrt()
    c_skip = (s * c_in).square()
    c_out = sigma * s * c_in
    return torch.addcmul(c_skip * x_t, c_out, network(c_in * x_t))
