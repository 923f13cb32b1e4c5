"""Measurements of the core as metrics of the store: with a unit and a meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from diffem_core.measurement import Measurement
from storage_schemas.metrics import CARRIED, Metric

__all__ = ["as_measurement", "as_metric", "finite", "left_out", "taken_over"]


def as_metric(
    measured: Measurement,
    long_name: str,
    *,
    units: str = "1",
    better: Literal["lower", "higher"] | None = None,
) -> Metric:
    """Turn a measurement into a metric; one that was left out says why instead of what it is."""
    if measured.value is None:
        assert measured.reason is not None
        return left_out(measured.reason)
    return Metric(
        value=measured.value,
        standard_error=measured.standard_error,
        interval=measured.interval,
        p_value=measured.p_value,
        bins=measured.bins,
        long_name=long_name,
        units=units,
        better=better,
    )


def as_measurement(metric: Metric | None) -> Measurement | None:
    """Turn a metric back; None where there is none, or without a value."""
    if metric is None or metric.value is None:
        return None
    return Measurement(
        value=metric.value, standard_error=metric.standard_error, interval=metric.interval
    )


def left_out(reason: str) -> Metric:
    """Make the metric that is not known."""
    return Metric(value=None, long_name=f"not known: {reason}")


def taken_over(floors: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Return what depends on the data or the start alone among metrics."""
    return {name: metric for name, metric in (floors or {}).items() if name.endswith(CARRIED)}


def finite(value: float) -> float | None:
    """Return a number, or None for one that is not finite."""
    return value if math.isfinite(value) else None
