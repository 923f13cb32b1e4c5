"""What is measured after each iteration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, PositiveFloat, PositiveInt, field_validator

from storage_schemas._base import Count, Record
from storage_schemas.config.metrics import MetricConfig
from storage_schemas.metrics import CARRIED

__all__ = [
    "ClassifierMonitor",
    "DistanceConfig",
    "DiversityMonitor",
    "EnergyMonitor",
    "EvaluationConfig",
    "FrechetDistance",
    "FrechetMonitor",
    "HiddenRanksMonitor",
    "MmdMonitor",
    "MonitorConfig",
    "PredictiveMonitor",
    "ResidualMonitor",
    "SinkhornDistance",
    "SlicedMonitor",
    "SlicedWassersteinDistance",
]


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


class SlicedWassersteinDistance(Record):
    """Sliced Wasserstein distance of images and of their texture; needs no labels."""

    kind: Literal["sliced_wasserstein"] = "sliced_wasserstein"
    projections: PositiveInt = 128
    """Random directions for whole images, and as many random filters for their texture."""
    texture: float = Field(0.75, ge=0, le=1)
    """Weight of the responses to random filters of 3 x 3 pixels, which tell blurred images from
    sharp ones, against that of whole images; 0 looks at whole images alone. Vectors have none."""


DistanceConfig = Annotated[
    FrechetDistance | SinkhornDistance | SlicedWassersteinDistance, Field(discriminator="kind")
]


class SlicedMonitor(Record):
    """Sliced 2-Wasserstein distance between observations: means, variances, whole images."""

    kind: Literal["sliced_wasserstein"] = "sliced_wasserstein"
    projections: Count = 256
    """Random directions."""


class EnergyMonitor(Record):
    """Energy distance between observations, with a permutation test: where they lie, mostly."""

    kind: Literal["energy"] = "energy"
    samples: int = Field(1024, ge=16, le=8192)
    """Observations of each side, at most; the work grows with the square."""
    permutations: int = Field(199, ge=19, le=10**5)
    """Permutations; no p-value is less than 1 / (permutations + 1)."""


class MmdMonitor(Record):
    """Squared maximum mean discrepancy, Gaussian kernel, with a permutation test."""

    kind: Literal["mmd"] = "mmd"
    bandwidth: PositiveFloat = 1.0
    """Width of the kernel, in medians of the distances between observations."""
    samples: int = Field(1024, ge=16, le=8192)
    """Observations of each side, at most; the work grows with the square."""
    permutations: int = Field(199, ge=19, le=10**5)
    """Permutations; no p-value is less than 1 / (permutations + 1)."""


class ClassifierMonitor(Record):
    """Area under the ROC curve of a classifier that tells corrupted reconstructions from data."""

    kind: Literal["classifier"] = "classifier"
    model: Literal["logistic", "mlp"] = "logistic"
    """`logistic` sees means and variances of principal components and is quick; `mlp` sees more,
    and takes seconds."""
    components: int = Field(32, ge=1, le=1024)
    """Principal components that it works on, at most."""
    samples: int = Field(2048, ge=80, le=10**6)
    """Observations of each side, at most."""


class FrechetMonitor(Record):
    """Fréchet distance between observations in features ('proximal FID'), with a test."""

    kind: Literal["frechet"] = "frechet"
    components: int = Field(16, ge=1, le=1024)
    """Principal components of other real observations, which are the features."""
    features: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """A class of one's own instead, as `package.module:Name`. An object of it is called with what
    the network sees of n observations (images of the bands of x, or vectors; float32) and returns
    n rows of features."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of that class."""
    permutations: int = Field(199, ge=19, le=10**5)
    """Permutations; no p-value is less than 1 / (permutations + 1)."""


class ResidualMonitor(Record):
    """Mean of |y - A x_hat|^2 over the noise's, held out: 1 if it is right. Gaussian channels."""

    kind: Literal["residual"] = "residual"


class DiversityMonitor(Record):
    """Whether reconstructions are as diverse as the data, with a warning of a collapse."""

    kind: Literal["diversity"] = "diversity"
    references: int = Field(256, ge=20, le=10**5)
    """Reconstructions, at most, that observations are explained by."""
    observations: int = Field(128, ge=20, le=10**5)
    """Observations of each side, at most, that are explained: held-out ones, and other
    reconstructions, corrupted. The operator is applied 2 x references x observations times."""


class PredictiveMonitor(Record):
    """How often y is farther from A x_hat than what x_hat would be observed as: 1/2 is right."""

    kind: Literal["predictive"] = "predictive"


class HiddenRanksMonitor(Record):
    """Calibration without truth: ranks of observed pixels that are hidden from the network.

    Draws more posterior samples. For channels that select pixels.
    """

    kind: Literal["hidden_ranks"] = "hidden_ranks"
    draws: int = Field(4, ge=1, le=1000)
    """Posterior samples of each observation."""
    fraction: float = Field(0.1, gt=0, lt=1)
    """Seen pixels that are hidden; few, so that the network sees what it was trained for."""
    samples: Count = 256
    """Held-out observations, at most."""


MonitorConfig = Annotated[
    SlicedMonitor
    | EnergyMonitor
    | MmdMonitor
    | ClassifierMonitor
    | FrechetMonitor
    | ResidualMonitor
    | DiversityMonitor
    | PredictiveMonitor
    | HiddenRanksMonitor,
    Field(discriminator="kind"),
]

_MONITORS: tuple[MonitorConfig, ...] = (
    SlicedMonitor(),
    EnergyMonitor(),
    ClassifierMonitor(),
    FrechetMonitor(),
    ResidualMonitor(),
    PredictiveMonitor(),
    DiversityMonitor(),
)


# Names of what is measured in any case or by a monitor.
_TAKEN = frozenset(
    [
        "accuracy",
        "classifier",
        "collapse",
        "coverage",
        "coverage_50",
        "coverage_90",
        "density",
        "distance",
        "divergence",
        "draw_variance",
        "duplicates",
        "energy",
        "frechet",
        "hidden_ranks",
        "hidden_rmse_mean",
        "hidden_rmse_sample",
        "mmd",
        "nearest",
        "participation",
        "precision",
        "predictive",
        "psnr_mean",
        "psnr_sample",
        "ranks",
        "recall",
        "residual",
        "rmse_mean",
        "rmse_sample",
        "sliced_wasserstein",
        "spread_ratio",
        "uncovered",
    ]
)


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
    monitors: tuple[MonitorConfig, ...] = _MONITORS
    """What is measured without clean samples, beside the divergence; each kind once. The cheap
    ones by default."""
    metrics: tuple[MetricConfig, ...] = ()
    """What more is measured against clean samples, where they are known; nothing by default. What
    cannot be measured (without weights, of too few samples) is left out with the reason."""

    @field_validator("monitors")
    @classmethod
    def _each_once(cls, monitors: tuple[MonitorConfig, ...]) -> tuple[MonitorConfig, ...]:
        kinds = [monitor.kind for monitor in monitors]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(
                f"evaluation.monitors holds {', '.join(twice)} more than once; give each kind once"
            )
        return monitors

    @field_validator("metrics")
    @classmethod
    def _each_name_once(cls, metrics: tuple[MetricConfig, ...]) -> tuple[MetricConfig, ...]:
        names = [str(getattr(metric, "name", metric.kind)) for metric in metrics]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"evaluation.metrics holds {', '.join(twice)} more than once; give another name"
            )
        for name in names:
            if name in _TAKEN or name.endswith(CARRIED):
                raise ValueError(
                    f"evaluation.metrics holds the name {name!r}, which something else has or "
                    "belongs to something else; give another name"
                )
        return metrics
