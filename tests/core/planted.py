"""Planted cases that monitors are tried on: a world in closed form, and what goes wrong in it.

Clean images are x = m + B w with w ~ N(0, I_3) over 36 pixels, seen through random masks. Faulty
reconstructions are made of clean images themselves, so that everything but the fault is right.
"""

import math

import torch
from torch import Tensor

from diffem_core import RandomMask, Scaling, observation_features

SHAPE = (1, 6, 6)
KEEP, NOISE = 0.6, 0.3
SCALING = Scaling.identity()

Observations = tuple[Tensor, dict[str, Tensor]]


def clean(n: int, seed: int) -> Tensor:
    """Draw clean images."""
    basis = torch.randn(3, 36, generator=torch.Generator().manual_seed(0)) / math.sqrt(3)
    w = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return (w @ basis).reshape(n, *SHAPE)


def observe(x: Tensor, seed: int, *, keep: float = KEEP, noise: float = NOISE) -> Observations:
    """Corrupt images; by another channel than the true one, where asked to."""
    channel = RandomMask(SHAPE, keep=keep, noise_std=noise)
    generator = torch.Generator().manual_seed(seed)
    params = channel.draw_params(len(x), generator=generator)
    return channel.corrupt(x, params, generator=generator), params


def features(observed: Observations) -> Tensor:
    """Return what monitors compare of observations, one row each."""
    channel = RandomMask(SHAPE, keep=KEEP, noise_std=NOISE)
    return observation_features(channel, SCALING, *observed).flatten(1)


def collapsed(n: int, images: int, seed: int) -> Tensor:
    """Draw reconstructions that are all close to a few clean images."""
    few = clean(images, seed + 10_000)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(images, (n,), generator=generator)
    return few[rows] + 0.02 * torch.randn(n, *SHAPE, generator=generator)


def most_alarms(trials: int, level: float) -> int:
    """Return a count that alarms at their level exceed with a probability below 1e-4."""
    from scipy.stats import binom

    return int(binom.isf(1e-4, trials, level))
