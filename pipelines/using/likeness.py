"""Do new observations look like those that a run was trained on?

The sliced Wasserstein distance between held-out observations of the run and the new ones is
compared with that between held-out and training observations of the run, equally many of each:
the ratio is about 1 where both have one distribution. A posterior knows nothing about others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.monitors import observation_divergence
from pipelines.stages.bench import Bench, as_tensors
from pipelines.stages.feeding import spread_rows
from pipelines.using.incoming import Block
from storage_schemas._base import Record

__all__ = ["PROBE", "Likeness", "compare", "compare_simulated"]

PROBE = 1024
"""Observations, at most, that are compared."""

_LOOK_ALIKE = 1.25
_LOOK_OTHER = 2.0
_FEW = 16


class Likeness(Record):
    """How new observations compare with those of the run."""

    ratio: float | None
    """Distance between new and held-out observations over that between training and held-out
    ones; None where the latter is 0."""
    distance: float
    """Sliced Wasserstein distance between new and held-out observations, in network units."""
    distance_of_the_run: float
    """Sliced Wasserstein distance between training and held-out observations of the run."""
    compared: int
    """Observations on each side."""

    @property
    def differs(self) -> bool:
        """Whether it is worth a warning."""
        return self.ratio is None or self.ratio > _LOOK_ALIKE

    def words(self) -> str:
        """Say it in one sentence."""
        if self.ratio is None:
            return "the observations of the run are all alike; nothing can be compared with them"
        if self.ratio <= _LOOK_ALIKE:
            told = "look like those of the run"
        elif self.ratio <= _LOOK_OTHER:
            told = "look somewhat different from those of the run"
        else:
            told = "do not look like those of the run"
        rough = f"; only {self.compared}: a rough comparison" if self.compared < _FEW else ""
        return (
            f"the new observations {told}: they are {self.ratio:.2f} times as far from its held-"
            f"out ones as its training observations are ({self.compared} compared{rough})"
        )


def compare(bench: Bench, channel: Channel, probe: Block) -> Likeness:
    """Compare new observations with those of a run.

    Arguments:
        bench: The run.
        channel: The run's channel: what it shows a network is compared.
        probe: Some of the new observations.
    """
    holdout = bench.store.observations("holdout")
    training = bench.store.observations("train")
    count = min(len(probe), len(holdout), len(training), PROBE)
    ours, others = spread_rows(len(holdout), count), spread_rows(len(training), count)
    return _compared(
        bench,
        channel,
        probe,
        (torch.from_numpy(holdout.y(ours)), as_tensors(holdout.params(ours))),
        (torch.from_numpy(training.y(others)), as_tensors(training.params(others))),
    )


def compare_simulated(bench: Bench, channel: Channel, probe: Block, *, iteration: int) -> Likeness:
    """Compare observations of another channel with what it makes of a run's reconstructions.

    Arguments:
        bench: The run.
        channel: The other channel.
        probe: Some of the new observations.
        iteration: EM iteration whose reconstructions are corrupted.
    """
    folder = bench.store.iteration(iteration)
    available = len(folder.sample_ids()) // 2
    count = min(len(probe), available, PROBE)
    generator = torch.Generator().manual_seed(bench.seed("likeness", "simulated"))
    sides = []
    for half in range(2):
        first = half * available
        x_hat = torch.from_numpy(folder.read_reconstructions(slice(first, first + count))).float()
        params = channel.draw_params(count, generator=generator)
        sides.append((channel.corrupt(x_hat, params, generator=generator), params))
    return _compared(bench, channel, probe, *sides)


def _compared(
    bench: Bench,
    channel: Channel,
    probe: Block,
    holdout: tuple[Tensor, Mapping[str, Tensor]],
    reference: tuple[Tensor, Mapping[str, Tensor]],
) -> Likeness:
    found = observation_divergence(
        channel,
        bench.scaling,
        torch.empty((0, *channel.x_shape)),
        *holdout,
        reference=reference,
        recorrupted=(torch.from_numpy(probe.y), as_tensors(probe.params)),
        seed=bench.seed("likeness"),
    )
    floor = found.floor or 0.0
    return Likeness(
        ratio=found.value / floor if floor > 0 and math.isfinite(found.value) else None,
        distance=found.value,
        distance_of_the_run=floor,
        compared=len(holdout[0]),
    )
