"""Standard normal noise that belongs to a sample, not to a batch.

Every sample owns a generator. The k-th draw of a sample is therefore the same whatever other
samples share its batch, its shard or its worker, and a shard that is computed again is computed
with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SampleNoise"]

_BLOCK_VALUES = 8192  # Values drawn at once per sample: few calls, yet 8 MB for 256 samples.
_BLOCK_DRAWS = 32


class SampleNoise:
    """A source of independent N(0, 1) draws for a batch of samples.

    The generators are the CPU's (Mersenne twisters, which use the lowest 32 bits of a seed), so
    that a run on a GPU sees the same noise as one on the CPU. Numbers are drawn ahead in blocks
    whose size depends on the shape of one sample only.

    Arguments:
        seeds: One seed per sample, each in [0, 2**63).
        device: Where the draws are moved to.
        dtype: Type of the draws.
        scale: Standard deviation of the draws.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ) -> None:
        self.scale = scale
        self.device = torch.device(device)
        self.dtype = dtype
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self._block: Tensor | None = None
        self._shape: tuple[int, ...] = ()
        self._next = 0

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw the next noise of every sample.

        Arguments:
            shape: Shape of one sample.

        Returns:
            Independent N(0, scale^2) values, of shape (n, *shape), on `device`.
        """
        shape = tuple(shape)
        if self._block is None or shape != self._shape or self._next == self._block.shape[0]:
            self._block = self._draw(shape)
            self._shape = shape
            self._next = 0
        values = self._block[self._next]
        self._next += 1
        return values

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        draws = max(1, min(_BLOCK_DRAWS, _BLOCK_VALUES // max(1, math.prod(shape))))
        block = torch.empty(len(self), draws, *shape, dtype=self.dtype)
        for row, generator in zip(block.unbind(0), self._generators, strict=True):
            row.normal_(generator=generator, std=self.scale)
        return block.transpose(0, 1).to(self.device).contiguous()
