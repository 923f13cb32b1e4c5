"""The corruption Q(y | x)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, NonNegativeFloat, PositiveFloat, PositiveInt

from storage_schemas._base import Record

__all__ = [
    "ChannelConfig",
    "CompressedSensingChannel",
    "CustomChannel",
    "DeepinvChannel",
    "DeepinvPart",
    "DenoisingChannel",
    "GaussianBlurChannel",
    "JpegChannel",
    "MriChannel",
    "Operators",
    "PoissonChannel",
    "QuantizationChannel",
    "RandomMaskChannel",
    "RandomMatrixChannel",
    "SuperResolutionChannel",
    "Target",
]

Operators = Literal["drawn", "observed"]
"""Where the operators of the M-step come from: the channel's own generator, or those of the
training observations, resampled."""

Target = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
"""A class or function of yours, as `package.module:Name`."""


class _WithOperators(Record):
    operators: Operators = "drawn"
    """Operators of the M-step: drawn afresh, or resampled from those of the observations."""


class RandomMaskChannel(_WithOperators):
    """Inpainting: each pixel (all bands together) is seen with a probability, under noise."""

    kind: Literal["random_mask"] = "random_mask"
    keep: float = Field(gt=0, le=1)
    """Probability that a pixel is seen, in (0, 1]."""
    noise_std: NonNegativeFloat
    """Standard deviation of the noise on seen pixels, in the data's own units."""


class RandomMatrixChannel(_WithOperators):
    """Compressive sensing of vectors: per sample a dense matrix with rows on the unit sphere."""

    kind: Literal["random_matrix"] = "random_matrix"
    rows: PositiveInt = 2
    """Measurements per sample."""
    noise_std: NonNegativeFloat = 1e-2
    """Standard deviation of the noise on each measurement, in the data's own units."""


class DenoisingChannel(Record):
    """Images under additive Gaussian noise."""

    kind: Literal["denoising"] = "denoising"
    noise_std: PositiveFloat
    """Standard deviation of the noise, in the data's own units."""


class SuperResolutionChannel(_WithOperators):
    """Images averaged over square blocks of pixels, under Gaussian noise."""

    kind: Literal["super_resolution"] = "super_resolution"
    factor: int = Field(2, ge=2)
    """Side of a block; it divides height and width."""
    noise_std: NonNegativeFloat
    """Standard deviation of the noise, in the data's own units."""
    shifts: bool = True
    """Whether each sample's blocks are shifted by whole pixels, as by an instrument that moves.
    What fixed blocks hide is hidden in every sample, and cannot be learned."""


class GaussianBlurChannel(_WithOperators):
    """Images blurred by a Gaussian (around the edges), under Gaussian noise."""

    kind: Literal["gaussian_blur"] = "gaussian_blur"
    sigma: PositiveFloat | tuple[PositiveFloat, PositiveFloat]
    """Standard deviation of the blur, in pixels: one for all, or the ends of the interval from
    which each sample's is drawn. Detail that every blur hides in noise cannot be learned."""
    noise_std: NonNegativeFloat
    """Standard deviation of the noise, in the data's own units."""


class CompressedSensingChannel(_WithOperators):
    """Random projections of images, under Gaussian noise."""

    kind: Literal["compressed_sensing"] = "compressed_sensing"
    measurements: PositiveInt
    """Projections per sample."""
    noise_std: NonNegativeFloat
    """Standard deviation of the noise on each projection, in the data's own units."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the projections, which belong to the instrument and not to the run."""
    fixed: bool = False
    """Whether all samples share their projections; by default each takes a random subset of the
    coefficients in one random basis. What fixed ones hide cannot be learned."""


class MriChannel(_WithOperators):
    """Accelerated single-coil MRI: random columns of k-space, complex images as two bands."""

    kind: Literal["mri"] = "mri"
    acceleration: float = Field(ge=1)
    """Columns per measured column, on average."""
    center: float = Field(0.08, ge=0, lt=1)
    """Fraction of the columns, around zero frequency, that are always measured."""
    noise_std: NonNegativeFloat
    """Standard deviation of the noise on real and imaginary parts, in the data's own units."""


class PoissonChannel(Record):
    """Photon counts: y = gain Poisson(max(x, 0) / gain)."""

    kind: Literal["poisson"] = "poisson"
    gain: PositiveFloat
    """Data units per photon."""


class QuantizationChannel(Record):
    """Gaussian noise, then clipping to a range and rounding to even levels."""

    kind: Literal["quantization"] = "quantization"
    low: float
    """Smallest value that comes out, in the data's own units."""
    high: float
    """Largest value that comes out, in the data's own units."""
    levels: int = Field(ge=2)
    """Number of levels."""
    noise_std: NonNegativeFloat = 0.0
    """Standard deviation of the noise before the rounding, in the data's own units."""


class JpegChannel(Record):
    """Images that were saved as JPEG and read again."""

    kind: Literal["jpeg"] = "jpeg"
    quality: int = Field(ge=1, le=100)
    """JPEG's quality."""
    low: float
    """Value that is saved as 0, in the data's own units."""
    high: float
    """Value that is saved as 255, in the data's own units."""


class DeepinvPart(Record):
    """A class of deepinv and its arguments."""

    name: str
    """Name of the class."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Its keyword arguments; `img_size` is filled in where it is taken and not given."""


class DeepinvChannel(_WithOperators):
    """Any physics of deepinv on images, named with its arguments."""

    kind: Literal["deepinv"] = "deepinv"
    physics: str
    """Class in `deepinv.physics`, for example `MRI`."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Its keyword arguments; `img_size` is filled in where it is taken and not given."""
    generator: DeepinvPart | None = None
    """Class in `deepinv.physics.generator` that draws per-sample operators."""
    noise: DeepinvPart | None = None
    """Noise model in `deepinv.physics`, for example `GaussianNoise` with `sigma`; none by
    default."""
    estimate: Literal["y", "A_adjoint", "A_dagger"] = "A_adjoint"
    """What the network sees of an observation, in the shape of x."""
    maps: tuple[str, ...] = ()
    """The operator's parameters that the network sees as well, such as `mask`."""


class CustomChannel(_WithOperators):
    """A channel of your own: a `diffem_core.Channel`, built as `Name(x_shape, **arguments)`."""

    kind: Literal["custom"] = "custom"
    target: Target
    """Where it is, as `package.module:Name`."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Its keyword arguments."""


ChannelConfig = Annotated[
    RandomMaskChannel
    | RandomMatrixChannel
    | DenoisingChannel
    | SuperResolutionChannel
    | GaussianBlurChannel
    | CompressedSensingChannel
    | MriChannel
    | PoissonChannel
    | QuantizationChannel
    | JpegChannel
    | DeepinvChannel
    | CustomChannel,
    Field(discriminator="kind"),
]
