"""Sampler, start and posterior configs to the objects that they describe."""

from __future__ import annotations

import functools
import math
from typing import assert_never

import torch

from diffem_core.channel import Channel
from diffem_core.denoiser import Denoiser
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.grids import karras_grid, log_linear_grid
from diffem_core.mmps import MMPSPosterior
from diffem_core.posterior import DiffusionPosterior, DiffusionPrior, Posterior
from diffem_core.samplers import Sampler, ddim, ddpm, dpm_solver, heun, predictor_corrector
from diffem_core.scaling import Scaling
from storage_schemas import config as models

__all__ = [
    "build_grid",
    "build_posterior",
    "build_prior",
    "build_sampler",
    "build_scaling",
    "build_temperature",
    "cov_x_rank",
    "network_calls",
    "sampler_of",
]


def build_scaling(config: models.DataConfig) -> Scaling:
    """Build the change of units: `value_range` onto [-2, 2], or nothing."""
    if config.value_range is None:
        return Scaling.identity()
    return Scaling.from_range(*config.value_range)


def build_grid(config: models.SamplerConfig, schedule: models.ScheduleConfig) -> torch.Tensor:
    """Build the sampler's noise levels, shape (steps + 1,), decreasing."""
    high = config.sigma_start or schedule.sigma_max
    low = config.sigma_end or schedule.sigma_min
    match config.grid:
        case models.LogLinearGrid():
            return log_linear_grid(high, low, config.steps)
        case models.KarrasGrid():
            return karras_grid(high, low, config.steps, rho=config.grid.rho)
    assert_never(config.grid)


def build_sampler(config: models.SamplerConfig, schedule: models.ScheduleConfig) -> Sampler:
    """Build the sampler with its grid."""
    sigmas = build_grid(config, schedule)
    match config:
        case models.DdpmSampler():
            return functools.partial(ddpm, sigmas=sigmas)
        case models.DdimSampler():
            return functools.partial(ddim, sigmas=sigmas)
        case models.DpmSolverSampler():
            return functools.partial(dpm_solver, sigmas=sigmas, stochastic=config.stochastic)
        case models.HeunSampler():
            return functools.partial(heun, sigmas=sigmas)
        case models.PredictorCorrectorSampler():
            return functools.partial(
                predictor_corrector,
                sigmas=sigmas,
                corrections=config.corrections,
                tau=config.tau,
            )
    assert_never(config)


def network_calls(config: models.SamplerConfig) -> int:
    """Count a sampler's network calls per sample."""
    match config:
        case models.HeunSampler():
            return 2 * config.steps - 1
        case models.PredictorCorrectorSampler():
            return config.steps + config.corrections * (config.steps - 1)
        case _:
            return config.steps


def sampler_of(config: models.EStepConfig, iteration: int | None = None) -> models.SamplerConfig:
    """Return the sampler of an iteration's E-step, or that of evaluations.

    Arguments:
        config: The E-step's config.
        iteration: EM iteration; None for the sampler as it is stated, without annealing.
    """
    annealing = config.annealing
    if annealing is None or iteration is None or iteration >= annealing.iterations:
        return config.sampler
    rise = config.sampler.steps - annealing.first
    steps = annealing.first + round(rise * iteration / annealing.iterations)
    return config.sampler.model_copy(update={"steps": steps})


def build_temperature(config: models.EStepConfig, iteration: int) -> float:
    """Compute the factor on the noise of an iteration's E-step."""
    tempering = config.tempering
    if tempering is None:
        return 1.0
    progress = min(1.0, iteration / tempering.iterations)
    return tempering.first + (1 - tempering.first) * progress


def build_posterior(
    config: models.RunConfig,
    channel: Channel,
    denoiser: Denoiser,
    *,
    mmps: bool = False,
    covariance: GaussianPrior | None = None,
    iteration: int | None = None,
) -> Posterior:
    """Build the posterior that a denoiser has learned.

    Arguments:
        config: The run's config.
        channel: The channel.
        denoiser: The denoiser: conditional, or unconditional for MMPS.
        mmps: Whether it is sampled from by moment matching.
        covariance: Gaussian whose covariance MMPS takes, for `mmps.covariance: cov_x`.
        iteration: EM iteration whose E-step it is for; None for evaluations.
    """
    scaling = build_scaling(config.data)
    sampler = build_sampler(sampler_of(config.e_step, iteration), config.schedule)
    if not mmps:
        return DiffusionPosterior(denoiser, channel, scaling, sampler)
    return MMPSPosterior(
        denoiser,
        channel,
        scaling,
        sampler,
        covariance=covariance,
        iterations=config.mmps.solver_iterations,
        tolerance=config.mmps.tolerance,
    )


def cov_x_rank(config: models.RunConfig, channel: Channel) -> int:
    """Count the components of `cov_x`, the covariance that MMPS may take.

    Raises:
        ValueError: More components are asked for than a sample has entries.
    """
    size = math.prod(channel.x_shape)
    rank = config.mmps.rank or max(1, min(64, size // 4))
    if not 1 <= rank < size:
        raise ValueError(
            f"mmps.rank is {rank} but a sample has {size} entries; give 1 to {size - 1}"
        )
    return rank


def build_prior(
    config: models.RunConfig, channel: Channel, denoiser: Denoiser, *, conditional: bool
) -> DiffusionPrior:
    """Build the prior that a denoiser has learned, sampled from as evaluations are.

    Arguments:
        config: The run's config.
        channel: The channel, which says how large a condition is.
        denoiser: An unconditional denoiser, or one that was trained with dropped conditions.
        conditional: Which of both.
    """
    return DiffusionPrior(
        denoiser,
        build_scaling(config.data),
        build_sampler(sampler_of(config.e_step), config.schedule),
        x_shape=channel.x_shape,
        condition_channels=channel.condition_channels if conditional else 0,
    )
