"""Learning rates as functions of the step.

A schedule that spans a whole run instead of one M-step is the same function with the `offset` of
the M-step's first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["constant_rate", "cosine_rate", "linear_rate"]


def constant_rate(value: float) -> Callable[[int], float]:
    """Return the rate that is `value` at every step.

    Arguments:
        value: The rate.

    Returns:
        The learning rate by step, from 0.
    """
    return lambda step: value


def linear_rate(
    value: float, *, floor: float, steps: int, offset: int = 0
) -> Callable[[int], float]:
    """Return the rate that falls linearly from `value` to `floor * value`.

    Arguments:
        value: Rate of the first step.
        floor: Rate of the last step, as a fraction of the first, in [0, 1].
        steps: Number of steps from first to last; afterwards the rate stays at the floor.
        offset: Steps of the span that are already done when step 0 begins.
    """
    _check(floor, steps, offset)
    return lambda step: value * (1 - (1 - floor) * _progress(step + offset, steps))


def cosine_rate(
    value: float, *, floor: float, steps: int, offset: int = 0
) -> Callable[[int], float]:
    """Return the rate that falls along half a cosine from `value` to `floor * value`.

    Arguments:
        value: Rate of the first step.
        floor: Rate of the last step, as a fraction of the first, in [0, 1].
        steps: Number of steps from first to last; afterwards the rate stays at the floor.
        offset: Steps of the span that are already done when step 0 begins.
    """
    _check(floor, steps, offset)

    def rate(step: int) -> float:
        fraction = 0.5 * (1 + math.cos(math.pi * _progress(step + offset, steps)))
        return value * (floor + (1 - floor) * fraction)

    return rate


def _progress(step: int, steps: int) -> float:
    return min(1.0, step / max(1, steps - 1))


def _check(floor: float, steps: int, offset: int) -> None:
    if not 0 <= floor <= 1:
        raise ValueError(f"learning rate received floor {floor}; give a fraction in [0, 1]")
    if steps < 1 or offset < 0:
        raise ValueError(
            f"learning rate received steps {steps} and offset {offset}; give steps >= 1, offset "
            ">= 0"
        )
