"""What is measured after each iteration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from storage_schemas._base import Record

__all__ = [
    "DistanceConfig",
    "EvaluationConfig",
    "FrechetDistance",
    "SinkhornDistance",
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
