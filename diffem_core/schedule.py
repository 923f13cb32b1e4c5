"""Variance-exploding noise.

    x_t = x + sigma_t z

and how the noise level sigma_t grows with the time t in [0, 1]:

    VELogLinear:  log sigma_t     = (1 - t) log sigma_min     + t log sigma_max
    VEKarras:     sigma_t^(1/rho) = (1 - t) sigma_min^(1/rho) + t sigma_max^(1/rho)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Schedule", "VEKarras", "VELogLinear"]


class Schedule(Protocol):
    """Anything that says how the noise level grows with time."""

    @property
    def sigma_min(self) -> float:
        """Noise level at t = 0, in network units."""
        ...

    @property
    def sigma_max(self) -> float:
        """Noise level at t = 1, in network units."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise level at time t in [0, 1], of the same shape."""
        ...

    def t(self, sigma: Tensor) -> Tensor:
        """Compute the time at which the noise level is sigma, of the same shape."""
        ...


@dataclass(frozen=True, kw_only=True)
class VELogLinear:
    """Noise whose logarithm grows linearly in time (DiffEM, appendix; Rozet et al. 2024).

    Arguments:
        sigma_min: Noise level at t = 0, in network units.
        sigma_max: Noise level at t = 1, in network units.

    Raises:
        ValueError: Not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 1e-3
    sigma_max: float = 1e2

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise level at time t in [0, 1], of the same shape."""
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (low + (high - low) * t).exp()

    def t(self, sigma: Tensor) -> Tensor:
        """Compute the time at which the noise level is sigma, of the same shape."""
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (sigma.log() - low) / (high - low)


@dataclass(frozen=True, kw_only=True)
class VEKarras:
    """Noise whose rho-th root grows linearly in time.

    Larger rho puts more of the time at low noise; rho -> infinity is `VELogLinear`. (The paper's
    grid counts its steps from sigma_max down; here time runs up.)

    Arguments:
        sigma_min: Noise level at t = 0, in network units.
        sigma_max: Noise level at t = 1, in network units.
        rho: The root that is linear in time, positive.

    Raises:
        ValueError: Not 0 < sigma_min < sigma_max, or rho is not positive and finite.

    References:
        Karras et al. 2022 (EDM, arXiv 2206.00364), equation 5.
    """

    sigma_min: float = 2e-3
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)
        if not 0 < self.rho < math.inf:
            raise ValueError(
                f"schedule received rho {self.rho}; give a positive number (EDM takes 7)"
            )

    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise level at time t in [0, 1], of the same shape."""
        low, high = self._roots()
        return (low + (high - low) * t) ** self.rho

    def t(self, sigma: Tensor) -> Tensor:
        """Compute the time at which the noise level is sigma, of the same shape."""
        low, high = self._roots()
        return (sigma ** (1 / self.rho) - low) / (high - low)

    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"schedule received sigma_min {sigma_min} and sigma_max {sigma_max}; "
            "give 0 < sigma_min < sigma_max"
        )
