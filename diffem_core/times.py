"""Distributions of the time at which the denoiser is trained.

Each draws through its quantile function at uniforms that are stratified within the batch (one in
each of n equal intervals), so that every batch sees the whole range of noise levels: the loss is
still unbiased, its variance lower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffem_core.schedule import Schedule

__all__ = ["BetaMixtureTime", "BetaTime", "LogNormalTime", "TimeDistribution", "UniformTime"]

_KNOTS = 4096


class TimeDistribution(Protocol):
    """Anything that draws training times."""

    def sample(
        self,
        n: int,
        *,
        schedule: Schedule,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw n times in [0, 1].

        Arguments:
            n: Number of times.
            schedule: The noise schedule, for distributions that are stated in sigma.
            generator: Source of the uniforms, on `device`.
            device: Device of the result.

        Returns:
            Float32 times of shape (n,), one in each of n strata, in increasing order of strata.
        """
        ...


def _strata(n: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    u = torch.rand(n, generator=generator, device=device, dtype=torch.float32)
    return (u + torch.arange(n, device=device)) / n


@dataclass(frozen=True, kw_only=True)
class UniformTime:
    """t ~ U(0, 1)."""

    def sample(
        self,
        n: int,
        *,
        schedule: Schedule,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw n times in [0, 1]; see `TimeDistribution.sample`."""
        return _strata(n, generator, device)


@dataclass(frozen=True, kw_only=True)
class BetaTime:
    """t ~ Beta(a, b); the paper takes a = b = 3.

    The quantile function is tabulated at knots that are dense in both tails and interpolated
    linearly in between.

    Arguments:
        a: First shape parameter, positive.
        b: Second shape parameter, positive.
    """

    a: float = 3.0
    b: float = 3.0
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not (self.a > 0 and self.b > 0):
            raise ValueError(
                f"BetaTime received a = {self.a} and b = {self.b}; both must be positive"
            )

    def sample(
        self,
        n: int,
        *,
        schedule: Schedule,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw n times in [0, 1]; see `TimeDistribution.sample`."""
        return self.quantile(_strata(n, generator, device))

    def quantile(self, u: Tensor) -> Tensor:
        """Compute the time below which a fraction u of the draws lies, of the same shape."""
        knots, values = self._table(u.device)
        right = torch.searchsorted(knots, u, right=True).clamp_(1, len(knots) - 1)
        left = right - 1
        weight = (u - knots[left]) / (knots[right] - knots[left])
        return torch.lerp(values[left], values[right], weight)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            from scipy.special import betaincinv

            # sin^2 spaces the knots quadratically close to 0 and 1, where the quantile function
            # bends.
            knots = np.sin(np.linspace(0.0, np.pi / 2, _KNOTS)) ** 2
            values = betaincinv(self.a, self.b, knots)
            self._tables[device] = (
                torch.from_numpy(knots).to(device, torch.float32),
                torch.from_numpy(values).to(device, torch.float32),
            )
        return self._tables[device]


@dataclass(frozen=True, kw_only=True)
class BetaMixtureTime:
    """t from one of two Beta distributions.

    The paper's manifold code takes Beta(2, 5) and Beta(5, 2) evenly.

    Arguments:
        first: The first distribution.
        second: The second distribution.
        weight: Probability of the first, in (0, 1).
    """

    first: BetaTime = field(default_factory=lambda: BetaTime(a=2.0, b=5.0))
    second: BetaTime = field(default_factory=lambda: BetaTime(a=5.0, b=2.0))
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(f"BetaMixtureTime received weight {self.weight}; give one in (0, 1)")

    def sample(
        self,
        n: int,
        *,
        schedule: Schedule,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw n times in [0, 1]; see `TimeDistribution.sample`."""
        u = _strata(n, generator, device)
        first = self.first.quantile((u / self.weight).clamp_max(1.0))
        second = self.second.quantile(((u - self.weight) / (1 - self.weight)).clamp_min(0.0))
        return torch.where(u < self.weight, first, second)


@dataclass(frozen=True, kw_only=True)
class LogNormalTime:
    """log sigma ~ N(mean, std^2), truncated to the schedule's range (EDM, table 1).

    Arguments:
        mean: Mean of log sigma.
        std: Standard deviation of log sigma, positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"LogNormalTime received std = {self.std}; it must be positive")

    def sample(
        self,
        n: int,
        *,
        schedule: Schedule,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw n times in [0, 1]; see `TimeDistribution.sample`."""
        low, high = (self._cdf(math.log(s)) for s in (schedule.sigma_min, schedule.sigma_max))
        if not high - low > 1e-6:
            raise ValueError(
                f"LogNormalTime with mean {self.mean} and std {self.std} puts less than 1e-6 of "
                f"its mass into the schedule's range [{schedule.sigma_min}, "
                f"{schedule.sigma_max}]; move the mean into it"
            )
        u = low + (high - low) * _strata(n, generator, device).double()
        log_sigma = self.mean + self.std * torch.special.ndtri(u)
        return schedule.t(log_sigma.exp()).clamp_(0.0, 1.0).float()

    def _cdf(self, log_sigma: float) -> float:
        return 0.5 * math.erfc((self.mean - log_sigma) / (self.std * math.sqrt(2)))
