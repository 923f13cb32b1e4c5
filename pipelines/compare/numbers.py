"""The numbers of a comparison: mean and spread over seeds of every metric of every method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from pipelines.compare.contenders import LABELS, Contender, LeftOut, Method
from pipelines.status import RunStatus, StageStatus, StepStatus
from storage_schemas._base import Record
from storage_schemas.metrics import CARRIED, REFERENCES, Metric

__all__ = ["Cell", "Comparison", "MethodReport", "Outcome", "Row", "collect", "result_of"]

_COLLAPSE = Metric(value=0.0, long_name="1 for a warning of a collapse", better="lower")


class Outcome(Record):
    """What one method came to with one seed."""

    method: Method
    """The method."""
    seed: int
    """The seed."""
    run: str
    """Its run."""
    iteration: int | None
    """The iteration whose numbers these are: the last, or the stopping rule's best; None for the
    start."""
    model_digest: str | None
    """SHA-256 of the model that was judged."""
    gradient_steps: int
    """Gradient steps that it learned from."""
    seconds: float
    """Seconds of fitting, E-steps and M-steps, as the runs took them; evaluations not counted."""
    metrics: dict[str, Metric]
    """Its numbers."""
    references: dict[str, Metric]
    """Floors and ceilings of these metrics, which depend on the data alone."""


class Cell(Record):
    """One metric of one method, over seeds."""

    mean: float | None
    """Mean; None where no seed has a value."""
    spread: float | None
    """Standard deviation over seeds; None for fewer than two values."""
    values: tuple[float | None, ...]
    """The values, in the order of the seeds."""
    difference: float | None = None
    """Mean of the differences to the first method, seed by seed."""
    difference_spread: float | None = None
    """Standard deviation of these differences."""
    reason: str | None = None
    """Why there is no value, where there is none."""


class Row(Record):
    """One metric."""

    metric: str
    """Its name."""
    long_name: str
    """What it is, in words."""
    units: str
    """Its unit; `1` for none."""
    better: Literal["lower", "higher"] | None
    """Which direction is an improvement."""
    reference: Cell | None
    """Floor or ceiling, where there is one."""
    cells: dict[Method, Cell]
    """By method."""


class MethodReport(Record):
    """One method."""

    method: Method
    """Its name."""
    label: str
    """What it is called in tables."""
    left_out: str | None = None
    """Why it is not compared; None where it is."""


class Comparison(Record):
    """A comparison."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    name: str
    """Name of the config."""
    store: str
    """Folder of the runs."""
    seeds: tuple[int, ...]
    """The seeds."""
    methods: tuple[MethodReport, ...]
    """The methods, in the table's order."""
    rows: tuple[Row, ...]
    """The table."""
    outcomes: tuple[Outcome, ...]
    """The runs behind it."""


def result_of(contender: Contender, status: RunStatus) -> Outcome:
    """Take a contender's numbers from the status of its run."""
    step = status.start if contender.start_only else _judged(status)
    stages = [status.start.stages, *([] if contender.start_only else _stages(status))]
    seconds = sum(
        stage.seconds
        for found in stages
        for name, stage in found.items()
        if name in ("fit", "e_step", "m_step")
    )
    steps = sum(found["m_step"].units for found in stages if "m_step" in found)
    metrics = {k: m for k, m in step.metrics.items() if not k.endswith(CARRIED)}
    return Outcome(
        method=contender.method,
        seed=contender.seed,
        run=status.run,
        iteration=step.iteration,
        model_digest=step.model_digest,
        gradient_steps=steps,
        seconds=seconds,
        metrics=metrics,
        references={k: m for k, m in step.metrics.items() if k.endswith(REFERENCES)},
    )


def _judged(status: RunStatus) -> StepStatus:
    complete = [step for step in status.history if step.state == "complete"]
    for step in complete:
        if step.iteration == status.best:
            return step
    return complete[-1]


def _stages(status: RunStatus) -> list[dict[str, StageStatus]]:
    return [step.stages for step in status.history if step.state == "complete"]


def collect(
    name: str,
    store: str,
    seeds: Sequence[int],
    outcomes: Sequence[Outcome],
    left_out: Sequence[LeftOut],
    methods: Sequence[Method],
) -> Comparison:
    """Make the table.

    Arguments:
        name: Name of the config.
        store: Folder of the runs.
        seeds: The seeds.
        outcomes: What each method came to with each seed.
        left_out: Methods that are not compared.
        methods: All methods that were asked for, in order.
    """
    reasons = {item.method: item.reason for item in left_out}
    kept = [method for method in methods if method not in reasons]
    by = {(one.method, one.seed): one for one in outcomes}
    names: dict[str, Metric] = {}
    for one in outcomes:
        for key, metric in one.metrics.items():
            if key not in names or (names[key].value is None and metric.value is not None):
                names[key] = _COLLAPSE if key == "collapse" else metric
    rows = [_row(key, metric, kept, seeds, by) for key, metric in names.items()]
    ordered = sorted(outcomes, key=lambda one: (kept.index(one.method), one.seed))
    return Comparison(
        name=name,
        store=store,
        seeds=tuple(seeds),
        methods=tuple(
            MethodReport(method=method, label=LABELS[method], left_out=reasons.get(method))
            for method in methods
        ),
        rows=tuple(rows),
        outcomes=tuple(ordered),
    )


def _row(
    key: str,
    metric: Metric,
    kept: Sequence[Method],
    seeds: Sequence[int],
    by: dict[tuple[Method, int], Outcome],
) -> Row:
    cells: dict[Method, Cell] = {}
    first: tuple[float | None, ...] | None = None
    for method in kept:
        found = [by[method, seed].metrics.get(key) for seed in seeds]
        cells[method] = _cell(found, first)
        first = cells[method].values if first is None else first
    reference = None
    for suffix in REFERENCES:
        known = [
            next(
                (
                    by[method, seed].references[key + suffix]
                    for method in kept
                    if key + suffix in by[method, seed].references
                ),
                None,
            )
            for seed in seeds
        ]
        if any(known):
            reference = _cell(known, None)
    return Row(
        metric=key,
        long_name=metric.long_name,
        units=metric.units,
        better=metric.better,
        reference=reference,
        cells=cells,
    )


def _cell(found: Sequence[Metric | None], first: tuple[float | None, ...] | None) -> Cell:
    values = tuple(None if metric is None else metric.value for metric in found)
    known = [value for value in values if value is not None]
    mean, spread = _moments(known)
    difference = difference_spread = None
    if first is not None:
        pairs = zip(values, first, strict=True)
        apart = [a - b for a, b in pairs if a is not None and b is not None]
        difference, difference_spread = _moments(apart)
    reason = None
    if mean is None:
        told = [metric.long_name for metric in found if metric is not None]
        reason = told[0] if told else "not measured by this method's runs"
    return Cell(
        mean=mean,
        spread=spread,
        values=values,
        difference=difference,
        difference_spread=difference_spread,
        reason=reason,
    )


def _moments(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
