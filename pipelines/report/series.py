"""The numbers of a run as curves over EM iterations, in groups, with what to hold them against.

Nothing here knows a list of all metrics: floors are found by their names (`NAME_floor`), right
values in the metric's own words ("1 is right", "0.9 is calibrated"), and what has no known name
goes to the last group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report.reading import Step
from storage_schemas.metrics import Metric

__all__ = ["GROUPS", "Group", "Point", "Series", "collect", "heading"]

_TARGET = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) is (?:right|calibrated|a guess)\b")
_REFERENCES = {"_floor": "floor", "_clean": "clean"}
_SUFFIXES = (*_REFERENCES, "_start")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Curves that answer one question."""

    key: str
    title: str
    lead: str
    names: tuple[str, ...]


GROUPS = (
    Group(
        key="observation",
        title="Against the observations",
        lead="Reconstructions are corrupted afresh and compared with held-out observations: no "
        "clean image is needed. At its floor, a number cannot be told from that of two sets of "
        "real observations.",
        names=("divergence", "sliced_wasserstein", "energy", "mmd", "classifier", "frechet"),
    ),
    Group(
        key="calibration",
        title="Calibration",
        lead="Do reconstructions fit their observations as well as the noise allows, and do "
        "posterior samples scatter as much as they are wrong?",
        names=(
            "residual",
            "predictive",
            "hidden_ranks",
            "spread_ratio",
            "coverage_50",
            "coverage_90",
            "ranks",
        ),
    ),
    Group(
        key="health",
        title="Diversity",
        lead="Reconstructions that become alike are a collapse, which a low training loss hides.",
        names=("uncovered", "participation", "draw_variance", "nearest", "duplicates"),
    ),
    Group(
        key="truth",
        title="Against the truth",
        lead="Known only in benchmarks; never used in training.",
        names=(
            "psnr_mean",
            "psnr_sample",
            "hidden_rmse_mean",
            "hidden_rmse_sample",
            "rmse_mean",
            "rmse_sample",
            "ssim_mean",
            "ssim_sample",
            "lpips_mean",
            "lpips_sample",
            "distance",
            "fid",
            "kid",
            "inception_score",
            "precision",
            "recall",
            "density",
            "coverage",
            "accuracy",
        ),
    ),
    Group(key="other", title="Other numbers", lead="", names=()),
)

_PREFIXES = {
    "coverage_": "calibration",
    "ssim": "truth",
    "lpips": "truth",
    "psnr": "truth",
    "fid": "truth",
    "precision": "truth",
    "recall": "truth",
    "density": "truth",
    "ms_ssim": "truth",
    "kid": "truth",
    "inception": "truth",
    "truth_": "truth",
}
_HEADINGS = {
    "mmd": "MMD",
    "psnr": "PSNR",
    "rmse": "RMSE",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fid": "FID",
    "kid": "KID",
    "ms": "MS",
    "frechet": "Fréchet",
    "wasserstein": "Wasserstein",
}
_UNDRAWN = ("collapse",)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A number at one step."""

    place: int
    """0 for the start, then 1 for EM iteration 0."""
    step: Step
    metric: Metric


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over the run."""

    name: str
    group: str
    points: tuple[Point, ...]
    """Where the metric was taken, with a value or without."""
    references: tuple[tuple[str, Metric], ...]
    """Floors and ceilings by what they are called."""
    target: float | None
    """The value that is right, where the metric's words say one."""

    @property
    def known(self) -> list[Point]:
        """Return the points that have a value."""
        return [point for point in self.points if point.metric.value is not None]

    @property
    def last(self) -> Metric:
        """Return the last one that has a value, else the last one."""
        return (self.known or list(self.points))[-1].metric

    @property
    def units(self) -> str:
        """Return the unit, empty for none."""
        return "" if self.last.units == "1" else self.last.units


def heading(name: str) -> str:
    """Return a metric's name as a heading: `hidden_rmse_mean` is "Hidden RMSE mean"."""
    words = [_HEADINGS.get(word, word) for word in name.split("_")]
    text = " ".join(words)
    return text[0].upper() + text[1:]


def collect(steps: Sequence[Step]) -> list[Series]:
    """Return the curves of a run, in the order of the groups.

    Arguments:
        steps: The start and the EM iterations.
    """
    names: dict[str, None] = {}
    for step in steps:
        names |= dict.fromkeys(step.metrics)
    curves = [
        _series(name, steps)
        for name in names
        if name not in _UNDRAWN and not _belongs_to_another(name, names)
    ]
    keys = [group.key for group in GROUPS]
    order = {name: i for group in GROUPS for i, name in enumerate(group.names)}
    return sorted(curves, key=lambda s: (keys.index(s.group), order.get(s.name, len(order))))


def _belongs_to_another(name: str, names: dict[str, None]) -> bool:
    return any(
        name.endswith(suffix) and name.removesuffix(suffix) in names for suffix in _SUFFIXES
    )


def _series(name: str, steps: Sequence[Step]) -> Series:
    points = tuple(
        Point(place=place, step=step, metric=step.metrics[name])
        for place, step in enumerate(steps)
        if name in step.metrics
    )
    references = []
    for suffix, called in _REFERENCES.items():
        found = [step.metrics[name + suffix] for step in steps if name + suffix in step.metrics]
        if found:
            references.append((called, found[-1]))
    words = [point.metric.long_name for point in points if point.metric.value is not None]
    match = _TARGET.search(words[-1]) if words else None
    return Series(
        name=name,
        group=_group(name, words[-1] if words else ""),
        points=points,
        references=tuple(references),
        target=None if match is None else float(match[1]),
    )


def _group(name: str, words: str) -> str:
    for group in GROUPS:
        if name in group.names:
            return group.key
    for prefix, key in _PREFIXES.items():
        if name.startswith(prefix):
            return key
    return "observation" if "observation space" in words else "other"
