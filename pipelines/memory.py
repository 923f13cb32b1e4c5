"""What a config would take in memory, and whether this machine has it: asked before any is taken.

The terms are the large arrays that a stage holds at once: lower bounds, so that what is refused
could not have run. Networks are counted on PyTorch's meta device, where tensors have shapes and
no content.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch

from diffem_core.channel import Channel
from pipelines import build
from storage_schemas.config import (
    CompressedSensingChannel,
    CustomNetwork,
    GaussianStart,
    MMPSStart,
    RayRunner,
    RunConfig,
    SinkhornDistance,
    SlicedWassersteinDistance,
    StoreData,
)

__all__ = ["machine_memory", "require_memory", "require_memory_of_channel", "weights_of"]

_FLOAT, _DOUBLE = 4, 8
_GIB = 2**30
_CLUSTER = 2**43
"""Bytes that no machine of a cluster has: its own memory is not known here."""


def machine_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory_of_channel(config: RunConfig) -> None:
    """Refuse a channel whose operator does not fit into memory, before it is built.

    Raises:
        ValueError: It does not fit.
    """
    channel, size = config.channel, math.prod(config.data.x_shape)
    if isinstance(channel, CompressedSensingChannel):
        rows = min(channel.measurements, size) if channel.fixed else size
        _require(config, "channel", f"projections of {size:,} values", rows * size * _FLOAT)


def require_memory(config: RunConfig, channel: Channel, *, samples: int, holdout: int) -> None:
    """Refuse a config of which one stage alone would not fit into memory.

    Arguments:
        config: The config.
        channel: Its channel.
        samples: Observations, held-out ones included.
        holdout: Held-out ones.

    Raises:
        ValueError: One does not fit; the message names the value of the config to lower.
    """
    for path, what, size in _terms(config, channel, samples, holdout):
        _require(config, path, what, size)


def weights_of(config: RunConfig, channel: Channel, *, conditional: bool) -> int | None:
    """Count the weights of a network without building it; None if it is one of the user's own.

    Raises:
        ValueError: The network's parts do not fit together.
    """
    if isinstance(config.network, CustomNetwork):
        return None
    with torch.device("meta"):
        denoiser = build.build_denoiser(
            config, channel, device=torch.device("meta"), conditional=conditional
        )
    return sum(p.numel() for p in denoiser.parameters())


def _terms(
    config: RunConfig, channel: Channel, samples: int, holdout: int
) -> Iterator[tuple[str, str, int]]:
    """Yield (path in the config, what, bytes)."""
    x_size, y_size = math.prod(channel.x_shape), math.prod(channel.y_shape)
    params_size = sum(math.prod(shape) for shape in channel.params_spec.values())
    condition = channel.condition_channels * math.prod(channel.x_shape[1:])
    one = (3 * x_size + y_size + params_size + condition) * _FLOAT
    evaluation = config.evaluation
    if not isinstance(config.data, StoreData):  # made in memory; a store is read in blocks
        yield "data", f"{samples:,} samples", samples * x_size * _FLOAT
    count = min(config.e_step.batch_size, config.e_step.shard_size, samples - holdout)
    yield "e_step.batch_size", f"a batch of {count:,} samples", count * one
    count = config.m_step.batch_size
    yield "m_step.batch_size", f"a batch of {count:,} samples", count * one
    start = config.start.gaussian if isinstance(config.start, MMPSStart) else config.start
    if isinstance(start, GaussianStart):
        rank = min(start.rank or x_size, x_size)
        yield "start", f"a covariance of rank {rank:,}", rank * x_size * _DOUBLE
    count = evaluation.draws * holdout
    yield "evaluation.draws", f"{count:,} posterior samples", count * x_size * _FLOAT
    match evaluation.distance:
        case SinkhornDistance() as distance:
            count = min(distance.samples, samples)
            size = count**2 * _DOUBLE
            yield "evaluation.distance.samples", f"costs between {count:,} points", size
        case SlicedWassersteinDistance() as distance:
            size = distance.projections * x_size * _FLOAT
            what = f"{distance.projections:,} directions"
            yield "evaluation.distance.projections", what, size
        case _:
            pass
    if config.prior is not None:
        count = config.prior.samples
        yield "prior.samples", f"{count:,} samples", count * x_size * _FLOAT
    conditional = {not config.is_mmps(k) for k in range(config.iterations)}
    for is_conditional in sorted(conditional):
        weights = weights_of(config, channel, conditional=is_conditional)
        if weights is not None:
            # Weights, gradients, average and two moments of an M-step.
            yield "network", f"{weights:,} weights, five times each", 5 * weights * _FLOAT


def _require(config: RunConfig, path: str, what: str, size: int) -> None:
    limit = _CLUSTER if isinstance(config.runner, RayRunner) else machine_memory()
    if size > limit:
        raise ValueError(
            f"{path}: {what} take {size / _GIB:,.1f} GiB or more, but this machine has "
            f"{limit / _GIB:,.1f} GiB of memory; lower it, or take a larger machine"
        )
