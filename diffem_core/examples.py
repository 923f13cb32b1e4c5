"""What the denoiser learns from: batches of corrupted and noised reconstructions, and their loss.

    L = mean_i (1 / sigma_i^2 + 1) || f_theta(x_i + sigma_i z_i, sigma_i, y_tilde_i) - x_i ||^2

(The squared norm is the mean over entries.)
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffem_core.augmentation import Augmentation
from diffem_core.denoiser import Denoiser
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["Ahead", "Batches", "Examples", "denoising_loss"]

_AT_HAND = 256 * 2**20  # Bytes of reconstructions that are not worth fetching ahead.
_FIXED_BLOCK = 4096  # Samples per seed where corruptions are fixed for the iteration.


def denoising_loss(
    denoiser: Denoiser, x: Tensor, z: Tensor, sigma_t: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Compute the weighted denoising loss of a batch.

    Arguments:
        denoiser: The denoiser.
        x: Clean samples of shape (n, ...), in network units.
        z: Standard normal noise of the same shape.
        sigma_t: Noise levels of shape (n,).
        condition: What the network sees of the observations, or None.

    Returns:
        mean_i (1 / sigma_i^2 + 1) mean_entries (f(x_i + sigma_i z_i) - x_i)^2, of shape ().

    References:
        DiffEM (arXiv 2510.12691), M-step; EDM (arXiv 2206.00364), table 1 with sigma_data = 1.
    """
    sigma = sigma_t.reshape(-1, *[1] * (x.ndim - 1))
    error = denoiser(torch.addcmul(x, sigma, z), sigma_t, condition) - x
    weights = sigma_t.square().reciprocal() + 1
    loss: Tensor = (weights * error.square().flatten(1).mean(1)).mean()
    return loss


class Examples:
    """Makes what the denoiser learns from: reconstructions in network units, and conditions."""

    def __init__(
        self,
        x_hat: Tensor,
        channel: Channel | None,
        scaling: Scaling,
        augmentation: Augmentation | None,
        drop_condition: float,
    ) -> None:
        self.x_hat = x_hat
        self.channel = channel
        self.scaling = scaling
        self.augmentation = augmentation
        self.drop_condition = drop_condition
        self._fixed: tuple[Tensor, dict[str, Tensor]] | None = None

    def fix(self, seed: int) -> None:
        """Corrupt every reconstruction once, in blocks with seeds of their own."""
        if self.channel is None:
            return
        ys, all_params = [], []
        for number, x in enumerate(torch.split(self.x_hat, _FIXED_BLOCK)):
            generator = torch.Generator(x.device)
            generator.manual_seed(derive_seed(seed, "recorruption", number))
            params = self.channel.draw_params(len(x), generator=generator)
            ys.append(self.channel.corrupt(x, params, generator=generator))
            all_params.append(params)
        joined = {name: torch.cat([p[name] for p in all_params]) for name in all_params[0]}
        self._fixed = torch.cat(ys), joined

    def draw(
        self, rows: Tensor, generator: torch.Generator, fetched: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Make the examples of some rows, on the generator's device.

        Arguments:
            rows: Which reconstructions.
            generator: Draws the corruption.
            fetched: These reconstructions, where the caller has them already.
        """
        device = generator.device
        x = (self.x_hat[rows] if fetched is None else fetched).to(device)
        if self.augmentation is not None:
            x = self.augmentation(x, generator=generator)
        condition = None
        if self.channel is not None:
            if self._fixed is None:
                params = self.channel.draw_params(len(x), generator=generator)
                y_tilde = self.channel.corrupt(x, params, generator=generator)
            else:
                y_tilde = self._fixed[0][rows].to(device)
                params = {name: v[rows].to(device) for name, v in self._fixed[1].items()}
            condition = self.channel.condition(y_tilde, params, self.scaling)
            if self.drop_condition > 0:
                shape = (len(x), *[1] * (condition.ndim - 1))
                u = torch.rand(shape, generator=generator, device=device)
                condition = condition * (u >= self.drop_condition)
        return self.scaling.to_network(x), condition


class Batches:
    """Rows of each step: every pass goes through all samples in an order of its own."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def rows(self, step: int) -> Tensor:
        """Return the rows of a step, from 0."""
        start = step * self.batch_size
        stop = start + self.batch_size
        passes = range(start // self.n, (stop - 1) // self.n + 1)
        self._orders = {
            p: self._orders[p] if p in self._orders else self._order(p) for p in passes
        }
        # Pieces alone are copied: an order is as long as the data.
        return torch.cat(
            [
                self._orders[p][max(0, start - p * self.n) : min(self.n, stop - p * self.n)]
                for p in passes
            ]
        )

    def _order(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", number))
        return torch.randperm(self.n, generator=generator)


class Ahead:
    """Fetches the batch of the next step while this one is worked on.

    Reconstructions may be a file that is mapped into memory, whose pages have to be read first.
    Where they are few, they are at hand anyway, and a thread would cost more than it spares.

    Arguments:
        x_hat: Reconstructions, shape (n, *x_shape).
        batches: The rows of each step.
        steps: How many steps there are.
    """

    def __init__(self, x_hat: Tensor, batches: Batches, steps: int) -> None:
        self.waited = 0.0
        """Seconds that callers have waited for data."""
        self._x_hat = x_hat
        self._batches = batches
        self._steps = steps
        self._pool = None
        if 4 * math.prod(x_hat.shape) > _AT_HAND:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="diffem-ahead")
        self._next: tuple[int, Tensor, Future[Tensor]] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a step, and their reconstructions."""
        began = time.perf_counter()
        if self._pool is None:
            rows = self._batches.rows(step)
            x = self._x_hat[rows]
        else:
            if self._next is None or self._next[0] != step:
                self._next = self._begin(step, self._pool)
            _, rows, future = self._next
            x = future.result()
            self._next = self._begin(step + 1, self._pool) if step + 1 < self._steps else None
        self.waited += time.perf_counter() - began
        return rows, x

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _begin(self, step: int, pool: ThreadPoolExecutor) -> tuple[int, Tensor, Future[Tensor]]:
        rows = self._batches.rows(step)
        return step, rows, pool.submit(self._x_hat.__getitem__, rows)
