"""Timing work beside the machine's own ceiling, in turns, on processors and on GPUs.

On a machine that does something else as well, rates rise and fall together: each measurement
stands between two of the ceiling, and the ratio's median is what is told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from pipelines.process_memory import highest_memory

__all__ = ["Work", "in_turns", "median", "peak_memory", "seconds_of"]

Work = Callable[[], object]
"""Something that is measured, with all its arguments bound."""


def seconds_of(work: Work, device: torch.device, *, repeats: int = 1) -> float:
    """Return the seconds of one call; on a GPU, those that its own events tell.

    Arguments:
        work: What is called.
        device: Where it runs.
        repeats: How often it is called; the mean counts.
    """
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


def in_turns(
    works: Mapping[str, Work], device: torch.device, *, seconds: float, least: int = 3
) -> dict[str, list[float]]:
    """Measure several works in turns, after one call of each that does not count.

    Arguments:
        works: What is measured, by name. Short works are repeated until they take 20 ms.
        device: Where they run.
        seconds: How long to go on.
        least: Turns at least.

    Returns:
        Seconds of one call in every turn, by name; all of the same length.
    """
    repeats = {}
    for name, work in works.items():
        # Who took so long the first time takes more than 20 ms, warm or not.
        first = seconds_of(work, device)
        once = first if first > 1 else seconds_of(work, device)
        repeats[name] = max(1, min(100, round(0.02 / max(once, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in works}
    ends = time.perf_counter() + seconds
    turn = 0
    while turn < least or time.perf_counter() < ends:
        for name, work in works.items():
            taken[name].append(seconds_of(work, device, repeats=repeats[name]))
        turn += 1
    return taken


def median(values: list[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def peak_memory(device: torch.device) -> float:
    """Return the most memory, in MB, that this process has had so far: the GPU's, or its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return highest_memory() / 1e6
