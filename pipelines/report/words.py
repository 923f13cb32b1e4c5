"""A run in sentences: how far it came, whether it still improves, and what to be careful about.

Two numbers are called different where they differ by more than two standard errors of their
difference, taken as if they were independent: both are of the same held-out observations, so that
this errs on the side of "cannot be told".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.report.reading import Report
from pipelines.report.series import Series, heading
from pipelines.status import CEILING
from storage_schemas.metrics import Metric

__all__ = ["Finding", "interval_of", "number", "told", "verdict"]

Kind = Literal["good", "caution", "bad", "plain"]

_ERRORS = 2.0
_NORMAL_95 = 1.959964
_WINDOW = 3
_LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence or two of the verdict."""

    key: str
    """What it is about."""
    kind: Kind
    title: str
    text: str
    items: tuple[str, ...] = ()
    """Numbers that the text speaks of, one a line."""


def number(value: float) -> str:
    """Return a number as it is shown, with four significant digits."""
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa} × 10^{int(exponent)}".replace("-", "−")
    return text.replace("-", "−")


def interval_of(metric: Metric) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval: its own, or that of its standard error."""
    if metric.value is None:
        return None
    if metric.interval is not None:
        return metric.interval
    if metric.standard_error is None:
        return None
    half = _NORMAL_95 * metric.standard_error
    return metric.value - half, metric.value + half


def told(metric: Metric) -> str:
    """Return a metric's value with its unit and uncertainty."""
    if metric.value is None:
        return metric.long_name
    unit = "" if metric.units == "1" else f" {metric.units}"
    if not metric.standard_error:
        return f"{number(metric.value)}{unit}"
    decimals = 1 - math.floor(math.log10(metric.standard_error))
    if not 0 <= decimals <= 6:
        return f"{number(metric.value)} ± {number(metric.standard_error)}{unit}"
    value = f"{metric.value:.{decimals}f}".replace("-", "−")
    return f"{value} ± {metric.standard_error:.{decimals}f}{unit}"


def verdict(report: Report, curves: Sequence[Series]) -> list[Finding]:
    """Say what the numbers of a run mean.

    Arguments:
        report: The run.
        curves: Its metrics.

    Returns:
        Findings, the most important first; what a run has no numbers for is not spoken of, or
        said to be unknown where a reader would miss it.
    """
    by_name = {series.name: series for series in curves}
    found = [*_ceiling(report), _progress(report)]
    monitor = by_name.get(getattr(report.config.stop, "monitor", "divergence"))
    if monitor is not None and monitor.known:
        found += [_change(monitor), *_floor(monitor)]
    found += _tests(curves)
    found.append(_collapse(report))
    found.append(_calibration(curves))
    found += _truth(by_name)
    return found


def _ceiling(report: Report) -> list[Finding]:
    if report.status.method != "clean":
        return []
    text = (
        f"{CEILING.capitalize()}. Its numbers are what learning from observations is compared "
        "with; nothing of them was learned from corrupted data."
    )
    return [Finding(key="ceiling", kind="caution", title="Not DiffEM", text=text)]


def _progress(report: Report) -> Finding:
    status = report.status
    of = f"{status.complete} of {status.iterations} EM iterations"
    if status.stopped is not None:
        best = "" if status.best is None else f" Its best iteration is {status.best:03d}."
        return Finding(
            key="progress",
            kind="good",
            title="Stopped by its rule",
            text=f"The run ended after {of}: {status.stopped}.{best}",
        )
    if status.state == "complete":
        text = f"All {status.iterations} EM iterations that its config asks for are done."
        return Finding(key="progress", kind="good", title="Finished", text=text)
    if status.writer is not None:
        goes = "The run was being worked on when this page was written."
    else:
        goes = "`diffem run` with its config goes on where it ended."
    if status.complete == 0:
        ready = status.start.state == "complete"
        what = "What is shown is its start." if ready else "Its start is not ready either."
        text = f"No EM iteration of {status.iterations} is complete yet. {what} {goes}"
    else:
        text = f"{of} are complete. {goes}"
    return Finding(key="progress", kind="plain", title="Not finished", text=text)


def _gain(before: Metric, after: Metric) -> float:
    assert before.value is not None
    assert after.value is not None
    return after.value - before.value if after.better == "higher" else before.value - after.value


def _error(first: Metric, second: Metric) -> float:
    return math.hypot(first.standard_error or 0.0, second.standard_error or 0.0)


def _change(series: Series) -> Finding:
    name = heading(series.name)
    known = series.known
    if len(known) == 1:
        return Finding(
            key="change",
            kind="plain",
            title="Whether it improves is not known yet",
            text=f"{name} is {told(known[0].metric)} at {known[0].step.place}; one number "
            "says nothing about a direction.",
        )
    before, after = known[max(0, len(known) - 1 - _WINDOW)], known[-1]
    gain, error = _gain(before.metric, after.metric), _error(before.metric, after.metric)
    path = (
        f"{name} went from {told(before.metric)} at {before.step.place} to "
        f"{told(after.metric)} at {after.step.place}"
    )
    strength = f", {abs(gain) / error:.1f} standard errors" if error > 0 else ""
    if gain > _ERRORS * error:
        latest, its_error = (
            _gain(known[-2].metric, after.metric),
            _error(known[-2].metric, after.metric),
        )
        if latest > its_error:
            text = f"{path}{strength}: more iterations may well help."
            return Finding(key="change", kind="good", title="Still improving", text=text)
        text = f"{path}{strength}; the last step alone is within its uncertainty."
        return Finding(key="change", kind="good", title="Improved, now slowing", text=text)
    if gain < -_ERRORS * error:
        text = f"{path}{strength}: what is learned got worse, which exact EM never does."
        return Finding(key="change", kind="bad", title="Getting worse", text=text)
    text = f"{path}{strength}: no change that its uncertainty would show."
    return Finding(key="change", kind="plain", title="Levelled off", text=text)


def _floor(series: Series) -> list[Finding]:
    floors = [metric for called, metric in series.references if called == "floor"]
    if not floors or floors[0].value is None:
        return []
    floor, last = floors[0], series.last
    above, error = -_gain(floor, last), _error(floor, last)
    name = heading(series.name)
    if above <= _ERRORS * error:
        text = (
            f"{name} is {told(last)}, its floor {told(floor)}: by this monitor, corrupted "
            "reconstructions look like observations. It can show no further progress."
        )
        return [Finding(key="floor", kind="good", title="At its floor", text=text)]
    strength = f"{above / error:.1f} standard errors from" if error > 0 else "off"
    text = f"{name} is {told(last)}, {strength} its floor of {told(floor)}."
    return [Finding(key="floor", kind="plain", title="Not at its floor", text=text)]


def _tests(curves: Sequence[Series]) -> list[Finding]:
    tests = [
        (heading(series.name), series.last.p_value)
        for series in curves
        if series.group == "observation" and series.last.p_value is not None and series.known
    ]
    if not tests:
        return []
    level = _LEVEL / len(tests)
    telling = [f"{name} (p = {number(p)})" for name, p in tests if p is not None and p < level]
    quiet = [f"{name} (p = {number(p)})" for name, p in tests if p is not None and p >= level]
    count = f"at the {100 * _LEVEL:.0f} % level for all {len(tests)} together"
    if telling:
        text = (
            f"Corrupted reconstructions differ from held-out observations by "
            f"{_list(telling)}, {count}."
        )
        return [Finding(key="tests", kind="caution", title="Tests see a difference", text=text)]
    text = (
        f"No test tells corrupted reconstructions from held-out observations: {_list(quiet)}, "
        f"{count}. A test that sees nothing may also be weak."
    )
    return [Finding(key="tests", kind="good", title="Tests see no difference", text=text)]


def _collapse(report: Report) -> Finding:
    taken = [(s, s.metrics["collapse"]) for s in report.steps if "collapse" in s.metrics]
    known = [(step, metric) for step, metric in taken if metric.value is not None]
    if not known:
        text = "The run has no diversity monitor."
        if taken:
            text = f"{taken[-1][1].long_name[0].upper()}{taken[-1][1].long_name[1:]}."
        return Finding(key="collapse", kind="plain", title="Collapse is not watched", text=text)
    warned = [step.place for step, metric in known if metric.value]
    reason = known[-1][1].long_name.partition(": ")[2] or known[-1][1].long_name
    reason = f"{reason[0].upper()}{reason[1:]}."
    if known[-1][1].value:
        return Finding(key="collapse", kind="bad", title="Warning of a collapse", text=reason)
    if warned:
        text = f"{reason} Earlier there was a warning, at {_list(warned)}."
        return Finding(key="collapse", kind="caution", title="No collapse now", text=text)
    return Finding(key="collapse", kind="good", title="No collapse", text=reason)


def _calibration(curves: Sequence[Series]) -> Finding:
    inside: list[str] = []
    outside: list[str] = []
    for series in curves:
        ends = interval_of(series.last)
        if series.group != "calibration" or series.target is None or ends is None:
            continue
        low, high = ends
        text = (
            f"{heading(series.name)} {series.last.value:.3g} "
            f"({low:.3g} to {high:.3g}); {series.target:g} is right"
        )
        (inside if low <= series.target <= high else outside).append(text)
    if not inside and not outside:
        text = "No calibration number of this run has an uncertainty and a right value."
        return Finding(key="calibration", kind="plain", title="Calibration unknown", text=text)
    if not outside:
        text = "Every 95 % interval holds the right value:"
        return Finding(
            key="calibration", kind="good", title="Calibrated", text=text, items=tuple(inside)
        )
    count = len(inside) + len(outside)
    text = (
        f"{len(outside)} of {count} numbers {'is' if len(outside) == 1 else 'are'} off by more "
        "than the 95 % interval:"
    )
    return Finding(
        key="calibration",
        kind="caution",
        title="Not calibrated",
        text=text,
        items=tuple(outside),
    )


def _truth(by_name: dict[str, Series]) -> list[Finding]:
    for name in ("psnr_mean", "hidden_rmse_mean", "rmse_mean", "distance"):
        series = by_name.get(name)
        if series is not None and len(series.known) > 1:
            first, last = series.known[0], series.known[-1]
            text = (
                f"{heading(name)} went from {told(first.metric)} at {first.step.place} to "
                f"{told(last.metric)} at {last.step.place}."
            )
            better = _gain(first.metric, last.metric) > 0
            return [
                Finding(
                    key="truth",
                    kind="good" if better else "caution",
                    title="Nearer to the truth" if better else "Not nearer to the truth",
                    text=text,
                )
            ]
    return []


def _list(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
