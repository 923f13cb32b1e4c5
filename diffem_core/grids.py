"""Noise levels at which a sampler calls the network.

A grid of `steps` calls has `steps + 1` entries: the noise level of every call, from `sigma_max`
down to `sigma_min`, and a last 0. The step to 0 returns the denoiser's own estimate at
`sigma_min`, so that the number of entries before the last is the number of network calls, and
`sigma_min` is the noise level of the last one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["karras_grid", "log_linear_grid"]


def log_linear_grid(sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """Space noise levels evenly in log sigma, that is, in the time of `VELogLinear` (paper).

    Arguments:
        sigma_max: Noise level of the first network call.
        sigma_min: Noise level of the last network call (unused if there is only one).
        steps: Network calls.

    Returns:
        Float64 noise levels of shape (steps + 1,), strictly decreasing; the last is 0.

    Raises:
        ValueError: Not 0 < sigma_min < sigma_max, or steps < 1.
    """
    _check(sigma_max, sigma_min, steps)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64)
    return _finish(levels.exp(), sigma_max, sigma_min)


def karras_grid(sigma_max: float, sigma_min: float, steps: int, *, rho: float = 7.0) -> Tensor:
    """Space noise levels evenly in sigma^(1 / rho).

    Arguments:
        sigma_max: Noise level of the first network call.
        sigma_min: Noise level of the last network call (unused if there is only one).
        steps: Network calls.
        rho: Warping exponent, positive: larger puts more steps at small noise.

    Returns:
        Float64 noise levels of shape (steps + 1,), strictly decreasing; the last is 0.

    Raises:
        ValueError: Not 0 < sigma_min < sigma_max, steps < 1, or rho <= 0.

    References:
        Karras et al. 2022 (EDM, arXiv 2206.00364), equation 5.
    """
    _check(sigma_max, sigma_min, steps)
    if not rho > 0:
        raise ValueError(f"karras_grid received rho {rho}; it must be positive (EDM takes 7)")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = torch.linspace(*ends, steps, dtype=torch.float64) ** rho
    return _finish(levels, sigma_max, sigma_min)


def _check(sigma_max: float, sigma_min: float, steps: int) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"grid received noise levels from {sigma_max} down to {sigma_min}; give sigma_max > "
            "sigma_min > 0"
        )
    if steps < 1:
        raise ValueError(f"grid received {steps} steps; give at least 1")


def _finish(levels: Tensor, sigma_max: float, sigma_min: float) -> Tensor:
    levels[-1] = sigma_min  # Exact ends, whatever exp and pow round to.
    levels[0] = sigma_max
    return torch.cat([levels, levels.new_zeros(1)])
