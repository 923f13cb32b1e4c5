"""Small tools of a rehearsal: repeating, drawing a line through two measurements, threads."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipelines.costs.rates import Affine
from pipelines.progress import use_reporter
from pipelines.runners.devices import THREADS_VARIABLE
from pipelines.runners.processors import torch_threads
from pipelines.stages.bench import Bench

__all__ = ["BUDGET", "line_through", "median_of", "ticking", "white_noise", "with_threads"]

BUDGET = 1.2
"""Seconds that one measurement is to take, about."""


def white_noise(bench: Bench, count: int) -> Tensor:
    """Return samples of white noise, in the data's units."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *bench.channel.x_shape, generator=generator)
    return bench.scaling.to_data(x)


def median_of(measure: Callable[[], float]) -> float:
    """Repeat a short measurement; long ones are made once."""
    seconds = [measure()]
    while sum(seconds) < BUDGET / 2 and len(seconds) < 5:
        seconds.append(measure())
    return statistics.median(seconds)


def line_through(first: tuple[int, float], second: tuple[int, float]) -> Affine:
    """Return the line through two measurements; neither part is less than nothing."""
    (few, fewer), (many, more) = first, second
    each = max(0.0, (more - fewer) / (many - few))
    fixed = more - each * many
    if fixed < 0:
        return Affine(fixed=0.0, each=more / many)
    return Affine(fixed=fixed, each=each)


@contextmanager
def ticking() -> Iterator[list[float]]:
    """Note the time of every step that a training reports, and of its beginning."""
    ticking = _Ticking()
    with use_reporter(ticking):
        yield ticking.marks


class _Ticking:
    """A reporter that notes when items are finished."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    @contextmanager
    def stage(
        self, name: str, *, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """Note the beginning, and every item."""

        def advance(items: int) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

        self.marks.append(time.perf_counter())
        yield advance

    def note(self, text: str) -> None:
        """Say nothing."""


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Let PyTorch, and whatever asks `build_device`, have so many threads."""
    told = os.environ.get(THREADS_VARIABLE)
    os.environ[THREADS_VARIABLE] = str(count)
    try:
        with torch_threads(count):
            yield
    finally:
        if told is None:
            del os.environ[THREADS_VARIABLE]
        else:
            os.environ[THREADS_VARIABLE] = told
