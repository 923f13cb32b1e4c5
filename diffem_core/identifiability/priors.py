"""What is assumed of x where nothing has been fitted: a stand-in prior, and fitted ones beside it.

An identifiability analysis weighs directions of x by how much x varies along them. Without a
fitted prior, images are taken to be stationary with a power spectrum that falls as

    S(f) = c / (|f|^2 + f_0^2),         f in cycles per pixel, f_0 = 1 / max(H, W)

as that of most photographs does, bands independent; vectors are taken to be white.

References:
    Field 1987 (Relations between the statistics of natural images and the response properties of
    cortical cells), for the spectrum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffem_core.gaussian_prior import GaussianPrior

__all__ = ["FittedPrior", "StandInPrior", "VariancePrior"]


class VariancePrior(Protocol):
    """What the analysis asks of a Gaussian prior N(m, S) of x with D entries."""

    def variances(self) -> Tensor:
        """Return the diagonal of S, of shape (D,)."""
        ...

    def times(self, v: Tensor) -> Tensor:
        """Multiply S by vectors v of shape (D, K)."""
        ...

    def draw(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw samples of shape (n, D)."""
        ...


@dataclass(frozen=True, kw_only=True)
class StandInPrior:
    """A prior for those who know the range of the data only.

    Arguments:
        x_shape: Shape of a sample, (C, H, W) or (D,).
        center: Mean of every entry, in the data's units.
        std: Standard deviation of every entry, in the data's units, positive.

    Raises:
        ValueError: `std` is not positive.
    """

    x_shape: tuple[int, ...]
    center: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"StandInPrior received std {self.std}; give a positive number")

    def variances(self) -> Tensor:
        """Return the diagonal of S, of shape (D,)."""
        return torch.full((math.prod(self.x_shape),), self.std**2, dtype=torch.float64)

    def times(self, v: Tensor) -> Tensor:
        """Multiply S by vectors v of shape (D, K)."""
        return self._filtered(v, self._spectrum()) if len(self.x_shape) == 3 else self.std**2 * v

    def draw(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw samples of shape (n, D), in float32: there may be many entries."""
        z = torch.randn(math.prod(self.x_shape), n, generator=generator)
        if len(self.x_shape) != 3:
            return self.center + self.std * z.mT
        return self.center + self._filtered(z, self._spectrum().sqrt()).mT

    def _spectrum(self) -> Tensor:
        _, height, width = self.x_shape
        rows = torch.fft.fftfreq(height, dtype=torch.float64)
        columns = torch.fft.fftfreq(width, dtype=torch.float64)
        power = 1 / (rows[:, None].square() + columns.square() + 1 / max(height, width) ** 2)
        spectrum: Tensor = self.std**2 * power / power.mean()
        return spectrum

    def _filtered(self, v: Tensor, transfer: Tensor) -> Tensor:
        if not v.shape[1]:
            return v
        images = v.mT.reshape(-1, *self.x_shape)
        spectrum = torch.fft.fft2(images) * transfer.to(v.dtype)
        back: Tensor = torch.fft.ifft2(spectrum).real
        return back.flatten(1).mT


@dataclass(frozen=True, kw_only=True)
class FittedPrior:
    """A fitted Gaussian prior.

    Arguments:
        prior: The prior, in the data's units.
    """

    prior: GaussianPrior

    def variances(self) -> Tensor:
        """Return the diagonal of S, of shape (D,)."""
        return self.prior.factor.square().sum(1) + self.prior.diag

    def times(self, v: Tensor) -> Tensor:
        """Multiply S by vectors v of shape (D, K)."""
        factor = self.prior.factor.to(v.dtype)
        return factor @ (factor.mT @ v) + self.prior.diag.to(v.dtype).unsqueeze(1) * v

    def draw(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw samples of shape (n, D)."""
        size, rank = self.prior.factor.shape
        z = torch.randn(n, rank + size, generator=generator, dtype=self.prior.mean.dtype)
        drawn = z[:, :rank] @ self.prior.factor.mT + z[:, rank:] * self.prior.diag.sqrt()
        return self.prior.mean + drawn
