"""What more is measured against clean samples, where they are known: `evaluation.metrics`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, PositiveFloat

from storage_schemas._base import Count, Record

__all__ = [
    "EnergyMetric",
    "FeatureMetric",
    "FidMetric",
    "InceptionScoreMetric",
    "KidMetric",
    "LpipsMetric",
    "MetricConfig",
    "MsSsimMetric",
    "NeighboursMetric",
    "SinkhornMetric",
    "SsimMetric",
]

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")]
"""What a metric is called; its kind by default."""


class SsimMetric(Record):
    """Structural similarity of posterior samples, and of their mean, to the clean image."""

    kind: Literal["ssim"] = "ssim"


class MsSsimMetric(Record):
    """The same at five scales; for images of more than 176 pixels."""

    kind: Literal["ms_ssim"] = "ms_ssim"


class LpipsMetric(Record):
    """Learned perceptual distance of posterior samples, and of their mean, to the clean image."""

    kind: Literal["lpips"] = "lpips"
    network: Literal["alex", "vgg", "squeeze"] = "alex"
    """The network behind it."""
    weights: str | None = None
    """A local file with torchvision's weights of that network: alexnet, vgg16 or squeezenet1_1."""


class _AgainstClean(Record):
    reference: Literal["others", "all"] = "others"
    """Clean samples that reconstructions are compared with. `others` are those of other
    observations, beside which a floor is known; `all` are those of the whole training split, as
    papers take them, so that a reconstruction may profit from the image that it restores."""


class FeatureMetric(_AgainstClean):
    """A metric of features."""

    features: str = Field(
        "components",
        pattern=r"^(components|classifier|inception|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
    )
    """What the features are. `components`: principal components of the clean samples, of unit
    variance. `classifier`: the last layer of a small classifier of the clean images. `inception`:
    Inception v3 with the usual weights. A class of one's own, as `package.module:Name`: an object
    of it is called with n images in [0, 1] (or n vectors, in network units; float32) and returns n
    rows."""
    components: int = Field(32, ge=1, le=1024)
    """Principal components, at most."""
    weights: str | None = None
    """A local file with the weights of `inception`: pt_inception-2015-12-05-6726825d.pth, which
    torch-fidelity publishes."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of that class."""


class FidMetric(FeatureMetric):
    """Fréchet distance between features of reconstructions and of clean samples."""

    kind: Literal["fid"] = "fid"
    name: Name = "fid"
    """What it is called, such as `fd_dinov2`."""


class KidMetric(FeatureMetric):
    """Kernel distance between the same, unbiased whatever the number of samples."""

    kind: Literal["kid"] = "kid"
    name: Name = "kid"
    """What it is called."""
    subsets: int = Field(100, ge=1, le=10**4)
    """Subsets that it is the mean of."""
    subset_size: int = Field(1000, ge=2, le=10**5)
    """Samples of each side in a subset, at most."""


class InceptionScoreMetric(Record):
    """How sure a classifier is of reconstructions, and of how many classes."""

    kind: Literal["inception_score"] = "inception_score"
    name: Name = "inception_score"
    """What it is called."""
    features: str = Field(
        "inception", pattern=r"^(classifier|inception|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"
    )
    """Whose logits: of Inception v3, of a small classifier of the clean images, or of a class of
    one's own (see `fid`), whose rows are logits."""
    weights: str | None = None
    """A local file with the weights of `inception`."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of that class."""
    splits: int = Field(10, ge=1, le=1000)
    """Parts that it is the mean of."""


class NeighboursMetric(FeatureMetric):
    """Precision, recall, density and coverage of reconstructions, by nearest neighbours."""

    kind: Literal["neighbours"] = "neighbours"
    name: Name = "neighbours"
    """With another name than this one, the four are called `NAME_precision` and so on."""
    neighbours: int = Field(5, ge=1, le=1000)
    """Which nearest neighbour ends a ball."""
    samples: Count = 10_000
    """Samples of each side, at most; the work grows with the square."""


class SinkhornMetric(_AgainstClean):
    """Debiased entropic transport cost to clean samples, in squared data units."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    name: Name = "truth_sinkhorn"
    """What it is called."""
    regularization: PositiveFloat = 1e-3
    """Entropic regularization, in squared data units."""
    samples: int = Field(2048, ge=2, le=16384)
    """Samples of each side, at most."""


class EnergyMetric(_AgainstClean):
    """Energy distance to clean samples, in network units, with a permutation test."""

    kind: Literal["energy"] = "energy"
    name: Name = "truth_energy"
    """What it is called."""
    samples: int = Field(1024, ge=16, le=8192)
    """Samples of each side, at most; the work grows with the square."""
    permutations: int = Field(199, ge=19, le=10**5)
    """Permutations; no p-value is less than 1 / (permutations + 1)."""


MetricConfig = Annotated[
    SsimMetric
    | MsSsimMetric
    | LpipsMetric
    | FidMetric
    | KidMetric
    | InceptionScoreMetric
    | NeighboursMetric
    | SinkhornMetric
    | EnergyMetric,
    Field(discriminator="kind"),
]
