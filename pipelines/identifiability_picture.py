"""The picture of an identifiability analysis: where and at which frequencies x is observed.

Images show a map over pixels, a map over spatial frequencies (or, for masks, over the shift
between two pixels), what is lost, and the spectrum of E[A' A]; vectors show bars instead of maps.
The figure is drawn with matplotlib's object interface, as the previews are.
"""

from __future__ import annotations

import io
import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from diffem_core.identifiability import Identifiability

__all__ = ["draw_identifiability"]

_INK = "#1d2733"
_SOFT = "#6b7683"
_BLUE = "#1f5fa8"
_HIDDEN = "#b03a2e"
_DROWNED = "#d9942b"
_VERDICTS = {
    "identifiable": ("identifiable", "#2a7f4f"),
    "partly": ("partly identifiable", "#b7791f"),
    "not": ("not identifiable", _HIDDEN),
    "undetermined": ("cannot be told", _SOFT),
}
Map = NDArray[np.float64]
_WIDTH, _HEIGHT = 12.0, 3.9
_SIDE, _BOTTOM = 2.1, 0.52  # Of a map, and of all panels; inches.


def draw_identifiability(found: Identifiability, *, title: str, summary: str) -> bytes:
    """Draw an analysis.

    Arguments:
        found: The analysis.
        title: What was examined, in a few words.
        summary: The verdict in a sentence.

    Returns:
        A PNG file.
    """
    image = found.prior_variance.ndim == 3
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    word, colour = _VERDICTS[found.verdict]
    figure.text(0.025, 0.945, title, fontsize=13, fontweight="bold", color=_INK, va="center")
    figure.text(
        0.975,
        0.945,
        word,
        fontsize=11,
        fontweight="bold",
        color="white",
        ha="right",
        va="center",
        bbox={"boxstyle": "round,pad=0.45", "facecolor": colour, "edgecolor": "none"},
    )
    figure.text(
        0.025,
        0.893,
        "\n".join(textwrap.wrap(summary, 150)),
        fontsize=8.6,
        color=_SOFT,
        va="top",
        linespacing=1.35,
    )
    draw = _draw_maps if image else _draw_bars
    draw(figure, found)
    _draw_spectrum(figure.add_axes(_box(9.3, 2.5)), found)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_maps(figure: Figure, found: Identifiability) -> None:
    entries, frequencies, together = found.entries, found.frequencies, found.together
    mask = found.method == "selection"
    _map(
        figure,
        0.35,
        None if entries is None else entries.mean(0).numpy(),
        "How often a pixel is seen" if mask else "Information per pixel",
        "share of the operators" if mask else "diagonal of E[A'A]",
        never=None if entries is None else (entries <= found.floor).all(0).numpy(),
    )
    if together is not None:
        height, width = together.shape
        _map(
            figure,
            3.3,
            together.numpy(),
            "How often two pixels are seen",
            "together, by the shift between them",
            extent=(-width / 2, width / 2, height / 2, -height / 2),
        )
    else:
        shape = (1, 1) if frequencies is None else tuple(frequencies.shape)
        rows, columns = (0.5 / side for side in shape)
        low = [-0.5 if side % 2 == 0 else -0.5 + 0.5 / side for side in shape]
        high = [0.5 - 1 / side if side % 2 == 0 else 0.5 - 0.5 / side for side in shape]
        _map(
            figure,
            3.3,
            None if frequencies is None else frequencies.numpy(),
            "Information per frequency",
            "cycles per pixel, 0 in the middle",
            extent=(low[1] - columns, high[1] + columns, high[0] + rows, low[0] - rows),
            ticks=(-0.5, -0.25, 0.0, 0.25),
            never=None if frequencies is None else (frequencies <= found.floor).numpy(),
        )
    lost = found.lost_variance
    share = None
    if lost is not None:
        share = (lost.sum(0) / found.prior_variance.sum(0).clamp_min(1e-300)).clamp(0, 1).numpy()
    energy = found.hidden_energy + found.drowned_energy
    some = found.hidden_share + found.drowned_share > 0
    _map(
        figure,
        6.25,
        share,
        "What is lost",
        f"{100 * energy:.2g} % of the variance, pixel by pixel" if some else "nothing",
        cmap="magma",
        top=1.0,
        note=None if some else "nothing",
    )


def _map(
    figure: Figure,
    left: float,
    values: Map | None,
    title: str,
    subtitle: str,
    *,
    extent: tuple[float, float, float, float] | None = None,
    ticks: tuple[float, ...] | None = None,
    never: NDArray[np.bool_] | None = None,
    cmap: str = "viridis",
    top: float | None = None,
    note: str | None = None,
) -> None:
    axis = figure.add_axes(_box(left, _SIDE))
    _name(axis, title, subtitle)
    if values is None:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not known", ha="center", va="center", fontsize=9, color=_SOFT)
        return
    if note is not None:
        axis.set_facecolor("#eef2f6")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_box_aspect(values.shape[0] / values.shape[1])
        axis.text(0.5, 0.5, note, ha="center", va="center", fontsize=11, color=_SOFT)
        return
    greatest = top or float(values.max()) or 1.0
    shown = axis.imshow(
        values,
        cmap=cmap,
        vmin=0.0,
        vmax=greatest,
        extent=extent,
        interpolation="nearest",
        aspect="equal",
    )
    if never is not None and never.any():
        marked = np.zeros((*never.shape, 4))
        marked[never] = (*_rgb(_HIDDEN), 1.0)
        axis.imshow(marked, extent=extent, interpolation="nearest", aspect="equal")
        axis.text(
            1.0,
            -0.045 if extent is None else -0.13,
            "■ never seen",
            transform=axis.transAxes,
            ha="right",
            va="top",
            fontsize=7,
            color=_HIDDEN,
        )
    if top is not None and np.ptp(values) < 1e-3:
        # One colour says little: the number does.
        axis.text(
            0.5,
            0.5,
            f"{100 * float(values.mean()):.2g} %",
            transform=axis.transAxes,
            ha="center",
            va="center",
            fontsize=16,
            color="white" if values.mean() < 0.7 else _INK,
        )
    axis.tick_params(labelsize=6.5, colors=_SOFT, length=2)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if extent is None:
        axis.set_xticks([])
        axis.set_yticks([])
    elif ticks is None:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
    # A map of images that are not square is smaller than its box.
    axis.apply_aspect()
    place = axis.get_position()
    bar = figure.colorbar(
        shown, cax=figure.add_axes((place.x1 + 0.006, place.y0, 0.007, place.height))
    )
    bar.ax.tick_params(labelsize=6.5, colors=_SOFT, length=2)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.outline.set_visible(False)


def _box(left: float, width: float) -> tuple[float, float, float, float]:
    """Return the place of a panel, given in inches, as fractions of the figure."""
    return (left / _WIDTH, _BOTTOM / _HEIGHT, width / _WIDTH, _SIDE / _HEIGHT)


def _name(axis: Axes, title: str, subtitle: str) -> None:
    for text, height, size, colour in ((title, 1.105, 9, _INK), (subtitle, 1.03, 7, _SOFT)):
        axis.text(0, height, text, transform=axis.transAxes, fontsize=size, color=colour)


def _draw_bars(figure: Figure, found: Identifiability) -> None:
    place = np.arange(found.size)
    axes = [figure.add_axes(_box(left, 3.4)) for left in (0.65, 4.85)]
    _name(axes[0], "Information per entry", "diagonal of E[A'A]")
    _name(axes[1], "Variance of each entry", "under the prior; lost part in red")
    for axis in axes:
        _plain(axis)
        axis.set_xlabel("entry of x", fontsize=7, color=_SOFT, labelpad=2)
        axis.set_xticks(place if found.size <= 20 else np.linspace(0, found.size - 1, 5).round())
    if found.entries is not None:
        axes[0].bar(place, found.entries.numpy(), color=_BLUE, width=0.75)
    axes[1].bar(place, found.prior_variance.numpy(), color="#c9d3de", width=0.75)
    if found.lost_variance is not None:
        axes[1].bar(place, found.lost_variance.numpy(), color=_HIDDEN, width=0.75)


def _draw_spectrum(axis: Axes, found: Identifiability) -> None:
    _name(axis, "Spectrum of E[A'A]", "how well each direction of x is seen")
    _plain(axis)
    axis.set_xlabel("% of the directions, best seen first", fontsize=7, color=_SOFT)
    axis.set_xlim(0, 100)
    some = found.share > 0
    level, share, needed = found.level[some], found.share[some], found.needed[some]
    greatest = float(level.max())
    if found.method == "none" or greatest <= 0:
        axis.text(50, 0.5, "not known", ha="center", fontsize=9, color=_SOFT)
        return
    edges = np.concatenate([[0.0], 100 * share.cumsum(0).numpy()])
    seen = level > found.floor
    noise = found.noise_std**2 / float(found.prior_variance.mean())
    shown = [float(level[seen].min())]
    if noise > 0 and noise < 10 * greatest:
        shown.append(noise)
    low = 10.0 ** math.floor(math.log10(max(min(shown) / 2, 1e-7 * greatest)))
    axis.set_yscale("log")
    axis.set_ylim(low, 3 * greatest)
    axis.tick_params(which="minor", length=0)
    heights = level.clamp_min(low).numpy()
    hidden = 100 * found.hidden_share
    drowned = seen & (needed > found.observations)
    axis.stairs(
        np.where(seen.numpy(), heights, np.nan), edges, color=_BLUE, linewidth=1.6, baseline=None
    )
    axis.fill_between(
        np.repeat(edges, 2)[1:-1],
        low,
        np.repeat(np.where(seen.numpy(), heights, low), 2),
        color=_BLUE,
        alpha=0.12,
        linewidth=0,
    )
    if bool(drowned.any()):
        _zone(axis, edges, drowned.numpy(), _DROWNED)
    if hidden > 0:
        axis.axvspan(100 - hidden, 100, color=_HIDDEN, alpha=0.16, linewidth=0)
    notes = []
    if found.hidden_share > 0:
        notes.append((f"never seen: {hidden:.3g} %", _HIDDEN))
    if found.drowned_share > 0:
        notes.append((f"under the noise: {100 * found.drowned_share:.3g} %", "#a86d12"))
    for i, (text, colour) in enumerate(notes):
        axis.text(
            0.98,
            0.95 - 0.09 * i,
            text,
            transform=axis.transAxes,
            ha="right",
            va="top",
            fontsize=7.5,
            color=colour,
            fontweight="bold",
        )
    if low < noise < 3 * greatest:
        axis.axhline(noise, color=_SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.text(
            1.5,
            noise,
            "one observation knows as much as the prior",
            fontsize=6.2,
            color=_SOFT,
            va="bottom",
        )


def _zone(axis: Axes, edges: Map, where: NDArray[np.bool_], colour: str) -> None:
    """Shade the levels that are marked, neighbours together."""
    change = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(np.int8)))
    for start, stop in zip(change[::2], change[1::2], strict=True):
        axis.axvspan(
            float(edges[start]), float(edges[stop]), color=colour, alpha=0.18, linewidth=0
        )


def _plain(axis: Axes) -> None:
    axis.tick_params(labelsize=6.5, colors=_SOFT, length=2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#c9d3de")


def _rgb(colour: str) -> tuple[float, float, float]:
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return r, g, b
