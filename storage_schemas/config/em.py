"""The stages of EM: start, E-step, M-step, and the prior at the end."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from storage_schemas._base import Count, Record, Steps
from storage_schemas.config.sampler import DdpmSampler, SamplerConfig
from storage_schemas.redaction import secret_part

__all__ = [
    "AnnealingConfig",
    "AugmentationConfig",
    "ConstantRate",
    "CosineRate",
    "EStepConfig",
    "GaussianStart",
    "JointPrior",
    "LinearRate",
    "MMPSConfig",
    "MMPSStart",
    "MStepConfig",
    "ModelStart",
    "PriorConfig",
    "PseudoInverseStart",
    "RateConfig",
    "StartConfig",
    "TemperingConfig",
    "UnconditionalPrior",
    "ValidationConfig",
]

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""


class GaussianStart(Record):
    """First E-step: exact posterior samples under a Gaussian prior that EM fits to the data."""

    kind: Literal["gaussian"] = "gaussian"
    iterations: Steps = 16
    """Rounds of moment EM."""
    rank: PositiveInt | None = None
    """Rank of the low-rank + diagonal covariance; the full covariance by default."""
    samples: Count = 16384
    """Observations, at most, that it is fitted to, spread evenly over the data."""


class PseudoInverseStart(Record):
    """First reconstructions: A_dagger y; y itself where a non-linear channel keeps the shape."""

    kind: Literal["pseudo_inverse"] = "pseudo_inverse"


class MMPSStart(Record):
    """A warm start: the first iterations are EM-MMPS, begun from a Gaussian start."""

    kind: Literal["mmps"] = "mmps"
    laps: Steps = 4
    """EM iterations that are EM-MMPS, among the run's `iterations`."""
    gaussian: GaussianStart = GaussianStart()
    """What makes the first reconstructions of all."""


class ModelStart(Record):
    """A model that exists: its posterior makes the first reconstructions, its weights go on."""

    kind: Literal["model"] = "model"
    url: str = Field(min_length=1)
    """Path or fsspec URL of a `model.safetensors` of the same network and channel."""

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str:
        found = secret_part(value)
        if found is not None:
            raise ValueError(
                f"start.url holds {found}, but URLs are shown and stored; leave it out, and give "
                "credentials in the environment"
            )
        return value


StartConfig = Annotated[
    GaussianStart | PseudoInverseStart | MMPSStart | ModelStart, Field(discriminator="kind")
]


class MMPSConfig(Record):
    """Moment-matching posterior sampling (Rozet et al. 2024): the E-step of EM-MMPS."""

    covariance: Literal["tweedie", "cov_x"] = "tweedie"
    """Covariance of x given x_t: Tweedie's (the denoiser's Jacobian), or the one that follows
    from the covariance of the reconstructions that the model learned from (cheaper, coarser)."""
    rank: PositiveInt | None = None
    """Components of `cov_x`; a quarter of the dimensions, at most 64, by default."""
    solver_iterations: Steps = 1
    """Iterations of conjugate gradients per step."""
    tolerance: float = Field(1e-3, ge=0)
    """Their relative tolerance."""


class TemperingConfig(Record):
    """Less noise in the first E-steps, rising linearly to the sampler's own.

    A network that has just begun to learn blurs, and draws that are too spread; learning from
    them, the recursion carries the excess on. Drawing closer to the mean at first makes up for it.
    """

    first: float = Field(0.6, gt=0, le=1)
    """Factor on the noise in iteration 0."""
    iterations: Steps = 10
    """Iterations until the factor is 1."""


class AnnealingConfig(Record):
    """Fewer sampler steps in the first E-steps, rising linearly to the sampler's own number."""

    first: Steps
    """Sampler steps in iteration 0."""
    iterations: Steps = 10
    """Iterations until the number is the sampler's own."""


class EStepConfig(Record):
    """How reconstructions are drawn."""

    sampler: SamplerConfig = DdpmSampler()
    """Solver of the reverse process."""
    tempering: TemperingConfig | None = None
    """Less noise in the first E-steps (none in the paper). Evaluations never use it."""
    annealing: AnnealingConfig | None = None
    """Fewer sampler steps in the first E-steps. Evaluations never use it."""
    refresh: float = Field(1.0, gt=0, le=1)
    """Fraction of the reconstructions that each E-step draws anew (all in the paper); the others
    are those of the iteration before. Every observation has its turn at even intervals."""
    shard_size: Count = 512
    """Observations per shard: the unit of work, of retrying and of storage (one object)."""
    batch_size: Count = 256
    """Observations per network call."""
    stored_as: Literal["float32", "float16"] = "float32"
    """Type of the stored reconstructions, which the M-step learns from; float16 halves them."""


LearningRate = Annotated[float, Field(gt=0, le=1e3)]
"""A learning rate."""


class ConstantRate(Record):
    """The same learning rate at every step."""

    kind: Literal["constant"] = "constant"
    value: LearningRate = 2e-4
    """Learning rate."""
    over: Literal["iteration"] = "iteration"
    """Span of the schedule."""


class _DecayingRate(Record):
    value: LearningRate = 2e-4
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


class AugmentationConfig(Record):
    """Random changes of reconstructions before they are corrupted: flips, hue, saturation."""

    flip: bool = True
    """Mirror images left to right, each with probability 1/2."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Largest turn of the hue, in full circles; the paper takes 0.01."""
    saturation: tuple[NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0)
    """Smallest and largest factor on the saturation; the paper takes (0.95, 1.05)."""


class ValidationConfig(Record):
    """A loss on reconstructions that never take part in a gradient step."""

    fraction: float = Field(0.05, gt=0, lt=1)
    """Fraction of the training observations whose reconstructions are kept out of M-steps."""
    every: PositiveInt = 100
    """Gradient steps between two looks."""
    patience: PositiveInt | None = None
    """Looks without a new lowest loss after which the M-step ends; never by default."""


class MStepConfig(Record):
    """How the model is refined on the reconstructions."""

    steps: Count
    """Gradient steps per iteration."""
    first_steps: Count | None = None
    """Gradient steps of the first iteration, which starts from scratch; `steps` by default."""
    batch_size: Count = 256
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
    augmentation: AugmentationConfig | None = None
    """Random changes of the reconstructions before they are corrupted; none by default."""
    validation: ValidationConfig | None = None
    """A loss on reconstructions that are kept out of the M-step; none by default."""
    checkpoint_seconds: PositiveFloat = 30.0
    """Seconds between checkpoints inside the M-step. Changes no number."""


class UnconditionalPrior(Record):
    """An unconditional model, trained on the last iteration's reconstructions (paper)."""

    kind: Literal["unconditional"] = "unconditional"
    steps: Count
    """Gradient steps."""
    batch_size: Count = 256
    """Reconstructions per gradient step."""
    learning_rate: RateConfig = ConstantRate()
    """Learning rate of Adam and its course; it spans this training alone."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the weights' moving average."""
    samples: Count = 1024
    """Samples that are drawn to judge it."""


class JointPrior(Record):
    """The model itself, which learns the prior in every M-step by dropping its condition."""

    kind: Literal["joint"] = "joint"
    probability: float = Field(0.1, gt=0, lt=1)
    """Probability that an example's condition is dropped."""
    samples: Count = 1024
    """Samples that are drawn to judge it."""


PriorConfig = Annotated[UnconditionalPrior | JointPrior, Field(discriminator="kind")]
