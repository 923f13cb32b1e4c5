"""When a run ends before its last iteration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from storage_schemas._base import Record, Steps

__all__ = ["BudgetStop", "FloorStop", "PlateauStop", "StopConfig", "WatchedMonitor"]

WatchedMonitor = Literal[
    "divergence", "sliced_wasserstein", "energy", "mmd", "classifier", "frechet"
]
"""Monitors that a run may be stopped by. None of them knows the truth.

The Gaussian start has the means and covariances of the data already. Monitors that see little else
(`sliced_wasserstein`, `energy`, `mmd`, `frechet` of components, `classifier`) are then at their
floor from the start and would stop the run at once: on the digits, only `divergence` follows EM.
"""


class BudgetStop(Record):
    """Do all iterations."""

    kind: Literal["budget"] = "budget"


class PlateauStop(Record):
    """Stop when the monitor no longer improves by a part of its error, and is not at its floor.

    At its floor it sees no difference, though there may be one; such a plateau ends nothing. All
    iterations are judged by the same held-out observations, so that the difference of two is known
    better than either value.

    Where `m_step.learning_rate.over` is `run`, a run that is stopped ends at a learning rate that
    has not yet fallen, and the last iterations, which profit from the fall, are not done.
    """

    kind: Literal["plateau"] = "plateau"
    monitor: WatchedMonitor = "divergence"
    """What is watched."""
    patience: Steps = 3
    """Iterations in a row that are not better than the best before them."""
    errors: NonNegativeFloat = 0.5
    """Standard errors by which an iteration has to be better to count."""
    after: NonNegativeInt = 0
    """Iterations that are done in any case."""


class FloorStop(Record):
    """Stop when the monitor can no longer be told from that of two sets of real observations.

    One that never could be told from it has seen nothing, and ends nothing.
    """

    kind: Literal["floor"] = "floor"
    monitor: WatchedMonitor = "divergence"
    """What is watched."""
    confirm: Steps = 2
    """Iterations in a row that have to be there."""
    errors: NonNegativeFloat = 1.0
    """Standard errors, of monitor and floor together, within which it is there."""
    after: NonNegativeInt = 0
    """Iterations that are done in any case."""


StopConfig = Annotated[BudgetStop | PlateauStop | FloorStop, Field(discriminator="kind")]
