"""Grids of samples as PNG files."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.preview import to_rgb, vector_preview

__all__ = ["sample_grid"]

_SMALLEST_SIDE = 48  # pixels of a sample in the picture
_GAP = 2


def sample_grid(
    x: NDArray[np.float32], value_range: tuple[float, float] | None, *, title: str
) -> bytes:
    """Draw samples side by side, as nearly square as they are many.

    Images are shown as in the previews of a run: one band grey, three red, green and blue, two
    the magnitude of a complex number. Vectors become scatter plots of coordinate pairs.

    Arguments:
        x: Samples, shape (n, C, H, W) or (n, D), in data units.
        value_range: The values of black and white; None for vectors.
        title: A line above the picture of vectors.

    Returns:
        A PNG file.
    """
    if x.ndim == 2:
        return vector_preview(truth=None, draws=x, title=title)
    assert value_range is not None, "images have a range"
    cells = (255 * to_rgb(x, *value_range) + 0.5).astype(np.uint8)
    n, height, width, _ = cells.shape
    zoom = max(1, -(-_SMALLEST_SIDE // min(height, width)))
    cells = cells.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = zoom * height + _GAP, zoom * width + _GAP
    columns = math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    picture = np.full((rows * height - _GAP, columns * width - _GAP, 3), 255, np.uint8)
    for index, cell in enumerate(cells):
        top, left = index // columns * height, index % columns * width
        picture[top : top + height - _GAP, left : left + width - _GAP] = cell
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png")
    return buffer.getvalue()
