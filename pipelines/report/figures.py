"""Plots as SVG that takes its colours from the page, so that one drawing serves light and dark.

matplotlib draws with placeholder colours, which become the page's CSS variables. Ids get a prefix,
since an HTML page has one space of ids for all its drawings. Equal numbers give equal text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from pipelines.report.reading import Step
from pipelines.report.series import Series
from pipelines.report.spectra import Spectrum
from pipelines.report.words import interval_of, number, told

__all__ = ["draw_bins", "draw_curve", "draw_spectra", "draw_stages"]

_INK, _MUTED, _GRID, _LINE, _FLOOR, _TARGET = (f"#0{i}0{i}0{i}" for i in range(1, 7))
_STAGES = ("#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d")
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _LINE: "--line",
    _FLOOR: "--floor",
    _TARGET: "--target",
    **{colour: f"--stage-{i}" for i, colour in enumerate(_STAGES)},
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffem",
    "font.size": 9,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "path.simplify": False,
}
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_WIDTH, _HEIGHT = 4.4, 2.5


def draw_curve(series: Series, steps: Sequence[Step]) -> str:
    """Draw a metric over EM iterations, with its 95 % intervals, floor and right value.

    Arguments:
        series: The metric; it has a value somewhere.
        steps: The start and the iterations, for the axis.

    Returns:
        An `<svg>` element.
    """
    known = series.known
    places = [point.place for point in known]
    values = [float(point.metric.value or 0.0) for point in known]
    ends = [interval_of(point.metric) for point in known]
    figure, axes = _figure(_WIDTH, _HEIGHT)
    nan = math.nan
    low = [nan if pair is None else pair[0] for pair in ends]
    high = [nan if pair is None else pair[1] for pair in ends]
    if any(pair is not None for pair in ends):
        axes.fill_between(places, low, high, color=_LINE, alpha=0.16, linewidth=0)
        axes.vlines(places, low, high, color=_LINE, alpha=0.55, linewidth=1.2)
    width = max(len(steps) - 1, 1)
    notes: list[tuple[float, str, str]] = []
    for called, metric in series.references:
        if metric.value is None:
            continue
        pair = interval_of(metric)
        if pair is not None:
            axes.axhspan(*pair, color=_FLOOR, alpha=0.13, linewidth=0)
        axes.axhline(metric.value, color=_FLOOR, linewidth=1.4, dashes=(5, 3))
        notes.append((metric.value, called, _FLOOR))
    if series.target is not None:
        axes.axhline(series.target, color=_TARGET, linewidth=1.4, dashes=(1.5, 2))
        notes.append((series.target, "right", _TARGET))
    line = axes.plot(places, values, color=_LINE, linewidth=2, solid_capstyle="round")[0]
    line.set_gid("series")
    dots = axes.plot(places, values, "o", color=_LINE, markersize=5.5)[0]
    dots.set_gid("points")
    axes.set_xlim(-0.08 * width - 0.1, len(steps) - 1 + 0.04 * width + 0.1)
    _room(axes)
    for value, called, colour in notes:
        axes.annotate(
            called,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
        )
    _steps_axis(axes, steps)
    tips = [f"{point.step.name}: {told(point.metric)}" for point in known]
    return _svg(figure, f"curve-{series.name}", tips=tips, right=0.86)


def draw_bins(name: str, bins: Sequence[float]) -> str:
    """Draw the histogram behind a metric, with the level that is flat."""
    figure, axes = _figure(_WIDTH, 1.7)
    axes.bar(range(len(bins)), bins, width=0.86, color=_LINE, alpha=0.75)
    axes.axhline(1 / len(bins), color=_TARGET, linewidth=1.4, dashes=(1.5, 2))
    axes.annotate(
        "flat",
        (1.0, 1 / len(bins)),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=_TARGET,
        fontsize=8.5,
    )
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.set_xlabel("rank among the samples")
    return _svg(figure, f"bins-{name}", right=0.9, bottom=0.3)


def draw_stages(rows: Sequence[tuple[str, Sequence[float]]], stages: Sequence[str]) -> str:
    """Draw the seconds of each stage, one bar a step.

    Arguments:
        rows: Steps by name with the seconds of each stage.
        stages: Names of the stages, at most four.
    """
    figure, axes = _figure(6.4, 0.9 + 0.24 * len(rows))
    left = [0.0] * len(rows)
    for i, stage in enumerate(stages):
        seconds = [float(row[1][i]) for row in rows]
        axes.barh(range(len(rows)), seconds, left=left, color=_STAGES[i], label=stage, height=0.7)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    height = figure.get_figheight()
    figure.legend(
        loc="upper left",
        bbox_to_anchor=(0.08, 1.0),
        ncols=len(stages),
        frameon=False,
        fontsize=8.5,
        handlelength=1,
        labelcolor=_INK,
    )
    return _svg(figure, "stages", left=0.1, right=0.98, bottom=0.44 / height, top=1 - 0.3 / height)


def draw_spectra(name: str, frequencies: Sequence[float], spectra: Sequence[Spectrum]) -> str:
    """Draw spectra on a logarithmic axis of power; the reference is dashed."""
    figure, axes = _figure(_WIDTH, 2.9)
    plain = 0
    for spectrum in spectra:
        if spectrum.reference:
            axes.plot(
                frequencies,
                spectrum.power,
                color=_INK,
                linewidth=1.8,
                dashes=(4, 2),
                label=spectrum.name,
                zorder=3,
            )
        else:
            axes.plot(
                frequencies,
                spectrum.power,
                "o-",
                markersize=3,
                color=_STAGES[plain % len(_STAGES)],
                linewidth=2,
                label=spectrum.name,
            )
            plain += 1
    if all(power > 0 for spectrum in spectra for power in spectrum.power):
        axes.set_yscale("log")
        low = min(min(spectrum.power) for spectrum in spectra)
        high = max(max(spectrum.power) for spectrum in spectra)
        axes.yaxis.set_major_locator(FixedLocator(_decade_ticks(low, high)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
    axes.set_xlabel("cycles per pixel")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    return _svg(figure, f"spectra-{name}", right=0.97, top=0.97)


# ------------------------------------------------------------------------------------------- parts


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return figure, axes


def _room(axes: Axes) -> None:
    """Give a curve that is nearly flat an axis that does not magnify rounding."""
    low, high = axes.get_ylim()
    least = 1e-3 * max(abs(low), abs(high), 1e-12)
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least, middle + least)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))


def _decade_ticks(low: float, high: float) -> list[float]:
    """Choose three to seven round values on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), tuple(range(1, 10))):
        ticks = [d * 10.0**e for e in decades for d in digits]
        ticks = [tick for tick in ticks if low / 1.2 <= tick <= high * 1.2]
        if len(ticks) >= 4:
            break
    return ticks[:: max(1, math.ceil(len(ticks) / 7))]


def _steps_axis(axes: Axes, steps: Sequence[Step]) -> None:
    stride = max(1, math.ceil((len(steps) - 1) / 8))
    places = [0, *range(1, len(steps), stride)]
    axes.set_xticks(
        places, ["start" if place == 0 else str(steps[place].iteration) for place in places]
    )
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("EM iteration", fontsize=8.5)


def _svg(
    figure: Figure,
    prefix: str,
    *,
    tips: Sequence[str] = (),
    left: float = 0.15,
    right: float = 0.95,
    bottom: float = 0.21,
    top: float = 0.95,
) -> str:
    figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top)
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{_SVG}metadata" or child.find(f"{_SVG}style") is not None:
                parent.remove(child)
    points = next((group for group in root.iter() if group.get("id") == "points"), None)
    if points is not None:
        uses = [use for use in points.iter() if use.tag == f"{_SVG}use"]
        for use, tip in zip(uses, tips, strict=True):
            use.set("class", "point")
            ElementTree.SubElement(use, f"{_SVG}title").text = tip
    for element in root.iter():
        _adapt(element, prefix)
    del root.attrib["width"], root.attrib["height"]
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: Any, prefix: str) -> None:
    element.tag = element.tag.removeprefix(_SVG)
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set("id", f"{prefix}-{value}")
        elif name == f"{_XLINK}href":
            del element.attrib[name]
            element.set("href", f"#{prefix}-{value[1:]}")
        elif name in ("style", "clip-path"):
            text = value.replace("url(#", f"url(#{prefix}-")
            text = re.sub(r"font(?:-family)?: ([\d.]+px)[^;]*", r"font-size: \1", text)
            for colour, variable in _VARIABLES.items():
                text = text.replace(colour, f"var({variable})")
            element.set(name, text)
