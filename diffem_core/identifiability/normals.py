"""The normal operators P_i = A_i' A_i of a batch of observations, and what is averaged of them.

    H = E[A' A]        h_j = v_j' H v_j        p_ij = v_j' P_i v_j

Two maps of H come from draws w of independent signs, through the adjoint alone:

    E[(A' w)_j^2] = H_jj                        E|F A' w|_f^2 = (F H F*)_ff

An entry of x that no operator sees has exactly 0 in the first. A draw through one operator has a
relative variance of at most 2, so that with l the levels of the operators at an entry or frequency
the relative standard error of n draws is at most

    sqrt(2 / n) sqrt(E[l^2]) / E[l]                   sqrt(2 / n) where all operators show it alike
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from diffem_core.channel import Channel

__all__ = [
    "ChannelNormals",
    "MatrixNormals",
    "Normals",
    "band_power",
    "chunks",
    "combinations",
    "coverage",
    "filtered",
    "frequency_diagonal",
    "mean",
]

_CHUNK = 2**22  # Values of the largest temporary: 16 MB in float32, 32 in float64.


class Normals(Protocol):
    """The operators P_i of n observations, each on D entries."""

    size: int
    count: int

    def apply(self, rows: slice, v: Tensor) -> Tensor:
        """Multiply the P_i of some observations by vectors (D, K): (rows, D, K)."""
        ...

    def take(self, rows: slice | Tensor) -> Normals:
        """Return those of some observations."""
        ...


class ChannelNormals:
    """P_i of a linear channel.

    Arguments:
        channel: The channel.
        params: Its parameters, of n samples; none for an operator without.
    """

    def __init__(self, channel: Channel, params: Mapping[str, Tensor]) -> None:
        self.channel = channel
        self.params = dict(params)
        self.size = math.prod(channel.x_shape)
        self.count = len(next(iter(self.params.values()))) if self.params else 1

    def apply(self, rows: slice, v: Tensor) -> Tensor:
        """Multiply the P_i of some observations by vectors (D, K): (rows, D, K)."""
        b, k = len(range(self.count)[rows]), v.shape[1]
        x = v.mT.reshape(1, k, *self.channel.x_shape).expand(b, -1, *self.channel.x_shape)
        repeated = {
            name: value[rows].repeat_interleave(k, dim=0) for name, value in self.params.items()
        }
        y = self.channel.A(x.reshape(b * k, *self.channel.x_shape), repeated)
        return self.channel.A_adjoint(y, repeated).reshape(b, k, self.size).mT

    def take(self, rows: slice | Tensor) -> ChannelNormals:
        """Return those of some observations."""
        return ChannelNormals(self.channel, {k: v[rows] for k, v in self.params.items()})


class MatrixNormals:
    """P_i of dense matrices.

    Arguments:
        matrix: Of shape (n, M, D).
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.count, _, self.size = matrix.shape

    def apply(self, rows: slice, v: Tensor) -> Tensor:
        """Multiply the P_i of some observations by vectors (D, K): (rows, D, K)."""
        matrix = self.matrix[rows].to(v.dtype)
        product: Tensor = matrix.mT @ (matrix @ v)
        return product

    def take(self, rows: slice | Tensor) -> MatrixNormals:
        """Return those of some observations."""
        return MatrixNormals(self.matrix[rows])


def chunks(normals: Normals, columns: int) -> Iterator[slice]:
    """Split the operators so that products with so many vectors fit the largest temporary."""
    step = max(1, _CHUNK // (normals.size * columns))
    for start in range(0, normals.count, step):
        yield slice(start, min(normals.count, start + step))


def mean(normals: Normals, v: Tensor) -> Tensor:
    """Multiply the mean of the P_i by vectors (D, K): (D, K), of the type of v."""
    total = torch.zeros(v.shape, dtype=torch.float64)
    for rows in chunks(normals, v.shape[1]):
        total += normals.apply(rows, v).sum(0)
    return (total / normals.count).to(v.dtype)


def combinations(normals: Normals, weights: Tensor) -> Tensor:
    """Compute weighted sums of the P_i as dense matrices.

    Arguments:
        normals: The P_i.
        weights: Of shape (n, K).

    Returns:
        Symmetric matrices of shape (K, D, D), float64.
    """
    size = normals.size
    eye = torch.eye(size, dtype=torch.float64)
    total = torch.zeros(weights.shape[1], size, size, dtype=torch.float64)
    for rows in chunks(normals, size):
        product = normals.apply(rows, eye).flatten(1)
        total += (weights[rows].mT @ product).reshape(-1, size, size)
    return (total + total.mT) / 2


def coverage(
    channel: Channel, params: Mapping[str, Tensor], *, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Estimate the diagonal of H, in entries of x and in frequencies, by draws of signs.

    Arguments:
        channel: A linear channel.
        params: Parameters of n samples; each is drawn for equally often, at least once.
        draws: Number of draws, at least; rounded up to whole rounds over the samples.
        generator: Source of the signs.

    Returns:
        H_jj of shape (D,), and the diagonal of F H F* of shape (B, H, W), zero frequency first, B
        bands (1 for a complex image, in two bands of x); None for vectors. Both float64.
    """
    n = len(next(iter(params.values()))) if params else 1
    size = math.prod(channel.x_shape)
    entries = torch.zeros(size, dtype=torch.float64)
    image = len(channel.x_shape) == 3
    power = torch.zeros(1, dtype=torch.float64)
    rounds = math.ceil(draws / n)
    step = max(1, _CHUNK // max(size, math.prod(channel.y_shape)))
    for _ in range(rounds):
        for start in range(0, n, step):
            rows = slice(start, min(n, start + step))
            shape = (rows.stop - rows.start, *channel.y_shape)
            w = 2.0 * torch.randint(2, shape, generator=generator).float() - 1.0
            x = channel.A_adjoint(w, {name: value[rows] for name, value in params.items()})
            entries += x.flatten(1).double().square().sum(0)
            if image:
                power = power + band_power(x).double().sum(0)
    entries, power = entries / (rounds * n), power / (rounds * n)
    return entries, power if image else None


def frequency_diagonal(h: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """Compute the diagonal of F H F* of a dense H, as `coverage` estimates it.

    Arguments:
        h: Of shape (D, D).
        x_shape: (C, H, W).

    Returns:
        Shape (H, W), zero frequency in the middle.
    """
    bands, height, width = x_shape
    pixels = height * width
    blocks = h.reshape(bands, pixels, bands, pixels)
    if bands == 2:  # A complex image: the part of H that is linear in complex numbers.
        g = torch.complex(blocks[0, :, 0] + blocks[1, :, 1], blocks[1, :, 0] - blocks[0, :, 1])
        g = g / 2
    else:
        g = torch.complex(
            torch.stack([blocks[c, :, c] for c in range(bands)]).mean(0),
            torch.zeros(pixels, pixels, dtype=h.dtype),
        )
    # (F G F*)_ff: a transform over the rows, an inverse one (times the number of pixels, of which
    # the normalization takes away as many) over the columns.
    g = torch.fft.fft2(g.reshape(height, width, pixels), dim=(0, 1))
    g = torch.fft.ifft2(g.reshape(pixels, height, width), dim=(1, 2)).reshape(pixels, pixels)
    diagonal: Tensor = torch.fft.fftshift(g.diagonal().real.reshape(height, width))
    return diagonal


def band_power(x: Tensor) -> Tensor:
    """Compute |F x|^2 per real direction.

    Arguments:
        x: Images (n, C, H, W); two bands are a complex image.

    Returns:
        Shape (n, B, H, W), B = 1 for complex images, else C; zero frequency first.
    """
    pixels = x.shape[-2] * x.shape[-1]
    spectrum: Tensor
    if x.shape[1] == 2:
        spectrum = torch.fft.fft2(torch.complex(x[:, :1], x[:, 1:])) / math.sqrt(2)
    else:
        spectrum = torch.fft.fft2(x)
    return spectrum.abs().square() / pixels


def filtered(x: Tensor, transfer: Tensor) -> Tensor:
    """Multiply the spectra of images (n, C, H, W) by real numbers (B, H, W), as `band_power`."""
    z: Tensor
    if x.shape[1] == 2:
        z = torch.fft.ifft2(torch.fft.fft2(torch.complex(x[:, 0], x[:, 1])) * transfer[0])
        return torch.stack([z.real, z.imag], dim=1)
    z = torch.fft.ifft2(torch.fft.fft2(x) * transfer)
    return z.real
