"""The gradient of a batch's loss: of a part of the batch, and in pieces where memory is short.

    L = sum_j (n_j / n) L_j         over the pieces j of a batch of n

With the random numbers of the whole batch drawn before, the pieces' gradients add up to that of
the batch, up to the order of the sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffem_core.data_parallel import DataParallel, parts_of
from diffem_core.denoiser import Denoiser
from diffem_core.examples import denoising_loss
from diffem_core.networks.dropout import Dropout
from diffem_core.replay import Replayed

__all__ = ["BatchGradient"]


class BatchGradient:
    """Computes the loss of this process's part of a batch and adds its gradient.

    Where the memory of the device does not suffice, the part is computed in two pieces, then in
    four, and so on; later batches begin with as many pieces.

    Arguments:
        denoiser: Its gradients are added to.
        generator: What its dropout draws from. Every piece draws the numbers of the whole batch
            and takes its own, so that dropout does not depend on the pieces.
        gradient: The buffer that the gradients live in; zero between steps.
        group: The processes that share the batch; None for one process.
        on_split: Called with the new number of pieces.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        generator: torch.Generator,
        *,
        gradient: Tensor,
        group: DataParallel | None,
        on_split: Callable[[int], None] | None,
    ) -> None:
        self.denoiser = denoiser
        self.generator = generator
        self.gradient = gradient
        self.group = group
        self.on_split = on_split
        self.pieces = 1
        self._n = 0
        self._replayed: Callable[..., Tensor] = self._add_gradient
        if denoiser.replays:
            self._replayed = Replayed(self._add_gradient, generators=[generator])
        self._dropouts = [m for m in denoiser.modules() if isinstance(m, Dropout)]
        for dropout in self._dropouts:
            dropout.generator = generator

    def __call__(self, x: Tensor, z: Tensor, sigma_t: Tensor, condition: Tensor | None) -> Tensor:
        """Add the gradient of this process's part of the loss of a batch.

        Arguments:
            x: Clean samples of the whole batch, of shape (n, ...), in network units.
            z: Standard normal noise of the same shape.
            sigma_t: Noise levels of shape (n,).
            condition: What the network sees of the observations, or None.

        Returns:
            The part's share of the mean loss, of shape (); the sum over processes is the mean.

        Raises:
            torch.OutOfMemoryError: The memory does not suffice for a single sample.
        """
        self._n = len(x)  # The same at every step: recordings hold it.
        rows = slice(0, len(x)) if self.group is None else self.group.part(len(x))
        drawn = self.generator.get_state()
        while True:
            # The frames of a failed attempt hold its activations; they are gone after the return.
            loss = self._attempt(x, z, sigma_t, condition, rows, drawn)
            if loss is not None:
                return loss
            self.gradient.zero_()
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
            self.pieces *= 2
            if self.on_split is not None:
                self.on_split(self.pieces)

    def release(self) -> None:
        """Leave the denoiser's dropout as it was, and free what a GPU keeps for the next batch."""
        self._replayed = self._add_gradient
        for dropout in self._dropouts:
            dropout.generator, dropout.rows = None, None

    def _attempt(
        self,
        x: Tensor,
        z: Tensor,
        sigma_t: Tensor,
        condition: Tensor | None,
        rows: slice,
        drawn: Tensor,
    ) -> Tensor | None:
        n = len(x)
        parts = parts_of(rows, self.pieces)
        # Pieces of one size differ in the rows of their dropout, of which a recording knows one.
        add_gradient = self._replayed if len(parts) == 1 else self._add_gradient
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        try:
            for part in parts:
                if len(parts) > 1:
                    self.generator.set_state(drawn)
                for dropout in self._dropouts:
                    dropout.rows = None if part == slice(0, n) else (part, n)
                total += add_gradient(
                    x[part],
                    z[part],
                    sigma_t[part],
                    None if condition is None else condition[part],
                )
        except torch.OutOfMemoryError:
            if all(part.stop - part.start == 1 for part in parts):
                raise
            return None
        return total

    def _add_gradient(
        self, x: Tensor, z: Tensor, sigma_t: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Add a piece's part of the gradient of the batch's mean loss; return its part of that."""
        loss = denoising_loss(self.denoiser, x, z, sigma_t, condition) * (len(x) / self._n)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
