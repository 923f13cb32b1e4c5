import numpy as np

from storage_schemas.benchmark import CODECS, measure_codecs, noisy_images


def test_every_codec_is_measured() -> None:
    table = {line.codec: line for line in measure_codecs(noisy_images(64), repetitions=1)}
    assert table.keys() == CODECS.keys()
    # Ratios are no timings: bits of like meaning side by side are what compresses noisy floats.
    assert 0.98 < table["none"].ratio < 1
    assert table["blosc lz4 5 bitshuffle"].ratio > 1.1 > table["blosc lz4 5 noshuffle"].ratio


def test_images_are_smooth_and_noisy() -> None:
    images = noisy_images(50, shape=(1, 64, 64))
    assert (images.shape, images.dtype) == ((50, 1, 64, 64), np.float32)
    steps = np.diff(images, axis=-1).std(axis=(1, 2, 3))
    # Noise of 0.05 alone makes steps of 0.05 sqrt 2 = 0.071; the waves add at most 6 / 63 = 0.095.
    assert np.all((steps > 0.065) & (steps < 0.13))
