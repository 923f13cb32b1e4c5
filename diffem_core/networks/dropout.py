"""Dropout from a given generator, so that a training step depends on its own seed alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout"]


class Dropout(nn.Module):
    """Inverted dropout with a generator of its own.

    Arguments:
        rate: Probability that a value is dropped, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout received rate {rate}; give a number in [0, 1)")
        self.rate = rate
        self.generator: torch.Generator | None = None
        self.rows: tuple[slice, int] | None = None
        """Which rows of a batch of how many x holds: it then gets the values that it would get
        as a part of that batch. None where x is a batch of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop values in training, and do nothing in evaluation; the shape is that of x."""
        if not self.training or self.rate == 0:
            return x
        if self.rows is None:
            keep = torch.empty_like(x).bernoulli_(1 - self.rate, generator=self.generator)
        else:
            keep = self._whole(x).bernoulli_(1 - self.rate, generator=self.generator)
            keep = keep[self.rows[0]].clone()  # A view would keep the whole batch's in memory.
        return x * keep.div_(1 - self.rate)

    def _whole(self, x: Tensor) -> Tensor:
        """Make room for the whole batch, in the memory format of x: values are drawn in its order.

        Batches whose rows are not the outermost dimension in memory get other values than in one
        piece, of the same distribution.
        """
        assert self.rows is not None
        one = torch.empty_like(x[0], device="meta")
        shape, stride = (self.rows[1], *one.shape), (one.numel(), *one.stride())
        return torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device)
