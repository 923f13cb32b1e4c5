"""Solvers of the reverse process and their grids of noise levels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from storage_schemas._base import NoiseLevel, Record, Steps

__all__ = [
    "DdimSampler",
    "DdpmSampler",
    "DpmSolverSampler",
    "GridConfig",
    "HeunSampler",
    "KarrasGrid",
    "LogLinearGrid",
    "PredictorCorrectorSampler",
    "SamplerConfig",
]


class LogLinearGrid(Record):
    """Noise levels evenly spaced in log sigma: uniform steps in t (paper)."""

    kind: Literal["log_linear"] = "log_linear"


class KarrasGrid(Record):
    """Noise levels evenly spaced in sigma^(1/rho) (EDM, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: float = Field(7.0, ge=0.1, le=1000)
    """Warping exponent: larger puts more steps at small noise."""


GridConfig = Annotated[LogLinearGrid | KarrasGrid, Field(discriminator="kind")]


class _Sampler(Record):
    steps: Steps
    """Noise levels that the sampler visits."""
    grid: GridConfig = LogLinearGrid()
    """Where the steps lie between the two ends of the noise range."""
    sigma_start: NoiseLevel | None = None
    """Noise level of the first step, in network units; the schedule's largest by default."""
    sigma_end: NoiseLevel | None = None
    """Noise level of the last network call, in network units; the smallest by default."""


class DdpmSampler(_Sampler):
    """Ancestral sampling (DDPM), the paper's sampler with 256 steps."""

    kind: Literal["ddpm"] = "ddpm"
    steps: Steps = 256
    """Network calls per sample."""


class DdimSampler(_Sampler):
    """Deterministic first-order sampling (DDIM, eta = 0)."""

    kind: Literal["ddim"] = "ddim"
    steps: Steps = 64
    """Network calls per sample."""


class DpmSolverSampler(_Sampler):
    """Second-order multistep solver of the reverse SDE or ODE in log sigma (DPM-Solver++(2M))."""

    kind: Literal["dpm_solver"] = "dpm_solver"
    steps: Steps = 16
    """Network calls per sample."""
    stochastic: bool = True
    """Solve the reverse SDE (true) or the probability-flow ODE (false)."""


class HeunSampler(_Sampler):
    """Heun's second-order steps of the probability-flow ODE (EDM, algorithm 1)."""

    kind: Literal["heun"] = "heun"
    steps: Steps = 18
    """Noise levels that the sampler visits; all but the last take two network calls."""
    grid: GridConfig = KarrasGrid()
    """Where the steps lie between the two ends of the noise range."""


class PredictorCorrectorSampler(_Sampler):
    """DDIM steps, each followed by Langevin steps at the noise level that it reached."""

    kind: Literal["predictor_corrector"] = "predictor_corrector"
    steps: Steps = 64
    """Noise levels that the sampler visits; all but the last take 1 + corrections calls."""
    corrections: Steps = 1
    """Langevin steps after each step."""
    tau: float = Field(0.1, gt=0, lt=1)
    """Size of a Langevin step; its bias is of the order of tau."""


SamplerConfig = Annotated[
    DdpmSampler | DdimSampler | DpmSolverSampler | HeunSampler | PredictorCorrectorSampler,
    Field(discriminator="kind"),
]
