"""What the denoiser learns from: batches of corrupted and noised reconstructions, and their loss.

    L = mean_i (1 / sigma_i^2 + 1) || f_theta(x_i + sigma_i z_i, sigma_i, y_tilde_i) - x_i ||^2

(The squared norm is the mean over entries.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffem_core.augmentation import Augmentation
from diffem_core.denoiser import Denoiser
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["Batches", "Examples", "denoising_loss"]

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

    def draw(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Make the examples of some rows, on the generator's device."""
        device = generator.device
        x = self.x_hat[rows].to(device)
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
        joined = torch.cat([self._orders[p] for p in passes])
        first = start - passes[0] * self.n
        return joined[first : first + self.batch_size]

    def _order(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", number))
        return torch.randperm(self.n, generator=generator)
