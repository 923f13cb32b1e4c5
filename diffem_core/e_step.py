"""The E-step: one posterior sample for every observation, `x_hat_i ~ q(x | y_i)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffem_core.drawing import draw_in_batches
from diffem_core.posterior import Posterior
from diffem_core.seeds import derive_seed

__all__ = ["e_step", "refreshed"]


def e_step(
    posterior: Posterior,
    y: Tensor,
    params: Mapping[str, Tensor],
    *,
    seeds: Sequence[int],
    batch_size: int,
    temperature: float = 1.0,
    on_progress: Callable[[int], None] | None = None,
    on_smaller_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw a reconstruction of every observation.

    A batch for which the GPU has no memory is halved, until it fits, and so are those after it.

    Arguments:
        posterior: What is drawn from.
        y: Observations of shape (n, *y_shape), in the data's units.
        params: Their operator parameters, each of length n.
        seeds: One seed per observation; the result depends on them and not on the batch size.
        batch_size: Observations per call of the posterior.
        temperature: Factor on the noise that the posterior draws, in (0, 1]; see `Posterior`.
        on_progress: Called after each batch with the number of observations that it held.
        on_smaller_batch: Called with the new batch size whenever it is halved.

    Returns:
        Reconstructions of shape (n, *x_shape), in the data's units, on the device of y.

    Raises:
        ValueError: There are no observations, the lengths differ, or the batch size is not
            positive.
        FloatingPointError: A reconstruction is not finite.
        torch.OutOfMemoryError: The GPU has no memory for a single observation.
    """
    n = len(y)
    if n == 0:
        raise ValueError("e_step received no observations; give at least one")
    if not 0 < temperature <= 1:
        raise ValueError(f"e_step received temperature {temperature}; give a number in (0, 1]")
    if batch_size < 1:
        raise ValueError(f"e_step received batch_size {batch_size}; give at least 1")
    lengths = {"seeds": len(seeds)} | {f"params[{name!r}]": len(v) for name, v in params.items()}
    for name, length in lengths.items():
        if length != n:
            raise ValueError(
                f"e_step received {n} observations but {name} of length {length}; give one each"
            )

    def draw(rows: slice) -> Tensor:
        given = {name: value[rows] for name, value in params.items()}
        return posterior.sample(y[rows], given, seeds=seeds[rows], temperature=temperature)

    return draw_in_batches(
        draw,
        n,
        batch_size=batch_size,
        on_progress=on_progress,
        on_smaller_batch=on_smaller_batch,
    )


def refreshed(sample_ids: Sequence[int], *, iteration: int, fraction: float, seed: int) -> Tensor:
    """Choose the observations whose reconstructions a lazy E-step draws anew.

    Observation i has its turn in iteration k where frac(k fraction + u_i) < fraction, with u_i
    uniform in [0, 1) and its own: at even intervals of 1 / fraction iterations, rounded.

    Arguments:
        sample_ids: Ids of n observations.
        iteration: EM iteration k.
        fraction: Fraction of the observations in an iteration, in (0, 1].
        seed: Seed of the phases u_i.

    Returns:
        Booleans of shape (n,).

    Raises:
        ValueError: The fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"refreshed received fraction {fraction}; give a number in (0, 1]")
    phases = [derive_seed(seed, int(i)) / 2**63 for i in sample_ids]
    turns = torch.tensor(phases, dtype=torch.float64) + iteration * fraction
    return turns.remainder(1.0) < fraction
