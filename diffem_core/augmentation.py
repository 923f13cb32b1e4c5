"""Random changes of images that leave their distribution as it is: flips, hue and saturation.

They are applied to reconstructions before the channel, so that an image and its observation always
agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Augmentation"]

# Columns: red, green, blue. Rows: luma (ITU-R BT.601) and the two axes of the chroma plane (YIQ).
_YIQ = (
    (0.299, 0.587, 0.114),
    (0.5959, -0.2746, -0.3213),
    (0.2115, -0.5227, 0.3112),
)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A random flip, and for colour images a random hue and saturation, one for each image.

    Colours are turned and scaled in the chroma plane, around grey: a linear map of the bands that
    keeps luma, in any units.

    Arguments:
        flip: Whether images are mirrored left to right, each with probability 1/2.
        hue: Largest turn, in full circles; the paper takes 0.01.
        saturation: Smallest and largest factor on the distance from grey; the paper takes (0.95,
            1.05).

    Raises:
        ValueError: A number is out of range.
    """

    flip: bool = True
    hue: float = 0.0
    saturation: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.saturation
        if not (0 <= self.hue <= 0.5 and 0 <= low <= high):
            raise ValueError(
                f"Augmentation received hue {self.hue} and saturation {self.saturation}; give hue "
                "in [0, 0.5] and "
                "0 <= low <= high"
            )

    def __call__(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Change images at random.

        Arguments:
            x: Images of shape (n, C, H, W).
            generator: Source of randomness, on the device of x.

        Returns:
            Images of the same shape.

        Raises:
            ValueError: Hue or saturation is asked for images without three bands.
        """
        if self.flip:
            u = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
            x = torch.where(u < 0.5, x.flip(-1), x)
        if self.hue or self.saturation != (1.0, 1.0):
            if x.shape[1] != 3:
                raise ValueError(
                    f"hue and saturation need 3 bands but the images have {x.shape[1]}; leave "
                    "them at 0 and (1, 1)"
                )
            x = torch.einsum("nij,njhw->nihw", self._colour_maps(x, generator), x)
        return x

    def _colour_maps(self, x: Tensor, generator: torch.Generator) -> Tensor:
        u, v = torch.rand(2, len(x), generator=generator, device=x.device, dtype=x.dtype)
        angle = 2 * math.pi * self.hue * (2 * u - 1)
        low, high = self.saturation
        factor = low + (high - low) * v
        cos, sin, zero = factor * angle.cos(), factor * angle.sin(), torch.zeros_like(u)
        chroma = torch.stack(
            [
                torch.stack([torch.ones_like(u), zero, zero], dim=1),
                torch.stack([zero, cos, -sin], dim=1),
                torch.stack([zero, sin, cos], dim=1),
            ],
            dim=1,
        )
        to_yiq = torch.tensor(_YIQ, dtype=x.dtype, device=x.device)
        maps: Tensor = torch.linalg.inv(to_yiq) @ chroma @ to_yiq
        return maps
