"""DiffEM's mathematics (arXiv 2510.12691): channels, denoisers, samplers, posteriors, EM steps.

    E-step:   x_hat_i ~ q_theta(x | y_i)                                   for every observation
    M-step:   theta <- argmin E lambda_t || f_theta(x_t, sigma_t, y_tilde) - x_hat_i ||^2
              y_tilde ~ Q(. | x_hat_i),      x_t = x_hat_i + sigma_t z

Public names are imported from their modules when they are first used, so that importing the
package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffem_core.augmentation import Augmentation
    from diffem_core.calibration import Calibration, calibration, hide_more, rank_positions
    from diffem_core.channel import Channel, RandomMask, RandomMatrix
    from diffem_core.classifier import DigitClassifier
    from diffem_core.classifier_test import area_under_curve, classifier_test
    from diffem_core.deepinv_channels import deepinv_channel
    from diffem_core.denoiser import Denoiser
    from diffem_core.diversity import (
        CollapseVerdict,
        collapse_verdict,
        draw_spread,
        nearest_neighbours,
        participation_ratio,
        uncovered_test,
    )
    from diffem_core.e_step import e_step, refreshed
    from diffem_core.em import EMIteration, em
    from diffem_core.feature_distance import PrincipalComponents, frechet_test
    from diffem_core.gaussian import (
        GaussianPosterior,
        GaussianPrior,
        fit_gaussian_prior,
        log_likelihood,
    )
    from diffem_core.gaussian_condition import GaussianMeanChannel, GaussianPosteriorChannel
    from diffem_core.grids import karras_grid, log_linear_grid
    from diffem_core.identifiability import FittedPrior, Identifiability, StandInPrior, identify
    from diffem_core.linear_solvers import conjugate_gradients
    from diffem_core.m_step import MStepResult, denoising_loss, m_step
    from diffem_core.measurement import Measurement
    from diffem_core.metrics import (
        frechet_distance,
        masked_rmse,
        psnr,
        rmse,
        sinkhorn_divergence,
        sliced_image_distance,
        sliced_wasserstein,
    )
    from diffem_core.mmps import MMPSPosterior, mmps_denoise
    from diffem_core.monitors import (
        ObservationDivergence,
        observation_divergence,
        observation_features,
    )
    from diffem_core.networks import MLP, SinusoidalEmbedding, UNet
    from diffem_core.networks.diffusers_unet import DiffusersUNet
    from diffem_core.noise import SampleNoise
    from diffem_core.observed_operators import with_observed_operators
    from diffem_core.physics_channels import (
        PhysicsChannel,
        accelerated_mri,
        compressed_sensing,
        denoising,
        gaussian_blur,
        jpeg,
        poisson,
        quantization,
        super_resolution,
    )
    from diffem_core.posterior import DiffusionPosterior, DiffusionPrior, Posterior, PseudoInverse
    from diffem_core.preconditioning import (
        EDMPreconditioning,
        FactorPreconditioning,
        MomentsPreconditioning,
        Preconditioning,
    )
    from diffem_core.rates import constant_rate, cosine_rate, linear_rate
    from diffem_core.residuals import predictive_test, residual_test
    from diffem_core.samplers import (
        Denoise,
        Sampler,
        ddim,
        ddpm,
        dpm_solver,
        heun,
        predictor_corrector,
    )
    from diffem_core.scaling import Scaling
    from diffem_core.schedule import Schedule, VEKarras, VELogLinear
    from diffem_core.seeds import derive_seed, seeded_initialization
    from diffem_core.stopping import BudgetRule, Decision, FloorRule, PlateauRule, Point, decide
    from diffem_core.times import (
        BetaMixtureTime,
        BetaTime,
        LogNormalTime,
        TimeDistribution,
        UniformTime,
    )
    from diffem_core.training import TrainingState
    from diffem_core.two_sample import energy_test, mmd_test
    from diffem_core.validation import Validation

_MODULES = {
    "calibration": (
        "Calibration",
        "calibration",
        "hide_more",
        "rank_positions",
    ),
    "classifier_test": (
        "area_under_curve",
        "classifier_test",
    ),
    "diversity": (
        "CollapseVerdict",
        "collapse_verdict",
        "draw_spread",
        "nearest_neighbours",
        "participation_ratio",
        "uncovered_test",
    ),
    "feature_distance": (
        "PrincipalComponents",
        "frechet_test",
    ),
    "measurement": ("Measurement",),
    "residuals": (
        "predictive_test",
        "residual_test",
    ),
    "stopping": (
        "BudgetRule",
        "Decision",
        "FloorRule",
        "PlateauRule",
        "Point",
        "decide",
    ),
    "two_sample": (
        "energy_test",
        "mmd_test",
    ),
    "physics_channels": (
        "PhysicsChannel",
        "accelerated_mri",
        "compressed_sensing",
        "denoising",
        "gaussian_blur",
        "jpeg",
        "poisson",
        "quantization",
        "super_resolution",
    ),
    "em": (
        "EMIteration",
        "em",
    ),
    "augmentation": ("Augmentation",),
    "channel": ("Channel", "RandomMask", "RandomMatrix"),
    "classifier": ("DigitClassifier",),
    "deepinv_channels": ("deepinv_channel",),
    "denoiser": ("Denoiser",),
    "e_step": ("e_step", "refreshed"),
    "gaussian": ("GaussianPosterior", "GaussianPrior", "fit_gaussian_prior", "log_likelihood"),
    "gaussian_condition": ("GaussianMeanChannel", "GaussianPosteriorChannel"),
    "grids": ("karras_grid", "log_linear_grid"),
    "identifiability": ("FittedPrior", "Identifiability", "StandInPrior", "identify"),
    "linear_solvers": ("conjugate_gradients",),
    "m_step": ("MStepResult", "denoising_loss", "m_step"),
    "metrics": (
        "frechet_distance",
        "masked_rmse",
        "psnr",
        "rmse",
        "sinkhorn_divergence",
        "sliced_image_distance",
        "sliced_wasserstein",
    ),
    "mmps": ("MMPSPosterior", "mmps_denoise"),
    "monitors": ("ObservationDivergence", "observation_divergence", "observation_features"),
    "networks": ("MLP", "SinusoidalEmbedding", "UNet"),
    "networks.diffusers_unet": ("DiffusersUNet",),
    "noise": ("SampleNoise",),
    "observed_operators": ("with_observed_operators",),
    "posterior": ("DiffusionPosterior", "DiffusionPrior", "Posterior", "PseudoInverse"),
    "preconditioning": (
        "EDMPreconditioning",
        "FactorPreconditioning",
        "MomentsPreconditioning",
        "Preconditioning",
    ),
    "rates": ("constant_rate", "cosine_rate", "linear_rate"),
    "samplers": (
        "Denoise",
        "Sampler",
        "ddim",
        "ddpm",
        "dpm_solver",
        "heun",
        "predictor_corrector",
    ),
    "scaling": ("Scaling",),
    "schedule": ("Schedule", "VEKarras", "VELogLinear"),
    "seeds": ("derive_seed", "seeded_initialization"),
    "times": ("BetaMixtureTime", "BetaTime", "LogNormalTime", "TimeDistribution", "UniformTime"),
    "training": ("TrainingState",),
    "validation": ("Validation",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MLP",
    "Augmentation",
    "BetaMixtureTime",
    "BetaTime",
    "BudgetRule",
    "Calibration",
    "Channel",
    "CollapseVerdict",
    "Decision",
    "Denoise",
    "Denoiser",
    "DiffusersUNet",
    "DiffusionPosterior",
    "DiffusionPrior",
    "DigitClassifier",
    "EDMPreconditioning",
    "EMIteration",
    "FactorPreconditioning",
    "FittedPrior",
    "FloorRule",
    "GaussianMeanChannel",
    "GaussianPosterior",
    "GaussianPosteriorChannel",
    "GaussianPrior",
    "Identifiability",
    "LogNormalTime",
    "MMPSPosterior",
    "MStepResult",
    "Measurement",
    "MomentsPreconditioning",
    "ObservationDivergence",
    "PhysicsChannel",
    "PlateauRule",
    "Point",
    "Posterior",
    "Preconditioning",
    "PrincipalComponents",
    "PseudoInverse",
    "RandomMask",
    "RandomMatrix",
    "SampleNoise",
    "Sampler",
    "Scaling",
    "Schedule",
    "SinusoidalEmbedding",
    "StandInPrior",
    "TimeDistribution",
    "TrainingState",
    "UNet",
    "UniformTime",
    "VEKarras",
    "VELogLinear",
    "Validation",
    "accelerated_mri",
    "area_under_curve",
    "calibration",
    "classifier_test",
    "collapse_verdict",
    "compressed_sensing",
    "conjugate_gradients",
    "constant_rate",
    "cosine_rate",
    "ddim",
    "ddpm",
    "decide",
    "deepinv_channel",
    "denoising",
    "denoising_loss",
    "derive_seed",
    "dpm_solver",
    "draw_spread",
    "e_step",
    "em",
    "energy_test",
    "fit_gaussian_prior",
    "frechet_distance",
    "frechet_test",
    "gaussian_blur",
    "heun",
    "hide_more",
    "identify",
    "jpeg",
    "karras_grid",
    "linear_rate",
    "log_likelihood",
    "log_linear_grid",
    "m_step",
    "masked_rmse",
    "mmd_test",
    "mmps_denoise",
    "nearest_neighbours",
    "observation_divergence",
    "observation_features",
    "participation_ratio",
    "poisson",
    "predictive_test",
    "predictor_corrector",
    "psnr",
    "quantization",
    "rank_positions",
    "refreshed",
    "residual_test",
    "rmse",
    "seeded_initialization",
    "sinkhorn_divergence",
    "sliced_image_distance",
    "sliced_wasserstein",
    "super_resolution",
    "uncovered_test",
    "with_observed_operators",
]


class _Package(ModuleType):
    """This package, in which `e_step` and `m_step` are the functions.

    Importing the module of the same name would bind the name to the module, so that what
    `diffem_core.e_step` means would depend on what was imported before.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
