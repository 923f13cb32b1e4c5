"""Variance-exploding noise.

x_t = x + sigma_t z,      sigma_t = exp(log sigma_min + t (log sigma_max - log sigma_min))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["VELogLinear"]


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
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"schedule received sigma_min {self.sigma_min} and sigma_max {self.sigma_max}; "
                "give 0 < sigma_min < sigma_max"
            )

    def sigma(self, t: Tensor) -> Tensor:
        """Compute the noise level at time t in [0, 1], of the same shape."""
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (low + (high - low) * t).exp()

    def t(self, sigma: Tensor) -> Tensor:
        """Compute the time at which the noise level is sigma, of the same shape."""
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return (sigma.log() - low) / (high - low)
