"""Standard normal noise that belongs to a sample, not to a batch.

Every sample owns a generator. The k-th draw of a sample is therefore the same whatever other
samples share its batch, its shard or its worker, and a shard that is computed again is computed
with the same numbers.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["SampleNoise"]

_BLOCK_VALUES = 8192  # Values drawn at once per sample: few calls, yet 8 MB for 256 samples.
_BLOCK_DRAWS = 32
_STREAM = 16  # Whole so many values at a time, PyTorch's generator yields the same in any blocks.
_AHEAD_BYTES = 64 * 2**20  # Drawn ahead for a GPU, by threads, to which short blocks are no work.


class SampleNoise:
    """A source of independent N(0, 1) draws for a batch of samples.

    The generators are the CPU's (Mersenne twisters, which use the lowest 32 bits of a seed), so
    that a run on a GPU sees the same noise as one on the CPU. Numbers are drawn ahead in blocks
    whose size depends on the shape of one sample only, or does not matter; for a GPU, by several
    threads, while it works on what it was given before.

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
        self._expected = 1

    def __len__(self) -> int:
        return len(self._generators)

    def expect(self, draws: int) -> None:
        """Tell how many draws will follow, so that a GPU gets as many at once. Changes no number.

        Arguments:
            draws: Calls of `normal`, with one shape.
        """
        self._expected = draws

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
        self._expected = max(1, self._expected - 1)
        return values

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        draws = max(1, min(_BLOCK_DRAWS, _BLOCK_VALUES // max(1, size)))
        if self.device.type != "cuda":
            block = torch.empty(len(self), draws, *shape, dtype=self.dtype)
            self._fill(block, slice(None))
            return block.to(self.device).transpose(0, 1).contiguous()
        if size % _STREAM == 0:
            one = len(self) * size * self.dtype.itemsize
            draws = max(draws, min(self._expected, _AHEAD_BYTES // max(1, one)))
        # From pinned memory a GPU copies while the processor goes on. Threads know nothing of the
        # caller's inference mode, and may not write what was made in it.
        with torch.inference_mode(False):
            block = torch.empty(len(self), draws, *shape, dtype=self.dtype, pin_memory=True)
        threads = torch.get_num_threads()
        parts = [slice(first, None, threads) for first in range(threads)]
        deque(_threads(threads).map(lambda part: self._fill(block, part), parts), maxlen=0)
        return block.to(self.device, non_blocking=True).transpose(0, 1).contiguous()

    def _fill(self, block: Tensor, samples: slice) -> None:
        rows = block[samples].unbind(0)
        for row, generator in zip(rows, self._generators[samples], strict=True):
            row.normal_(generator=generator, std=self.scale)


@functools.lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="diffem-noise")
