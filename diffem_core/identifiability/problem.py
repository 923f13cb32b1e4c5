"""What every way of looking at a channel works with, and what each of them finds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.identifiability.normals import Normals
from diffem_core.identifiability.pairs import Pairs
from diffem_core.identifiability.priors import StandInPrior, VariancePrior
from diffem_core.identifiability.report import Method
from diffem_core.seeds import derive_seed

__all__ = ["FLOOR", "Look", "Problem", "spread"]

FLOOR = 1e-6  # Part of the greatest level below which rounding (float32) may be all of one.


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A channel, a batch of its operators, and what is assumed of x and known of the noise."""

    channel: Channel
    params: Mapping[str, Tensor]
    """Parameters of the operators; of one where all are the same."""
    fixed: bool
    """Whether all are the same."""
    prior: VariancePrior
    observations: int
    noise_std: float
    seed: int

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a sample."""
        return self.channel.x_shape

    @property
    def size(self) -> int:
        """Entries of x."""
        return math.prod(self.channel.x_shape)

    @property
    def image(self) -> bool:
        """Whether x is an image (C, H, W)."""
        return len(self.channel.x_shape) == 3

    def generator(self, name: str) -> torch.Generator:
        """Return a source of randomness of its own for a purpose."""
        return torch.Generator().manual_seed(derive_seed(self.seed, name))

    def samples(self, n: int) -> Tensor:
        """Draw samples of the prior, of shape (n, *x_shape), float32.

        Those of a stand-in stay within 2 standard deviations of its mean: some channels (photon
        counts) take no values outside the data's range.
        """
        drawn = self.prior.draw(n, generator=self.generator("samples"))
        if isinstance(self.prior, StandInPrior):
            center, reach = self.prior.center, 2 * self.prior.std
            drawn = drawn.clamp(center - reach, center + reach)
        return drawn.reshape(n, *self.x_shape).float()

    def deviations(self, n: int) -> Tensor:
        """Draw samples of the prior around its mean, of shape (n, *x_shape), float32."""
        drawn = self.prior.draw(2 * n, generator=self.generator("deviations"))
        return ((drawn[:n] - drawn[n:]) / math.sqrt(2)).reshape(n, *self.x_shape).float()

    def needed(self, p: Tensor, variance: Tensor) -> Tensor:
        """Compute the observations that tell a variance from that of the noise.

        Arguments:
            p: Levels of n operators in K directions, of shape (n, K).
            variance: Of x along them, of shape (K,).

        Returns:
            2 / E[(q / (1 + q))^2] with q = p variance / sigma^2, of shape (K,).
        """
        if self.noise_std == 0:
            information = (p > 0).double() * (variance > 0)
        else:
            q = p * (variance / self.noise_std**2)
            information = (q / (1 + q)).square()
        return 2 / information.mean(0)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a way of looking found; see `Identifiability` for each."""

    method: Method
    operators: int
    level: Tensor
    share: Tensor
    energy: Tensor
    needed: Tensor
    floor: float
    settled: bool
    seen_once: float | None
    entries: Tensor | None
    frequencies: Tensor | None
    lost_variance: Tensor | None
    never_seen: Tensor
    pairs: Pairs | None
    error: float = 0.0
    entries_error: float = 0.0
    together: Tensor | None = None
    roughness: float = 1.0


def spread(normals: Normals, most: int) -> Normals:
    """Take so many operators, spread over all: stored ones should not be those of one day."""
    if normals.count <= most:
        return normals
    return normals.take(torch.linspace(0, normals.count - 1, most).round().long())
