"""Samplers of the reverse process, from x_t ~ N(0, sigma_max^2) down a grid of noise levels.

Each is a function of a denoiser `f(x_t, sigma_t) ~ E[x | x_t]` (which closes over the
observation), a grid and a noise source. With the grids of `diffem_core.grids`, a sampler of
`steps` steps calls the denoiser exactly `steps` times, and the last step, to noise level 0,
returns the denoiser's estimate. Coefficients are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.noise import SampleNoise

__all__ = ["Denoise", "Sampler", "ddim", "ddpm", "dpm_solver", "heun", "predictor_corrector"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""`denoise(x_t, sigma)` with x_t of shape (n, ...) and sigma of shape (1,), returning E[x |
x_t]."""


class Sampler(Protocol):
    """A sampler with its grid bound, for example `functools.partial(ddpm, sigmas=grid)`."""

    def __call__(self, denoise: Denoise, *, noise: SampleNoise, shape: Sequence[int]) -> Tensor:
        """Draw samples of shape (len(noise), *shape)."""
        ...


def ddpm(
    denoise: Denoise,
    *,
    sigmas: Tensor,
    noise: SampleNoise,
    shape: Sequence[int],
    x_start: Tensor | None = None,
) -> Tensor:
    """Sample by ancestral steps (DDPM).

        x_s = x_t - tau (x_t - f(x_t)) + sigma_s sqrt(tau) z,      tau = 1 - sigma_s^2 / sigma_t^2

    Arguments:
        denoise: The denoiser.
        sigmas: Decreasing noise levels of shape (steps + 1,), the last 0.
        noise: Source of the noise; its samples are the batch.
        shape: Shape of one sample.
        x_start: Samples at the first noise level; N(0, sigmas[0]^2) by default.

    Returns:
        Samples of shape (n, *shape), after `steps` calls of the denoiser.

    Raises:
        ValueError: The grid is not decreasing.

    References:
        Ho et al. 2020 (DDPM, arXiv 2006.11239), written for the variance-exploding process.
    """
    x, grid, levels = _begin(sigmas, noise, shape, x_start, draws=len(sigmas) - 1)
    for i, level in enumerate(levels[:-1]):
        ratio = grid[i + 1] / grid[i]
        tau = float(1 - ratio**2)
        x = torch.lerp(x, denoise(x, level), tau)
        if grid[i + 1] > 0:
            x = x.add_(noise.normal(shape), alpha=float(grid[i + 1] * np.sqrt(tau)))
    return x


def ddim(
    denoise: Denoise,
    *,
    sigmas: Tensor,
    noise: SampleNoise,
    shape: Sequence[int],
    x_start: Tensor | None = None,
) -> Tensor:
    """Sample by deterministic first-order steps (DDIM, eta = 0).

    These are Euler steps of the probability-flow ODE in sigma:

        x_s = x_t - (1 - sigma_s / sigma_t) (x_t - f(x_t))

    Arguments:
        denoise: The denoiser.
        sigmas: Decreasing noise levels of shape (steps + 1,), the last 0.
        noise: Source of the start; its samples are the batch.
        shape: Shape of one sample.
        x_start: Samples at the first noise level; N(0, sigmas[0]^2) by default.

    Returns:
        Samples of shape (n, *shape), after `steps` calls of the denoiser.

    Raises:
        ValueError: The grid is not decreasing.

    References:
        Song et al. 2021 (DDIM, arXiv 2010.02502), section 4.3, for the variance-exploding process.
    """
    x, grid, levels = _begin(sigmas, noise, shape, x_start, draws=1)
    for i, level in enumerate(levels[:-1]):
        x = torch.lerp(x, denoise(x, level), float(1 - grid[i + 1] / grid[i]))
    return x


def dpm_solver(
    denoise: Denoise,
    *,
    sigmas: Tensor,
    noise: SampleNoise,
    shape: Sequence[int],
    stochastic: bool = True,
    x_start: Tensor | None = None,
) -> Tensor:
    """Sample by second-order multistep exponential integration in log sigma (DPM-Solver++(2M)).

    With h = log(sigma_t / sigma_s) and D = f_t + (h / 2 h_previous) (f_t - f_previous):

        ODE:  x_s = e^-h x_t + (1 - e^-h) D
        SDE:  x_s = e^-2h x_t + (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z

    The first step and the one to noise level 0 are of first order (D = f_t).

    Arguments:
        denoise: The denoiser.
        sigmas: Decreasing noise levels of shape (steps + 1,), the last 0.
        noise: Source of the noise; its samples are the batch.
        shape: Shape of one sample.
        stochastic: Whether the reverse SDE or the probability-flow ODE is solved.
        x_start: Samples at the first noise level; N(0, sigmas[0]^2) by default.

    Returns:
        Samples of shape (n, *shape), after `steps` calls of the denoiser.

    Raises:
        ValueError: The grid is not decreasing.

    References:
        Lu et al. 2022 (DPM-Solver++, arXiv 2211.01095), algorithm 2 and its SDE form, with alpha =
        1.
    """
    x, grid, levels = _begin(
        sigmas, noise, shape, x_start, draws=len(sigmas) - 1 if stochastic else 1
    )
    previous: Tensor | None = None
    power = 2 if stochastic else 1
    for i, level in enumerate(levels[:-1]):
        estimate = denoise(x, level)
        if grid[i + 1] == 0:
            return estimate
        h = np.log(grid[i] / grid[i + 1])
        direction = estimate
        if previous is not None:
            h_previous = np.log(grid[i - 1] / grid[i])
            direction = torch.lerp(previous, estimate, float(1 + 0.5 * h / h_previous))
        weight = -np.expm1(-power * h)
        x = torch.lerp(x, direction, float(weight))
        if stochastic:
            x = x.add_(noise.normal(shape), alpha=float(grid[i + 1] * np.sqrt(weight)))
        previous = estimate
    return x


def heun(
    denoise: Denoise,
    *,
    sigmas: Tensor,
    noise: SampleNoise,
    shape: Sequence[int],
    x_start: Tensor | None = None,
) -> Tensor:
    """Sample by Heun's second-order steps of the probability-flow ODE (EDM).

        d = (x_t - f(x_t)) / sigma_t,   x' = x_t + (sigma_s - sigma_t) d,   d' = (x' - f(x')) /
        sigma_s x_s = x_t + (sigma_s - sigma_t) (d + d') / 2

    Arguments:
        denoise: The denoiser.
        sigmas: Decreasing noise levels of shape (steps + 1,), the last 0.
        noise: Source of the start; its samples are the batch.
        shape: Shape of one sample.
        x_start: Samples at the first noise level; N(0, sigmas[0]^2) by default.

    Returns:
        Samples of shape (n, *shape), after 2 steps - 1 calls of the denoiser (the step to 0 takes
        one).

    Raises:
        ValueError: The grid is not decreasing.

    References:
        Karras et al. 2022 (EDM, arXiv 2206.00364), algorithm 1.
    """
    x, grid, levels = _begin(sigmas, noise, shape, x_start, draws=1)
    for i, level in enumerate(levels[:-1]):
        slope = (x - denoise(x, level)) / level
        step = float(grid[i + 1] - grid[i])
        if grid[i + 1] == 0:
            return x + step * slope
        ahead = x + step * slope
        slope_ahead = (ahead - denoise(ahead, levels[i + 1])) / levels[i + 1]
        x = x + 0.5 * step * (slope + slope_ahead)
    return x


def predictor_corrector(
    denoise: Denoise,
    *,
    sigmas: Tensor,
    noise: SampleNoise,
    shape: Sequence[int],
    corrections: int = 1,
    tau: float = 0.1,
    x_start: Tensor | None = None,
) -> Tensor:
    """Sample by DDIM steps, each followed by Langevin steps at the noise level that it reached.

        corrector:  x_s <- x_s - tau (x_s - f(x_s)) + sigma_s sqrt(2 tau) z

    Arguments:
        denoise: The denoiser.
        sigmas: Decreasing noise levels of shape (steps + 1,), the last 0.
        noise: Source of the noise; its samples are the batch.
        shape: Shape of one sample.
        corrections: Langevin steps after each DDIM step but the last.
        tau: Size of a Langevin step, in (0, 1); its bias is of the order of tau.
        x_start: Samples at the first noise level; N(0, sigmas[0]^2) by default.

    Returns:
        Samples of shape (n, *shape), after steps + corrections (steps - 1) calls of the denoiser.

    Raises:
        ValueError: The grid is not decreasing, or a number is out of range.

    References:
        Song et al. 2021 (arXiv 2011.13456), appendix G; Rozet et al. 2024 (arXiv 2405.13712).
    """
    if corrections < 0 or not 0 < tau < 1:
        raise ValueError(
            f"predictor_corrector received {corrections} corrections with tau {tau}; give "
            "corrections >= 0 and tau in (0, 1)"
        )
    x, grid, levels = _begin(
        sigmas, noise, shape, x_start, draws=1 + corrections * (len(sigmas) - 2)
    )
    for i, level in enumerate(levels[:-1]):
        x = torch.lerp(x, denoise(x, level), float(1 - grid[i + 1] / grid[i]))
        if grid[i + 1] > 0:
            for _ in range(corrections):
                x = torch.lerp(x, denoise(x, levels[i + 1]), tau)
                x = x.add_(noise.normal(shape), alpha=float(grid[i + 1] * np.sqrt(2 * tau)))
    return x


def _begin(
    sigmas: Tensor,
    noise: SampleNoise,
    shape: Sequence[int],
    x_start: Tensor | None,
    *,
    draws: int,
) -> tuple[Tensor, NDArray[np.float64], tuple[Tensor, ...]]:
    grid = sigmas.double().cpu().numpy()
    if len(grid) < 2 or not (np.diff(grid) < 0).all() or grid[-1] < 0:
        raise ValueError(
            f"sampler received noise levels {grid.tolist()}; give at least two, strictly "
            "decreasing, the last >= 0"
        )
    noise.expect(draws)
    if x_start is None:
        x_start = noise.normal(shape) * float(grid[0])
    levels = sigmas.to(x_start.device, x_start.dtype).unsqueeze(1)
    return x_start, grid, levels.unbind(0)
