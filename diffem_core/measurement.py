"""What a monitor says: a number, how sure it is, and whether chance explains it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy import stats
from torch import Tensor

__all__ = ["Measurement", "block_jackknife", "confidence_interval"]

_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of a monitor; or none, with the reason.

    A monitor that compares two sets of observations has a floor: what the same function returns
    for two sets of real observations of the same sizes.

    Arguments:
        value: The number; None where it cannot be known. Never NaN or infinite.
        standard_error: Its standard error.
        interval: Ends of its 95 % confidence interval.
        p_value: Probability of a number at least as telling if there is no difference (or no
            fault), in (0, 1].
        reason: Why there is no number.
        bins: Numbers that a picture of it is drawn from, such as the bars of a histogram.
    """

    value: float | None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    reason: str | None = None
    bins: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(
                f"Measurement received value {self.value} and reason {self.reason!r}; give one"
            )
        numbers = (self.value, self.standard_error, *(self.interval or ()), self.p_value)
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError(
                f"Measurement received {numbers}, not all of them finite; give the reason instead"
            )

    @classmethod
    def left_out(cls, reason: str) -> Self:
        """Make the measurement that could not be made."""
        return cls(value=None, reason=reason)

    @classmethod
    def of_means(cls, values: Tensor, *, expected: float | None = None) -> Self:
        """Make the mean of independent values, with Student's interval and test.

        Arguments:
            values: One value per observation, shape (n,), n >= 2.
            expected: Mean that `p_value` tests (two-sided); None tests nothing.
        """
        values = values.double()
        n = len(values)
        mean, error = float(values.mean()), float(values.std()) / math.sqrt(n)
        p_value = None
        if expected is not None and error > 0:
            p_value = _positive(float(2 * stats.t.sf(abs(mean - expected) / error, n - 1)))
        return cls(
            value=mean,
            standard_error=error,
            interval=confidence_interval(mean, error, degrees=n - 1),
            p_value=p_value,
        )


def confidence_interval(
    value: float, standard_error: float, *, degrees: int
) -> tuple[float, float]:
    """Return Student's 95 % interval around a value.

    Arguments:
        value: The value.
        standard_error: Its standard error.
        degrees: Degrees of freedom that the standard error has.
    """
    margin = float(stats.t.ppf(0.975, degrees)) * standard_error
    return value - margin, value + margin


def block_jackknife(
    statistic: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor
) -> tuple[float, int]:
    """Estimate the standard error of a statistic of two independent sets of rows.

    The rows are dealt into 16 blocks; one block at a time is left out on both sides. As the sets
    are independent, their variances add up.

    Arguments:
        statistic: Function of rows of `a` and of `b`.
        a: Rows of the first set.
        b: Rows of the second set.

    Returns:
        The standard error and its degrees of freedom.

    References:
        Efron and Stein 1981 (The jackknife estimate of variance).
    """
    blocks = min(_BLOCKS, len(a), len(b))
    numbers = [torch.arange(len(rows), device=rows.device) % blocks for rows in (a, b)]
    left_out = np.array([statistic(a[numbers[0] != k], b[numbers[1] != k]) for k in range(blocks)])
    return math.sqrt((blocks - 1) * float(left_out.var())), blocks - 1


def _positive(p_value: float) -> float:
    """Keep a p-value that underflowed to 0 above it."""
    return max(p_value, 1e-300)
