"""The numbers of an iteration, each with its unit and meaning: tables and plots need no key.

`metrics.json` holds them without a timestamp: two runs with equal numbers have equal files.
"""

from __future__ import annotations

from typing import Literal

from storage_schemas._base import Record

__all__ = ["CARRIED", "REFERENCES", "Metric", "Metrics"]

REFERENCES = ("_floor", "_clean")
"""How names end of what a number is held against: its floor, or its value for clean samples."""
CARRIED = (*REFERENCES, "_start")
"""How names end of what depends on the data or the start alone."""


class Metric(Record):
    """One number."""

    value: float | None
    """The number; None where it cannot be known. Never NaN or infinite."""
    standard_error: float | None = None
    """Standard error of the number, where it has one."""
    interval: tuple[float, float] | None = None
    """Ends of its 95 % confidence interval, where it has one."""
    p_value: float | None = None
    """Probability of a number at least as telling if nothing is wrong, where it is a test."""
    bins: tuple[float, ...] | None = None
    """Bars of the histogram behind it, as shares, where there is one."""
    long_name: str
    """What it is, in words."""
    units: str = "1"
    """Its unit; `1` for none."""
    better: Literal["lower", "higher"] | None = None
    """Which direction is an improvement."""


class Metrics(Record):
    """The numbers of one iteration, or of the start."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    values: dict[str, Metric]
    """By name, in the order of the table's columns."""

    def numbers(self) -> dict[str, float | None]:
        """Return the bare numbers by name."""
        return {name: metric.value for name, metric in self.values.items()}
