"""Drawing many samples batch by batch, in smaller batches where a GPU has no memory for more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffem_core.posterior import DiffusionPrior

__all__ = ["draw_in_batches", "draw_prior"]


def draw_in_batches(
    draw: Callable[[slice], Tensor],
    count: int,
    *,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    on_smaller_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw samples in order. A batch for which there is no memory is halved, and so are the next.

    Arguments:
        draw: Draws the samples of the given numbers, which do not depend on the others.
        count: How many, at least 1.
        batch_size: Samples per call, at least 1.
        on_progress: Called after each batch with the number of samples that it held.
        on_smaller_batch: Called with the new batch size whenever it is halved.

    Returns:
        All samples, joined along their first dimension.

    Raises:
        FloatingPointError: A sample is not finite.
        torch.OutOfMemoryError: The GPU has no memory for a single sample.
    """
    parts: list[Tensor] = []
    start = 0
    while start < count:
        rows = slice(start, min(start + batch_size, count))
        part = _if_it_fits(draw, rows)
        if part is None:
            batch_size = (rows.stop - rows.start) // 2
            if on_smaller_batch is not None:
                on_smaller_batch(batch_size)
            continue
        _refuse_non_finite(part, start)
        parts.append(part)
        start = rows.stop
        if on_progress is not None:
            on_progress(len(part))
    return torch.cat(parts)


def draw_prior(
    prior: DiffusionPrior,
    seeds: Sequence[int],
    *,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw samples of a prior.

    Arguments:
        prior: The prior.
        seeds: One for each sample, which depends on it and not on the batch size.
        batch_size: Samples per call; halved where a GPU has no memory for so many.
        on_progress: Called with the number of samples just drawn.

    Returns:
        Shape (len(seeds), *x_shape), in the data's units, on the CPU.

    Raises:
        FloatingPointError: A sample is not finite.
        torch.OutOfMemoryError: The GPU has no memory for a single sample.
    """
    return draw_in_batches(
        lambda rows: prior.sample(seeds=seeds[rows]).cpu(),
        len(seeds),
        batch_size=batch_size,
        on_progress=on_progress,
    )


def _if_it_fits(draw: Callable[[slice], Tensor], rows: slice) -> Tensor | None:
    """Draw one batch; return None if the GPU has no memory for it, but might have for less."""
    try:
        return draw(rows)
    except torch.OutOfMemoryError as error:
        if rows.stop - rows.start == 1:
            raise torch.OutOfMemoryError(
                "the GPU has no memory for one sample, the smallest batch there is; end what "
                f"else runs on it, take a smaller network, or work on the processor ({error})"
            ) from error
    # The error is gone by now, and with it the frames that held the batch.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    return None


def _refuse_non_finite(x: Tensor, start: int) -> None:
    finite = torch.isfinite(x).flatten(1).all(dim=1)
    if not finite.all():
        bad = (start + (~finite).nonzero().flatten()).tolist()
        raise FloatingPointError(
            f"{len(bad)} of the samples drawn are not finite (numbers "
            f"{bad[:8]}{'...' if len(bad) > 8 else ''} of this call); the model has diverged: "
            "lower the learning rate, or start again from an earlier iteration"
        )
