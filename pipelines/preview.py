"""The picture of an iteration: truth, observation, posterior samples, their mean and spread.

Images become one row per kind and one column per held-out observation; vectors become scatter
plots of coordinate pairs. The figure is drawn with matplotlib's object interface, without
pyplot's global state, so that it can be drawn in any thread.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.channel import Channel, Params
from diffem_core.physics_channels import PhysicsChannel

__all__ = ["image_preview", "observed_images", "to_rgb", "vector_preview"]

_SHOWN_DRAWS = 3


def observed_images(channel: Channel, y: Tensor, params: Params) -> Tensor | None:
    """Bring observations to the shape of images, for people to look at.

    An observation that is an image already (noisy, blurred, JPEG) is shown as it is; any other of
    a linear channel as `A_dagger y`: hidden pixels 0, blocks of super-resolution repeated, k-space
    with zeros where nothing was measured.

    Arguments:
        channel: The channel.
        y: Observations, shape (n, *y_shape).
        params: Their parameters.

    Returns:
        Shape (n, *x_shape), in data units, or None where an observation is no image.
    """
    as_they_are = isinstance(channel, PhysicsChannel) and channel.estimate == "y"
    if as_they_are or not channel.linear:
        return y if tuple(y.shape[1:]) == channel.x_shape and not y.is_complex() else None
    with torch.no_grad():
        return channel.A_dagger(y, params)


def image_preview(
    *,
    truth: NDArray[np.float32] | None,
    observed: NDArray[np.float32] | None,
    seen: NDArray[np.bool_] | None,
    draws: NDArray[np.float32],
    value_range: tuple[float, float],
    title: str,
) -> bytes:
    """Draw a grid of restored images.

    One band is grey, three are red, green and blue, two are a complex number, whose magnitude is
    shown from 0 (black) to the upper end of `value_range`; the mean is that of complex numbers.
    Any other number of bands is shown as their average.

    Arguments:
        truth: Clean images, shape (n, C, H, W), in data units, or None where nobody knows them.
        observed: Observations brought to the images' shape, shape (n, C, H, W), in data units
            (`observed_images`); None leaves them out.
        seen: Which pixels were observed, shape (n, 1, H, W); the others are shown in blue. None
            shows all.
        draws: Posterior samples, shape (S, n, C, H, W), in data units, S >= 2.
        value_range: The values of black and white.
        title: A line above the picture.

    Returns:
        A PNG file.
    """
    low, high = value_range
    rows: list[tuple[str, NDArray[np.float64]]] = []
    if truth is not None:
        rows.append(("truth", to_rgb(truth, low, high)))
    if observed is not None:
        observation = to_rgb(observed, low, high)
        if seen is not None:
            hidden = ~np.broadcast_to(seen[:, 0, :, :, None], observation.shape)
            observation = np.where(hidden, np.array([0.16, 0.24, 0.42]), observation)
        rows.append(("observed", observation))
    rows += [
        (f"sample {s + 1}", to_rgb(draws[s], low, high))
        for s in range(min(_SHOWN_DRAWS, len(draws)))
    ]
    rows.append((f"mean of {len(draws)}", to_rgb(draws.mean(axis=0), low, high)))
    spread = _spread(draws)
    count, height, width = spread.shape

    cell = 0.62
    figure = Figure(
        figsize=(cell * count + 1.35, cell * (len(rows) + 1) * height / width + 0.45), dpi=150
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows) + 1, 1, gridspec_kw={"hspace": 0.06})
    for axis, (label, images) in zip(axes, rows, strict=False):
        axis.imshow(_mosaic(images), interpolation="nearest", aspect="equal")
        _label(axis, label)
    shown = axes[-1].imshow(
        _mosaic(spread[..., None], gap=np.nan)[..., 0],
        interpolation="nearest",
        aspect="equal",
        cmap="magma",
        vmin=0,
        vmax=(high if draws.shape[2] == 2 else high - low) / 3,
    )
    _label(axes[-1], "std. dev.")
    top = 1 - 0.34 / figure.get_figheight()
    figure.subplots_adjust(
        left=0.95 / figure.get_figwidth(),
        right=1 - 0.5 / figure.get_figwidth(),
        top=top,
        bottom=0.02,
    )
    box = axes[-1].get_position()
    bar = figure.colorbar(shown, cax=figure.add_axes((box.x1 + 0.01, box.y0, 0.012, box.height)))
    bar.ax.tick_params(labelsize=6)
    figure.suptitle(title, fontsize=9, y=1 - 0.08 / figure.get_figheight(), va="top")
    return _png(figure)


def vector_preview(
    *,
    truth: NDArray[np.float32] | None,
    draws: NDArray[np.float32],
    title: str,
    points: int = 4000,
) -> bytes:
    """Draw reconstructions of vectors, and clean vectors, as scatter plots of coordinate pairs.

    Arguments:
        truth: Clean vectors, shape (n, D), in data units, or None.
        draws: One reconstruction per observation, shape (m, D), in data units.
        title: A line above the picture.
        points: At most so many points are drawn.

    Returns:
        A PNG file.
    """
    pairs = [(i, i + 1) for i in range(min(draws.shape[1] - 1, 4))] or [(0, 0)]
    clouds = [("reconstructions", draws, "#1f5fa8")]
    if truth is not None:
        clouds.insert(0, ("truth", truth, "#333333"))
    figure = Figure(
        figsize=(2.1 * len(pairs), 2.1 * len(clouds) + 0.4), dpi=130, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(clouds), len(pairs), squeeze=False, sharex="col", sharey="col")
    for row, (label, cloud, colour) in zip(axes, clouds, strict=True):
        for axis, (i, j) in zip(row, pairs, strict=True):
            axis.plot(cloud[:points, i], cloud[:points, j], ",", color=colour, alpha=0.6)
            axis.set_aspect("equal", adjustable="box")
            axis.tick_params(labelsize=6)
            axis.set_xlabel(f"$x_{i}$", fontsize=7)
        row[0].set_ylabel(label, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return _png(figure)


def to_rgb(images: NDArray[np.float32], low: float, high: float) -> NDArray[np.float64]:
    """Bring (n, C, H, W) to (n, H, W, 3) in [0, 1]; anything but three bands becomes grey."""
    values = np.asarray(images, np.float64)
    if values.shape[1] == 2:
        values, low = np.sqrt(np.square(values).sum(axis=1, keepdims=True)), 0.0
    scaled = np.clip((values - low) / (high - low), 0, 1)
    if scaled.shape[1] != 3:
        scaled = np.repeat(scaled.mean(axis=1, keepdims=True), 3, axis=1)
    return np.moveaxis(scaled, 1, -1)


def _spread(draws: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the standard deviation of draws (S, n, C, H, W) at each pixel, shape (n, H, W)."""
    variance = draws.astype(np.float64).var(axis=0, ddof=1)
    # A complex number varies as far as both of its parts together.
    return np.asarray(
        np.sqrt(variance.sum(axis=1) if draws.shape[2] == 2 else variance.mean(axis=1))
    )


def _mosaic(images: NDArray[np.float64], gap: float = 1.0) -> NDArray[np.float64]:
    """Set images (n, H, W, c) side by side, a tenth of their width apart."""
    _, height, width, bands = images.shape
    space = np.full((height, max(1, width // 10), bands), gap)
    parts = [part for image in images for part in (image, space)]
    return np.concatenate(parts[:-1], axis=1)


def _label(axis: Axes, text: str) -> None:
    axis.set_axis_off()
    axis.text(-0.012, 0.5, text, transform=axis.transAxes, ha="right", va="center", fontsize=7.5)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
