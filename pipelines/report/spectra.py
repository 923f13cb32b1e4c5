"""Power spectra of reconstructions and observations: what smoothing or added noise looks like.

The power P(f) of an image is the mean of |DFT(x - mean x)|^2 / (H W) over the frequencies whose
length rounds to one ring of the grid, in squared data units. Few-step samplers lose the high
frequencies iteration by iteration, which a distance need not show.

In observation space, reconstructions are corrupted with the operators of held-out observations
and compared with these, both brought to the shape of images by the same `observed_images`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.run_store import RunStore

if TYPE_CHECKING:
    from torch import Tensor

    from diffem_core.channel import Channel

__all__ = ["Spectra", "Spectrum", "power_spectrum", "read_spectra"]

_SAMPLES = 256
_LEAST = 4


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The mean spectrum of some images."""

    name: str
    reference: bool
    """Whether the others are to come near to it."""
    power: tuple[float, ...]
    """Power of each ring, in squared data units."""


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """The spectra of a run."""

    frequencies: tuple[float, ...]
    """Cycles per pixel of each ring."""
    samples: int
    """How many images of each kind."""
    images: tuple[Spectrum, ...]
    """Reconstructions of the first and the last iteration, and clean images where known."""
    observations: tuple[Spectrum, ...]
    """Held-out observations and corrupted reconstructions; empty where they are no images."""


def power_spectrum(images: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean radial power spectrum of images.

    Arguments:
        images: Shape (n, C, H, W), in data units.

    Returns:
        Frequencies in cycles per pixel, and the power of each, both of shape (rings,): from the
        longest wave that fits the shorter side to half a cycle per pixel.
    """
    x = np.asarray(images, np.float64)
    height, width = x.shape[-2:]
    x = x - x.mean(axis=(-2, -1), keepdims=True)
    power = (np.abs(np.fft.fft2(x)) ** 2).mean(axis=(0, 1)) / (height * width)
    least = min(height, width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]) * least
    ring = np.rint(radius).astype(int)
    rings = np.arange(1, least // 2 + 1)
    return rings / least, np.array([power[ring == r].mean() for r in rings])


def read_spectra(store: RunStore) -> Spectra | None:
    """Read some reconstructions and observations of a run and return their spectra.

    Arguments:
        store: The run.

    Returns:
        None where the samples are no images, or no iteration is complete.

    Raises:
        DamageError: If an array is not what was written.
    """
    completed = store.completed()
    seal = store.observations_manifest()
    if not completed or seal is None or len(seal.x_shape) != 3 or min(seal.x_shape[1:]) < _LEAST:
        return None
    holdout = store.observations("holdout")
    count = min(_SAMPLES, len(holdout), completed[-1].samples)
    if count == 0:
        return None
    rows = slice(0, count)
    chosen = dict.fromkeys((0, completed[-1].iteration))
    reconstructed = {
        iteration: store.iteration(iteration).read_reconstructions(rows) for iteration in chosen
    }
    images = [_spectrum(f"iteration {iteration:03d}", x) for iteration, x in reconstructed.items()]
    truth = holdout.truth(rows)
    if truth is not None:
        images.append(_spectrum("clean images", truth, reference=True))
    observations: list[Spectrum] = []
    pair = _observed(store, holdout.y(rows), holdout.params(rows), reconstructed, seal.x_shape)
    for name, seen in pair.items():
        observations.append(_spectrum(name, seen, reference=name == "observed"))
    frequencies, _ = power_spectrum(reconstructed[0])
    return Spectra(
        frequencies=tuple(frequencies.tolist()),
        samples=count,
        images=tuple(images),
        observations=tuple(observations),
    )


def _spectrum(name: str, images: NDArray[Any], *, reference: bool = False) -> Spectrum:
    _, power = power_spectrum(images)
    return Spectrum(name=name, reference=reference, power=tuple(power.tolist()))


def _observed(
    store: RunStore,
    y: NDArray[Any],
    params: dict[str, NDArray[Any]],
    reconstructed: dict[int, NDArray[Any]],
    x_shape: tuple[int, ...],
) -> dict[str, NDArray[Any]]:
    import torch

    from diffem_core.seeds import derive_seed
    from pipelines import build

    channel = build.build_channel(store.config.channel, x_shape)
    operators = {name: torch.from_numpy(value) for name, value in params.items()}
    seen = _seen(channel, torch.from_numpy(y), operators)
    if seen is None:
        return {}
    shown = {"observed": seen.numpy()}
    for iteration, x in reconstructed.items():
        key = derive_seed(store.config.seed, "report", "spectra", iteration)
        generator = torch.Generator().manual_seed(key)
        x_hat = torch.from_numpy(np.asarray(x, np.float32))
        with torch.no_grad():
            y_tilde = channel.corrupt(x_hat, operators, generator=generator)
        again = _seen(channel, y_tilde, operators)
        assert again is not None, "the real observations are images"
        shown[f"iteration {iteration:03d}, corrupted"] = again.numpy()
    return shown


def _seen(channel: Channel, y: Tensor, params: dict[str, Tensor]) -> Tensor | None:
    from pipelines.preview import observed_images

    return observed_images(channel, y, params)
