"""The loss on held-out reconstructions during an M-step, and when it says that enough is learned.

The loss is that of the averaged weights, in evaluation mode and without gradients, over all
held-out reconstructions:

    L_val = mean_i (1 / sigma_i^2 + 1) || f_ema(x_i + sigma_i z_i, sigma_i, y_tilde_i) - x_i ||^2

with y_tilde_i, z_i and sigma_i that are the same at every look. Looking changes nothing: neither
weights nor random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffem_core.data_parallel import DataParallel
from diffem_core.denoiser import Denoiser
from diffem_core.examples import Examples, denoising_loss
from diffem_core.schedule import Schedule
from diffem_core.seeds import derive_seed
from diffem_core.times import TimeDistribution

__all__ = ["HeldOutLoss", "Validation", "looks_without_gain"]


@dataclass(frozen=True, eq=False)
class Validation:
    """Held-out reconstructions, when to look at their loss, and when to stop.

    Arguments:
        x_hat: Reconstructions of shape (n, *x_shape), in the data's units, that never take part in
            a gradient step.
        every: Steps between two looks; the last step is always followed by one.
        patience: End the M-step after so many looks in a row without a new lowest loss; None to
            do all steps.

    Raises:
        ValueError: There is nothing to look at, or a number is less than 1.
    """

    x_hat: Tensor
    every: int
    patience: int | None = None

    def __post_init__(self) -> None:
        if len(self.x_hat) == 0:
            raise ValueError("Validation received no reconstructions; give at least one")
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(
                f"Validation received every {self.every} and patience {self.patience}; give at "
                "least 1 of each, or no patience"
            )

    def due(self, step: int, steps: int) -> bool:
        """Say whether a look follows a step, counted from 1, of an M-step of `steps` steps."""
        return step > 0 and (step % self.every == 0 or step == steps)

    def enough(self, looks: Sequence[tuple[int, float]]) -> bool:
        """Say whether the looks so far, as (step, loss), end the M-step."""
        return self.patience is not None and looks_without_gain(looks) >= self.patience


class HeldOutLoss:
    """Computes the loss of a denoiser on held-out reconstructions.

    Arguments:
        examples: Makes the examples of the held-out reconstructions; without augmentation and
            without dropped conditions.
        schedule: Noise level as a function of time.
        times: Distribution of the times.
        batch_size: Reconstructions per call of the denoiser.
        seed: Seed of the M-step.
        group: The processes that compute it together, each its part of every batch; None for one
            process.
    """

    def __init__(
        self,
        examples: Examples,
        schedule: Schedule,
        times: TimeDistribution,
        *,
        batch_size: int,
        seed: int,
        group: DataParallel | None = None,
    ) -> None:
        assert examples.augmentation is None
        assert examples.drop_condition == 0
        self.examples = examples
        self.schedule = schedule
        self.times = times
        self.batch_size = batch_size
        self.seed = seed
        self.group = group

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> float:
        """Compute the loss, from the denoiser as it is.

        Arguments:
            denoiser: The denoiser, in evaluation mode.

        Returns:
            The mean over all held-out reconstructions.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        assert not denoiser.training
        device = next(denoiser.parameters()).device
        n = len(self.examples.x_hat)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, rows in enumerate(torch.split(torch.arange(n), self.batch_size)):
            generator = torch.Generator(device)
            generator.manual_seed(derive_seed(self.seed, "validation", number))
            x, condition = self.examples.draw(rows, generator)
            z = torch.empty_like(x).normal_(generator=generator)
            t = self.times.sample(
                len(x), schedule=self.schedule, generator=generator, device=device
            )
            sigma_t = self.schedule.sigma(t)
            if self.group is not None:
                own = self.group.part(len(x))
                x, z, sigma_t = x[own], z[own], sigma_t[own]
                condition = None if condition is None else condition[own]
                if len(x) == 0:
                    continue
            loss = denoising_loss(denoiser, x, z, sigma_t, condition)
            total += loss.double() * len(x)
        if self.group is not None:
            self.group.sum_(total)
        value = float(total) / n
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the held-out loss is {value}; lower the learning rate, clip harder, or raise "
                "schedule.sigma_min"
            )
        return value


def looks_without_gain(looks: Sequence[tuple[int, float]]) -> int:
    """Count the looks since the lowest loss.

    Arguments:
        looks: (step, loss) of every look, in order.

    Returns:
        How many looks in a row, up to the last, brought no new lowest loss.
    """
    if not looks:
        return 0
    losses = [loss for _, loss in looks]
    return len(losses) - 1 - losses.index(min(losses))
