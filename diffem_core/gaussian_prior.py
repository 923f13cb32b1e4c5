"""Gaussian priors N(m, F F' + diag(d)) over the flattened entries of x."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

__all__ = ["GaussianPrior"]


@dataclass(frozen=True, kw_only=True)
class GaussianPrior:
    """N(mean, factor factor' + diag(diag)) over the flattened entries of x.

    Arguments:
        mean: Of shape (D,).
        factor: Of shape (D, R).
        diag: Of shape (D,), not negative.
    """

    mean: Tensor
    factor: Tensor
    diag: Tensor

    def __post_init__(self) -> None:
        size = len(self.mean)
        if self.factor.ndim != 2 or len(self.factor) != size or self.diag.shape != (size,):
            raise ValueError(
                f"GaussianPrior received mean {tuple(self.mean.shape)}, factor "
                f"{tuple(self.factor.shape)} and diag {tuple(self.diag.shape)}; give (D,), (D, R) "
                "and (D,)"
            )

    def covariance(self) -> Tensor:
        """Compute the covariance, of shape (D, D)."""
        return self.factor @ self.factor.mT + torch.diag(self.diag)

    @functools.cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the covariance, of shape (D,), and eigenvectors, of shape (D, D)."""
        values, vectors = torch.linalg.eigh(self.covariance())
        return values.clamp_min(0), vectors

    def to(self, device: torch.device | str) -> Self:
        """Return the prior on a device."""
        return type(self)(
            mean=self.mean.to(device), factor=self.factor.to(device), diag=self.diag.to(device)
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the prior as named tensors."""
        return {"mean": self.mean, "factor": self.factor, "diag": self.diag}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Build a prior from what `tensors` returned."""
        return cls(**{name: tensors[name].double() for name in ("mean", "factor", "diag")})

    @classmethod
    def from_samples(cls, x: Tensor, *, rank: int) -> Self:
        """Fit a prior to samples by probabilistic principal component analysis.

        Arguments:
            x: Samples of shape (n, ...).
            rank: Number of components, at least 1 and less than the number of entries of a sample.

        Returns:
            The prior whose factor holds the leading components and whose diagonal is the mean
            variance of the others.

        References:
            Tipping and Bishop 1999 (Mixtures of probabilistic principal component analysers).
        """
        x = x.flatten(1).double()
        size = x.shape[1]
        if not 1 <= rank < size:
            raise ValueError(
                f"from_samples received rank {rank} for {size} entries; give 1 to {size - 1}"
            )
        mean = x.mean(0)
        covariance = torch.cov(x.mT, correction=0)
        values, vectors = torch.linalg.eigh(covariance)
        rest = (values.sum() - values[-rank:].sum()).clamp_min(0) / (size - rank)
        factor = vectors[:, -rank:] * (values[-rank:] - rest).clamp_min(0).sqrt()
        return cls(mean=mean, factor=factor, diag=torch.full_like(mean, float(rest)))

    def rescaled(self, center: float, scale: float) -> Self:
        """Return the prior of scale (x - center)."""
        return type(self)(
            mean=(self.mean - center) * scale,
            factor=self.factor * scale,
            diag=self.diag * scale**2,
        )

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Self:
        """Build a prior with a full covariance, whose eigenvalues below 0 count as 0."""
        values, vectors = torch.linalg.eigh(covariance)
        factor = vectors * values.clamp_min(0).sqrt()
        return cls(mean=mean, factor=factor, diag=torch.zeros_like(mean))

    def denoise(self, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Compute E[x | x_t] for x_t = x + sigma_t z, the exact denoiser of this prior.

            E[x | x_t] = x_t - sigma_t^2 (S + sigma_t^2 I)^-1 (x_t - m)

        Arguments:
            x_t: Noisy samples of shape (n, ...), in the prior's units.
            sigma_t: Noise levels of shape (n,), or (1,) for one level shared by all.

        Returns:
            Estimates of the shape and type of x_t.
        """
        r = x_t.flatten(1).to(self.mean.dtype) - self.mean
        variance = sigma_t.reshape(-1, 1).to(self.mean.dtype).square()
        diag = self.diag + variance
        scaled = r / diag
        # Woodbury: (D + F F')^-1 = D^-1 - D^-1 F (I + F' D^-1 F)^-1 F' D^-1
        inner = torch.einsum("dr,nd,ds->nrs", self.factor, 1 / diag, self.factor)
        inner = inner + torch.eye(self.factor.shape[1], dtype=r.dtype, device=r.device)
        projected = scaled @ self.factor
        if len(inner) == 1:  # One noise level for all: one factorization.
            u = torch.linalg.solve(inner[0], projected.mT).mT
        else:
            u = torch.linalg.solve(inner, projected)
        solved = scaled - (u @ self.factor.mT) / diag
        step: Tensor = (variance * solved).reshape(x_t.shape).to(x_t.dtype)
        return x_t - step
