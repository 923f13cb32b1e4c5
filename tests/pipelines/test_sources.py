"""The bundled data sets, as they come out of their packages."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipelines.sources import load_clean_samples, smooth_manifold
from storage_schemas.config import DigitsData, ManifoldData, Mnist5kData


def test_digits_keep_scikit_learns_order_and_units() -> None:
    samples = load_clean_samples(DigitsData(), seed=0)
    assert samples.x.shape == (1797, 1, 8, 8)
    assert samples.x.dtype == np.float32
    np.testing.assert_array_equal(samples.x[:, 0], load_digits().images)
    assert samples.label is not None
    np.testing.assert_array_equal(samples.label, load_digits().target)


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


def test_limit_takes_the_first_samples() -> None:
    samples = load_clean_samples(DigitsData(limit=300), seed=0)
    np.testing.assert_array_equal(samples.x[:, 0], load_digits().images[:300])


def test_holding_everything_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.holdout is 250 but there are only 200 samples"):
        DigitsData(limit=200)
