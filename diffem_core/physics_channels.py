"""Channels from any deepinv physics on images, and short forms of the usual ones.

    y = sensor(noise(A(x; params)))

A conditional network sees, in the shape of x, an estimate of x from y alone and the operator's
parameters that are maps. DiffEM only simulates a channel, so that A, the sensor and the noise may
be non-linear, non-Gaussian and not differentiable.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from deepinv.physics import (
    MRI,
    CompressedSensing,
    Denoising,
    GaussianNoise,
    LinearPhysics,
    Physics,
    PoissonNoise,
    ZeroNoise,
)
from deepinv.physics.generator import PhysicsGenerator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffem_core.channel import Channel, Params, gaussian_noise
from diffem_core.operators import (
    BlockAverage,
    FourierBlur,
    LineMaskGenerator,
    MaskedBasis,
    ShiftGenerator,
    SubsetGenerator,
    UniformGenerator,
)
from diffem_core.scaling import Scaling

__all__ = [
    "PhysicsChannel",
    "accelerated_mri",
    "compressed_sensing",
    "denoising",
    "gaussian_blur",
    "jpeg",
    "poisson",
    "quantization",
    "super_resolution",
]

Estimate = Literal["y", "A_adjoint", "A_dagger"]


class PhysicsChannel(Channel):
    """A channel around a deepinv physics that maps images to anything.

    Arguments:
        physics: The physics, with its noise model and sensor.
        x_shape: Shape (C, H, W) of an image.
        generator: Generator of per-sample parameters; None if the operator is the same for all.
        estimate: What the network sees of y: `y` itself (in the shape of x), `A_adjoint` or
            `A_dagger`.
        maps: Parameters that the network sees as well, each of shape (c, H, W).
        drawn_maps: What else it sees of the parameters: a number of bands, and a function from
            parameters of n samples to a tensor of shape (n, bands, H, W).
        linear: Whether x is mapped linearly up to noise; by default, whether the physics is a
            LinearPhysics.

    Raises:
        ValueError: The estimate does not have the shape of x, or a map that of an image.
    """

    def __init__(
        self,
        physics: Physics,
        *,
        x_shape: Sequence[int],
        generator: PhysicsGenerator | None = None,
        estimate: Estimate = "A_adjoint",
        maps: Sequence[str] = (),
        drawn_maps: tuple[int, Callable[[Params], Tensor]] | None = None,
        linear: bool | None = None,
    ) -> None:
        if estimate not in ("y", "A_adjoint", "A_dagger"):
            raise ValueError(
                f"PhysicsChannel received estimate {estimate!r}; known are 'y', 'A_adjoint', "
                "'A_dagger'"
            )
        if linear is None:
            linear = isinstance(physics, LinearPhysics)
        if estimate != "y" and not linear:
            raise ValueError(
                f"PhysicsChannel received estimate {estimate!r} for a physics that is not linear; "
                "take 'y'"
            )
        params: dict[str, Tensor] = {}
        if generator is not None:
            generator.rng = torch.Generator().manual_seed(0)
            params = generator.step(batch_size=1)
        super().__init__(
            physics=physics,
            generator=generator,
            x_shape=tuple(x_shape),
            y_shape=(),
            params_spec={name: tuple(value.shape[1:]) for name, value in params.items()},
            noise_std=_noise_std(physics.noise_model),
            linear=linear,
        )
        self.estimate = estimate
        self.maps = tuple(maps)
        self.drawn_maps = drawn_maps
        image = torch.zeros(1, *self.x_shape)
        self.y_shape = tuple(self._bound(params, image.dtype).A(image).shape[1:])
        seen = self._estimate(torch.zeros(1, *self.y_shape), params)
        if seen.shape[1:] != self.x_shape:
            raise ValueError(
                f"the estimate {estimate!r} of y has shape {tuple(seen.shape[1:])} but x has "
                f"{self.x_shape}; take "
                "another estimate"
            )
        for name in self.maps:
            if name not in params or params[name].shape[2:] != image.shape[2:]:
                raise ValueError(
                    f"PhysicsChannel received the map {name!r}; the generator's parameters of "
                    "shape (c, H, W) are "
                    f"{[k for k, v in params.items() if v.shape[2:] == image.shape[2:]]}"
                )

    @property
    def condition_channels(self) -> int:
        """Bands of the image and of the maps."""
        drawn = 0 if self.drawn_maps is None else self.drawn_maps[0]
        return self.x_shape[0] + sum(self.params_spec[name][0] for name in self.maps) + drawn

    def condition(self, y: Tensor, params: Params, scaling: Scaling) -> Tensor:
        """Build (n, condition_channels, H, W): the estimate in network units, then the maps."""
        if self.linear:
            # Around the centre, so that what is not measured is 0.
            center = self.A(y.new_full((len(y), *self.x_shape), scaling.center), params)
            seen = self._estimate(y - center, params) * scaling.scale
            if self.estimate == "y":
                seen = scaling.to_network(y)
        else:
            seen = scaling.to_network(self._estimate(y, params))
        shown = [params[name].to(y.dtype) for name in self.maps]
        if self.drawn_maps is not None:
            shown.append(self.drawn_maps[1](params).to(y.dtype))
        return torch.cat([seen, *shown], dim=1)

    # deepinv keeps matrices and filters in float32, and some of its physics refuse other types.
    # They lie where the physics was used last.

    def corrupt(self, x: Tensor, params: Params, *, generator: torch.Generator) -> Tensor:
        """Draw y ~ Q(. | x, params); see `Channel.corrupt`."""
        self.physics.to(x.device)
        return super().corrupt(x.float(), params, generator=generator).to(x.dtype)

    def A(self, x: Tensor, params: Params) -> Tensor:
        """Apply the operator without noise and sensor; see `Channel.A`."""
        self.physics.to(x.device)
        return super().A(x.float(), params).to(x.dtype)

    def A_adjoint(self, y: Tensor, params: Params) -> Tensor:
        """Apply the operator's adjoint; see `Channel.A_adjoint`."""
        self.physics.to(y.device)
        return super().A_adjoint(y.float(), params).to(y.dtype)

    def A_dagger(self, y: Tensor, params: Params) -> Tensor:
        """Apply the operator's pseudo-inverse; see `Channel.A_dagger`."""
        self.physics.to(y.device)
        return super().A_dagger(y.float(), params).to(y.dtype)

    def _estimate(self, y: Tensor, params: Params) -> Tensor:
        if self.estimate == "y":
            return y
        return (
            self.A_adjoint(y, params) if self.estimate == "A_adjoint" else self.A_dagger(y, params)
        )


def denoising(x_shape: Sequence[int], *, noise_std: float) -> PhysicsChannel:
    """Build the channel that adds Gaussian noise only.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        noise_std: Standard deviation of the noise.

    Returns:
        The channel; the network sees y.
    """
    physics = Denoising(noise_model=gaussian_noise(noise_std))
    return PhysicsChannel(physics, x_shape=x_shape, estimate="y")


def super_resolution(
    x_shape: Sequence[int], *, factor: int, noise_std: float, shifts: bool = True
) -> PhysicsChannel:
    """Build the channel that averages blocks of factor x factor pixels and adds Gaussian noise.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        factor: Side of a block; it divides H and W.
        noise_std: Standard deviation of the noise.
        shifts: Whether each sample's blocks are shifted by whole pixels of its own (around the
            edges), as when an instrument moves between exposures. Without, what the average over
            fixed blocks hides is hidden in every sample, and cannot be learned.
    """
    _, height, width = x_shape
    if factor < 2 or height % factor or width % factor:
        raise ValueError(
            f"super_resolution received factor {factor} for images of {height} x {width}; give a "
            "divisor of both, at least 2"
        )
    physics = BlockAverage(factor, noise_model=gaussian_noise(noise_std))
    if not shifts:
        return PhysicsChannel(physics, x_shape=x_shape, estimate="A_dagger")

    def blocks(params: Params) -> Tensor:
        shift = params["shift"].to(torch.int64)
        bands = []
        for axis, size in enumerate((height, width)):
            position = (torch.arange(size, device=shift.device) - shift[:, axis, None]) % size
            parity = 1.0 - 2.0 * ((position // factor) % 2)
            shape = (-1, 1, height, 1) if axis == 0 else (-1, 1, 1, width)
            bands.append(parity.reshape(shape).expand(-1, 1, height, width))
        return torch.cat(bands, dim=1)

    return PhysicsChannel(
        physics,
        x_shape=x_shape,
        generator=ShiftGenerator(factor),
        estimate="A_dagger",
        drawn_maps=(2, blocks),
    )


def gaussian_blur(
    x_shape: Sequence[int], *, sigma: float | tuple[float, float], noise_std: float
) -> PhysicsChannel:
    """Build the channel that blurs with a Gaussian (around the edges) and adds Gaussian noise.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        sigma: Standard deviation of the blur, in pixels: the same for all samples, or the ends of
            the interval from which each sample's is drawn uniformly. Detail that every sample's
            blur hides under the noise cannot be learned.
        noise_std: Standard deviation of the noise.
    """
    low, high = (sigma, sigma) if isinstance(sigma, (int, float)) else sigma
    if not 0 < low <= high:
        raise ValueError(
            f"gaussian_blur received sigma {sigma}; give a positive number, or two that rise"
        )
    _, height, width = x_shape
    physics = FourierBlur((height, width), noise_model=gaussian_noise(noise_std))
    if low == high:
        physics.sigma = torch.tensor([low])
        return PhysicsChannel(physics, x_shape=x_shape, estimate="y")
    return PhysicsChannel(
        physics,
        x_shape=x_shape,
        generator=UniformGenerator("sigma", low, high),
        estimate="y",
        drawn_maps=(1, lambda p: p["sigma"].reshape(-1, 1, 1, 1).expand(-1, 1, height, width)),
    )


def compressed_sensing(
    x_shape: Sequence[int],
    *,
    measurements: int,
    noise_std: float,
    seed: int = 0,
    fixed: bool = False,
) -> PhysicsChannel:
    """Build the channel that takes random projections of images and adds Gaussian noise.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        measurements: Projections per sample, at most C H W.
        noise_std: Standard deviation of the noise on each.
        seed: Seed of the projections, which belong to the instrument.
        fixed: Whether all samples share the same projections. Then what these hide is hidden in
            every sample, and cannot be learned. Otherwise each sample takes a random subset of the
            coefficients in one random orthonormal basis; those that it does not take are 0 in y,
            which has the shape of x.
    """
    size = math.prod(x_shape)
    if not 1 <= measurements <= size:
        raise ValueError(
            f"compressed_sensing received {measurements} measurements for {size} entries; give 1 "
            f"to {size}"
        )
    rng = torch.Generator().manual_seed(seed)
    noise_model = gaussian_noise(noise_std)
    if fixed:
        shared = CompressedSensing(
            m=measurements, img_size=tuple(x_shape), rng=rng, noise_model=noise_model
        )
        return PhysicsChannel(shared, x_shape=x_shape, estimate="A_dagger")
    physics = MaskedBasis(tuple(x_shape), rng=rng, noise_model=noise_model)
    return PhysicsChannel(
        physics,
        x_shape=x_shape,
        generator=SubsetGenerator(tuple(x_shape), count=measurements),
        estimate="A_adjoint",
        maps=("mask",),
    )


def accelerated_mri(
    size: tuple[int, int], *, acceleration: float, center: float = 0.08, noise_std: float
) -> PhysicsChannel:
    """Build single-coil MRI with random lines of k-space, drawn anew for each sample.

    Arguments:
        size: Height and width; images are complex, (2, H, W).
        acceleration: Lines per measured line, on average.
        center: Fraction of the lines, around zero frequency, that are always measured.
        noise_std: Standard deviation of the noise on real and imaginary parts.
    """
    physics = MRI(img_size=(1, 2, *size), noise_model=gaussian_noise(noise_std))
    generator = LineMaskGenerator(size, acceleration=acceleration, center=center)
    return PhysicsChannel(
        physics, x_shape=(2, *size), generator=generator, estimate="A_adjoint", maps=("mask",)
    )


def poisson(x_shape: Sequence[int], *, gain: float) -> PhysicsChannel:
    """Build the channel that counts photons: y = gain Poisson(max(x, 0) / gain).

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        gain: Data units per photon, > 0.

    Returns:
        The channel, which is not linear; the network sees y.
    """
    if not gain > 0:
        raise ValueError(f"poisson received gain {gain}; it must be positive")
    physics = Denoising(noise_model=PoissonNoise(gain=gain, clip_positive=True))
    return PhysicsChannel(physics, x_shape=x_shape, estimate="y", linear=False)


def quantization(
    x_shape: Sequence[int], *, low: float, high: float, levels: int, noise_std: float = 0.0
) -> PhysicsChannel:
    """Build the channel that adds noise, clips to [low, high] and rounds to even levels.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        low: Smallest value that comes out, in the data's units.
        high: Largest value that comes out.
        levels: Number of levels, at least 2.
        noise_std: Standard deviation of the noise before the rounding.

    Returns:
        The channel, which is not linear; the network sees y.
    """
    if levels < 2 or not low < high:
        raise ValueError(
            f"quantization received {levels} levels from {low} to {high}; give >= 2 levels, low < "
            "high"
        )
    step = (high - low) / (levels - 1)

    def sensor(y: Tensor) -> Tensor:
        return ((y.clamp(low, high) - low) / step).round() * step + low

    physics = Physics(noise_model=gaussian_noise(noise_std), sensor_model=sensor)
    return PhysicsChannel(physics, x_shape=x_shape, estimate="y", linear=False)


def jpeg(x_shape: Sequence[int], *, quality: int, low: float, high: float) -> PhysicsChannel:
    """Build the channel that saves as JPEG, with [low, high] as 0 to 255, and reads again.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        quality: JPEG's quality, 1 to 100.
        low: Value that is saved as 0, in the data's units.
        high: Value that is saved as 255.

    Returns:
        The channel, which is not linear; the network sees y.
    """
    if x_shape[0] not in (1, 3) or not 1 <= quality <= 100:
        raise ValueError(
            f"jpeg received images of {x_shape[0]} bands and quality {quality}; give 1 or 3 bands "
            "and quality 1 to 100"
        )

    def sensor(y: Tensor) -> Tensor:
        pixels = ((y - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        read = [
            _through_jpeg(image, quality) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()
        ]
        out = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).to(y)
        return out / 255 * (high - low) + low

    physics = Physics(noise_model=ZeroNoise(), sensor_model=sensor)
    return PhysicsChannel(physics, x_shape=x_shape, estimate="y", linear=False)


def _through_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
        file, "JPEG", quality=quality
    )
    return np.asarray(Image.open(file), dtype=np.uint8).reshape(image.shape)


def _noise_std(noise_model: object) -> float | None:
    if isinstance(noise_model, ZeroNoise):
        return 0.0
    if isinstance(noise_model, GaussianNoise) and noise_model.sigma.numel() == 1:
        return float(noise_model.sigma)
    return None
