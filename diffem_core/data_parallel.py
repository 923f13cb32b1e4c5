"""Training one model in several processes, each on its part of every batch.

    g = sum_r g_r,      g_r = (1 / n) sum_{i in part r} grad loss_i

Every process draws the random numbers of the whole batch from the same generator and computes the
loss and its gradient on a contiguous part; the sum over processes is the gradient of the whole
batch, up to the order of the sum. Every process then takes the same step, so that weights, their
average and Adam's moments stay the same in all of them, to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from diffem_core.training import FlatAdam

__all__ = ["DataParallel", "parts_of"]


class DataParallel:
    """The processes that train one model together.

    Arguments:
        process_group: A group of torch.distributed that is set up already (nccl for GPUs, gloo for
            processors); None takes the default group.

    Raises:
        ValueError: torch.distributed is not set up in this process.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "DataParallel needs a process group but this process has none; call "
                "torch.distributed.init_process_group first"
            )
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        """Number of this process, from 0."""
        self.size = dist.get_world_size(process_group)
        """How many there are."""

    def part(self, n: int) -> slice:
        """Return the rows of this process among n; sizes differ by one at most, and may be 0."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, the same bits in all of them."""
        dist.all_reduce(tensor, group=self.process_group)

    def copy_first_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of process 0."""
        dist.broadcast(tensor, group_src=0, group=self.process_group)

    def wait(self) -> None:
        """Wait until all processes are here."""
        dist.barrier(group=self.process_group)

    def share_state(
        self,
        optimizer: FlatAdam,
        losses: Tensor,
        done: int,
        looks: tuple[tuple[int, float], ...],
    ) -> tuple[int, tuple[tuple[int, float], ...]]:
        """Give all processes the state of process 0.

        Arguments:
            optimizer: Its weights, average and moments, and the module's buffers, are replaced.
            losses: Replaced, float64 of shape (2,).
            done: Steps done, in this process.
            looks: Step and held-out loss of every look, in this process.

        Returns:
            Steps done and looks of process 0.
        """
        for flat in optimizer.flats():
            self.copy_first_(flat)
        self.copy_first_(losses)
        sizes = torch.tensor([done, len(looks)], dtype=torch.int64, device=losses.device)
        self.copy_first_(sizes)
        done, count = (int(value) for value in sizes.tolist())
        shared = torch.zeros(count, 2, dtype=torch.float64, device=losses.device)
        if self.rank == 0 and count:
            shared.copy_(torch.tensor(looks, dtype=torch.float64))
        if count:
            self.copy_first_(shared)
        return done, tuple((int(step), loss) for step, loss in shared.tolist())


def parts_of(rows: slice, parts: int) -> list[slice]:
    """Split rows into contiguous parts whose sizes differ by one at most; none is empty."""
    n = rows.stop - rows.start
    parts = min(parts, n)
    return [
        slice(rows.start + n * k // parts, rows.start + n * (k + 1) // parts) for k in range(parts)
    ]
