"""Linear operators on images with parameters of their own for each sample, and their generators.

They are deepinv physics and deepinv generators: the ones that deepinv does not have, or that it
computes sample by sample in Python.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from deepinv.physics import LinearPhysics
from deepinv.physics.generator import PhysicsGenerator
from torch import Tensor

__all__ = [
    "BlockAverage",
    "FourierBlur",
    "LineMaskGenerator",
    "MaskedBasis",
    "ShiftGenerator",
    "SubsetGenerator",
    "UniformGenerator",
]


class BlockAverage(LinearPhysics):  # type: ignore[misc]
    """Averages square blocks of pixels, on a grid that may be shifted for each sample.

    Arguments:
        factor: Side of a block.
        noise_model: deepinv noise model.
    """

    def __init__(self, factor: int, *, noise_model: Any) -> None:
        super().__init__(noise_model=noise_model)
        self.factor = factor
        self.register_buffer("shift", None)

    def A(self, x: Tensor, shift: Tensor | None = None, **kwargs: object) -> Tensor:
        """Average the blocks of (n, C, H, W), which begin at each sample's shift (y, x)."""
        self.update_parameters(shift=shift)
        return F.avg_pool2d(self._rolled(x, -1), self.factor)

    def A_adjoint(self, y: Tensor, shift: Tensor | None = None, **kwargs: object) -> Tensor:
        """Spread each value evenly over its block."""
        return self.A_dagger(y, shift) / self.factor**2

    def A_dagger(self, y: Tensor, shift: Tensor | None = None, **kwargs: object) -> Tensor:
        """Repeat each value over its block."""
        self.update_parameters(shift=shift)
        blocks = y.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)
        return self._rolled(blocks, 1)

    def _rolled(self, x: Tensor, sign: int) -> Tensor:
        """Move images by their shifts, around the edges."""
        if self.shift is None:
            return x
        shift = sign * self.shift.to(torch.int64)
        n, bands, height, width = x.shape
        rows = (torch.arange(height, device=x.device) - shift[:, 0, None]) % height
        columns = (torch.arange(width, device=x.device) - shift[:, 1, None]) % width
        samples = torch.arange(n, device=x.device).reshape(n, 1, 1, 1)
        return x[
            samples,
            torch.arange(bands, device=x.device).reshape(1, bands, 1, 1),
            rows.reshape(-1, 1, height, 1),
            columns.reshape(-1, 1, 1, width),
        ]


class FourierBlur(LinearPhysics):  # type: ignore[misc]
    """Blurs with a Gaussian around the edges, with a width of its own for each sample.

    The transfer function is exp(-2 pi^2 sigma^2 |f|^2), f in cycles per pixel.

    Arguments:
        size: Height and width.
        noise_model: deepinv noise model.
    """

    def __init__(self, size: tuple[int, int], *, noise_model: Any) -> None:
        super().__init__(noise_model=noise_model)
        self.register_buffer("sigma", None)
        rows, columns = torch.fft.fftfreq(size[0]), torch.fft.rfftfreq(size[1])
        self.register_buffer("square", rows[:, None].square() + columns.square())

    def A(self, x: Tensor, sigma: Tensor | None = None, **kwargs: object) -> Tensor:
        """Blur (n, C, H, W), with sigma in pixels of shape (n,), (n, 1) or (1,)."""
        self.update_parameters(sigma=sigma)
        y: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * self._transfer(), s=x.shape[-2:])
        return y

    def A_adjoint(self, y: Tensor, sigma: Tensor | None = None, **kwargs: object) -> Tensor:
        """Blur again: the operator is symmetric."""
        return self.A(y, sigma)

    def A_dagger(self, y: Tensor, sigma: Tensor | None = None, **kwargs: object) -> Tensor:
        """Divide by the transfer function where that is more than 1e-3, else give 0."""
        self.update_parameters(sigma=sigma)
        transfer = self._transfer()
        inverse = torch.where(transfer > 1e-3, 1 / transfer, 0.0)
        x: Tensor = torch.fft.irfft2(torch.fft.rfft2(y) * inverse, s=y.shape[-2:])
        return x

    def _transfer(self) -> Tensor:
        width = self.sigma.reshape(-1, 1, 1, 1)
        transfer: Tensor = torch.exp(-2 * math.pi**2 * width.square() * self.square)
        return transfer


class MaskedBasis(LinearPhysics):  # type: ignore[misc]
    """Coefficients of images in one random orthonormal basis, a subset of them for each sample.

    Arguments:
        x_shape: Shape (C, H, W) of an image, and of its coefficients.
        rng: Source of the basis.
        noise_model: deepinv noise model; coefficients that are not taken carry no noise.
    """

    def __init__(
        self, x_shape: tuple[int, ...], *, rng: torch.Generator, noise_model: Any
    ) -> None:
        super().__init__(noise_model=noise_model)
        size = math.prod(x_shape)
        normal = torch.randn(size, size, generator=rng, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        # With the signs of R's diagonal, Q is uniform over the orthogonal matrices.
        self.register_buffer("basis", (q * r.diagonal().sign()).float())
        self.register_buffer("mask", None)

    def A(self, x: Tensor, mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """Compute the coefficients that are taken, 0 elsewhere."""
        self.update_parameters(mask=mask)
        coefficients: Tensor = (x.flatten(1) @ self.basis).reshape(x.shape)
        taken: Tensor = coefficients * self.mask
        return taken

    def A_adjoint(self, y: Tensor, mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """Add up the basis images of the coefficients that are taken."""
        self.update_parameters(mask=mask)
        x: Tensor = ((y * self.mask).flatten(1) @ self.basis.mT).reshape(y.shape)
        return x

    def A_dagger(self, y: Tensor, mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """Do as the adjoint does: the rows are orthonormal."""
        return self.A_adjoint(y, mask)

    def noise(self, x: Tensor, **kwargs: object) -> Tensor:
        """Add noise to the coefficients that are taken."""
        noisy: Tensor = self.noise_model(x, **kwargs) * self.mask
        return noisy


class ShiftGenerator(PhysicsGenerator):  # type: ignore[misc]
    """Shifts (y, x) by whole pixels, uniform over a block.

    Arguments:
        factor: Side of a block.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        """Draw shifts in {0, ..., factor - 1}, as floats of shape (batch_size, 2)."""
        self.rng_manual_seed(seed)
        size = (batch_size, 2)
        shift = torch.randint(self.factor, size, generator=self.rng, device=self.rng.device)
        return {"shift": shift.float()}


class UniformGenerator(PhysicsGenerator):  # type: ignore[misc]
    """One number for each sample, uniform in an interval.

    Arguments:
        name: Name of the parameter.
        low: Lower end.
        high: Upper end.
    """

    def __init__(self, name: str, low: float, high: float) -> None:
        super().__init__()
        self.name = name
        self.low = low
        self.high = high

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        """Draw numbers of shape (batch_size, 1)."""
        self.rng_manual_seed(seed)
        u = torch.rand(batch_size, 1, generator=self.rng, device=self.rng.device)
        return {self.name: self.low + (self.high - self.low) * u}


class SubsetGenerator(PhysicsGenerator):  # type: ignore[misc]
    """Masks with a given number of ones in random places.

    Arguments:
        shape: Shape of a mask.
        count: Number of ones.
    """

    def __init__(self, shape: tuple[int, ...], *, count: int) -> None:
        super().__init__()
        self.shape = shape
        self.count = count

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        """Draw masks in {0, 1}, of shape (batch_size, *shape)."""
        self.rng_manual_seed(seed)
        size = (batch_size, math.prod(self.shape))
        u = torch.rand(size, generator=self.rng, device=self.rng.device)
        chosen = u.topk(self.count, dim=1).indices
        mask = torch.zeros_like(u).scatter_(1, chosen, 1.0)
        return {"mask": mask.reshape(batch_size, *self.shape)}


class LineMaskGenerator(PhysicsGenerator):  # type: ignore[misc]
    """Masks of k-space whose columns are measured independently, the central ones always.

    (deepinv's own line generators loop over the samples in Python.)

    Arguments:
        size: Height and width.
        acceleration: Columns per measured column, on average, at least 1.
        center: Fraction of the columns, around the middle, that are always measured.
    """

    def __init__(self, size: tuple[int, int], *, acceleration: float, center: float) -> None:
        super().__init__()
        width = size[1]
        count = round(center * width)
        if not (acceleration >= 1 and 0 <= center < 1 and count * acceleration <= width):
            raise ValueError(
                f"LineMaskGenerator received acceleration {acceleration} and center {center}; the "
                f"{count} central of "
                f"{width} columns must not be more than a fraction 1 / acceleration of them"
            )
        self.size = size
        probability = torch.full((width,), (width / acceleration - count) / max(1, width - count))
        start = (width - count) // 2
        probability[start : start + count] = 1.0
        self.probability = probability

    def step(
        self, batch_size: int = 1, seed: int | None = None, **kwargs: object
    ) -> dict[str, Tensor]:
        """Draw masks in {0, 1}, of shape (batch_size, 2, H, W), equal for both parts."""
        self.rng_manual_seed(seed)
        u = torch.rand(batch_size, 1, 1, self.size[1], generator=self.rng, device=self.rng.device)
        mask = (u < self.probability.to(u.device)).float()
        return {"mask": mask.expand(-1, 2, *self.size).contiguous()}
