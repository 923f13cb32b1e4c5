"""Config to core objects: one function per object, the only road to the mathematics."""

from __future__ import annotations

from pipelines.build.channel import (
    build_channel,
    build_conditioning_channel,
    build_recorrupting_channel,
    resamples_operators,
    stand_in_prior,
)
from pipelines.build.features import build_lpips, build_set_features, check_set_metrics
from pipelines.build.model import build_denoiser, build_schedule, build_times
from pipelines.build.monitors import build_features, build_stop_rule, check_monitors
from pipelines.build.sampling import (
    build_grid,
    build_posterior,
    build_prior,
    build_sampler,
    build_scaling,
    build_temperature,
    cov_x_rank,
    network_calls,
    sampler_of,
)
from pipelines.build.training import (
    build_augmentation,
    build_device,
    build_learning_rate,
    build_rate,
    build_validation,
    m_step_length,
    repeatable,
    starts_anew,
)

__all__ = [
    "build_augmentation",
    "build_channel",
    "build_conditioning_channel",
    "build_denoiser",
    "build_device",
    "build_features",
    "build_grid",
    "build_learning_rate",
    "build_lpips",
    "build_posterior",
    "build_prior",
    "build_rate",
    "build_recorrupting_channel",
    "build_sampler",
    "build_scaling",
    "build_schedule",
    "build_set_features",
    "build_stop_rule",
    "build_temperature",
    "build_times",
    "build_validation",
    "check_monitors",
    "check_set_metrics",
    "cov_x_rank",
    "m_step_length",
    "network_calls",
    "repeatable",
    "resamples_operators",
    "sampler_of",
    "stand_in_prior",
    "starts_anew",
]
