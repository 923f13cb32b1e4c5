"""The whole of DiffEM in memory: E-steps and M-steps in turn, from a first posterior.

    for k = 0, 1, ...:   x_hat_i ~ q_k(x | y_i)  for every observation
                         q_(k+1) <- M-step on (x_hat_i)

For data that fit into memory and runs that need no resuming. The pipelines do the same in shards,
with checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from diffem_core.denoiser import Denoiser
from diffem_core.e_step import e_step
from diffem_core.m_step import m_step
from diffem_core.posterior import DiffusionPosterior, Posterior
from diffem_core.samplers import Sampler
from diffem_core.scaling import Scaling
from diffem_core.schedule import Schedule
from diffem_core.seeds import derive_seed
from diffem_core.times import BetaTime, TimeDistribution

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["EMIteration", "em"]


@dataclass(frozen=True, kw_only=True)
class EMIteration:
    """What one iteration leaves.

    Arguments:
        number: Its number, from 0.
        x_hat: The reconstructions that its E-step drew, in the data's units.
        posterior: The posterior that its M-step learned, which the next E-step draws from.
        mean_loss: Mean loss of its M-step.
    """

    number: int
    x_hat: Tensor
    posterior: Posterior
    mean_loss: float


def em(
    y: Tensor,
    params: Mapping[str, Tensor],
    channel: Channel,
    denoiser: Denoiser,
    start: Posterior,
    *,
    scaling: Scaling,
    sampler: Sampler,
    schedule: Schedule,
    times: TimeDistribution | None = None,
    iterations: int,
    steps: int,
    batch_size: int = 256,
    learning_rate: Callable[[int], float],
    ema_decay: float = 0.99,
    clip_norm: float = 1.0,
    seed: int = 0,
    posterior: Callable[[Denoiser], Posterior] | None = None,
) -> Iterator[EMIteration]:
    """Run EM, one iteration for each element that is taken from the result.

    Arguments:
        y: Observations of shape (n, *y_shape), in the data's units.
        params: Their operator parameters.
        channel: The channel that made them.
        denoiser: The denoiser, trained in place.
        start: The posterior of the first E-step, for example a `GaussianPosterior`.
        scaling: The change between the data's and the network's units.
        sampler: A sampler with its grid bound, for example `functools.partial(ddpm, sigmas=grid)`.
        schedule: Noise level as a function of time.
        times: Distribution of the training times; Beta(3, 3) by default.
        iterations: EM iterations.
        steps: Gradient steps per iteration.
        batch_size: Samples per gradient step and per call of the posterior.
        learning_rate: Learning rate by step, counted through all iterations.
        ema_decay: Decay of the weights' moving average.
        clip_norm: Largest norm of a gradient.
        seed: Seed of all randomness.
        posterior: How a posterior is made of the denoiser. By default the denoiser is conditional
            and is sampled from directly (DiffEM); with `lambda f: MMPSPosterior(f, ...)` and an
            unconditional denoiser this is EM-MMPS.

    Yields:
        The iterations, in order.

    Raises:
        ValueError: There is nothing to iterate.

    References:
        DiffEM (arXiv 2510.12691); Rozet et al. 2024 (EM-MMPS, arXiv 2405.13712).
    """
    if iterations < 1:
        raise ValueError(f"em received {iterations} iterations; give at least 1")
    conditional = posterior is None
    q = start
    for k in range(iterations):
        seeds = [derive_seed(seed, "e_step", k, i) for i in range(len(y))]
        x_hat = e_step(q, y, params, seeds=seeds, batch_size=batch_size)
        first = k * steps
        result = m_step(
            denoiser,
            x_hat,
            channel if conditional else None,
            scaling,
            schedule,
            BetaTime() if times is None else times,
            steps=steps,
            batch_size=batch_size,
            learning_rate=lambda step, first=first: learning_rate(first + step),  # type: ignore[misc]
            ema_decay=ema_decay,
            clip_norm=clip_norm,
            seed=derive_seed(seed, "m_step", k),
        )
        if posterior is None:
            q = DiffusionPosterior(denoiser, channel, scaling, sampler)
        else:
            q = posterior(denoiser)
        yield EMIteration(number=k, x_hat=x_hat, posterior=q, mean_loss=result.mean_loss)
