"""Lengths of time as people write them: 45s, 90m, 2h, 1d, 1h30m."""

from __future__ import annotations

import re
from datetime import timedelta

__all__ = ["parse_duration"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(text: str) -> timedelta:
    """Read a length of time.

    Arguments:
        text: Whole or decimal numbers, each with a unit: s, m, h or d.

    Returns:
        The length; more than nothing.

    Raises:
        ValueError: It cannot be read, or is nothing.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError(f"received {text!r} as a time; give one such as 45s, 90m, 2h or 1h30m")
    total = timedelta()
    for number, unit in parts:
        total += timedelta(**{_UNITS[unit]: float(number)})
    if total <= timedelta():
        raise ValueError(f"received {text!r} as a time; give more than nothing, such as 90m")
    return total
