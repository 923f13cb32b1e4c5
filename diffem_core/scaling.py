"""The map between the data's own units and the network's.

Stores, channels and metrics work in the data's units (digits: 0 to 16); the diffusion model works
on `(x - center) * scale`, which puts images into [-2, 2] as in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

__all__ = ["Scaling"]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """An affine change of units, the same for every pixel.

    Arguments:
        center: Value, in the data's units, that becomes 0.
        scale: Network units per data unit, positive.
    """

    center: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.center) and math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(
                f"scaling received center {self.center} and scale {self.scale}; both must be "
                "finite and scale positive"
            )

    @classmethod
    def from_range(cls, low: float, high: float, half_width: float = 2.0) -> Self:
        """Build the scaling that maps [low, high] onto [-half_width, half_width].

        Arguments:
            low: Smallest value of the data, in its own units.
            high: Largest value of the data, in its own units.
            half_width: Largest value in network units.

        Raises:
            ValueError: The range is empty or not finite.
        """
        if not low < high:
            raise ValueError(f"scaling received the range [{low}, {high}]; give low < high")
        return cls(center=(low + high) / 2, scale=2 * half_width / (high - low))

    @classmethod
    def identity(cls) -> Self:
        """Build the scaling that changes nothing."""
        return cls()

    def to_network(self, x: Tensor) -> Tensor:
        """Convert from the data's units to the network's."""
        return (x - self.center) * self.scale

    def to_data(self, x: Tensor) -> Tensor:
        """Convert from the network's units to the data's."""
        return x / self.scale + self.center
