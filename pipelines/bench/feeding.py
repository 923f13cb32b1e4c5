"""Does training wait for its data? The same M-step on reconstructions in memory and in a file.

`feeding.gathered` keeps them in memory, or in a scratch file that is mapped, by the budget that it
is given. How long it waited for batches is told by the M-step; the two take turns, so that a
machine that is busy with something else disturbs both.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffem_core import Denoiser, LogNormalTime, RandomMask, Scaling, UNet, VELogLinear, m_step
from diffem_core.rates import constant_rate
from pipelines.bench.storage import FeedingSpeed
from pipelines.stages.feeding import gathered
from storage_schemas.benchmark import noisy_images
from storage_schemas.config import RunConfig
from storage_schemas.iteration_store import IterationStore
from storage_schemas.provenance import collect_provenance
from storage_schemas.run_store import RunStore

__all__ = ["measure_feeding"]

_BATCH = 64
_TURNS = 3
_BUDGETS = {"memory": 1e6, "file": 0.0}


def measure_feeding(
    folder: Path,
    *,
    samples: int,
    x_shape: tuple[int, int, int],
    channels: tuple[int, ...],
    steps: int,
) -> FeedingSpeed:
    """Train a small U-Net from memory and from a file, in turns.

    Arguments:
        folder: An empty folder for the reconstructions.
        samples: How many.
        x_shape: Shape of one.
        channels: The network's channels by level.
        steps: Gradient steps of 64 samples, in each of three turns.
    """
    reconstructions = _written(str(folder), samples, x_shape)
    rows = np.arange(samples)
    best = dict.fromkeys(_BUDGETS, float("inf"))
    total, waited = dict.fromkeys(_BUDGETS, 0.0), dict.fromkeys(_BUDGETS, 0.0)
    for _ in range(_TURNS):
        for name, budget in _BUDGETS.items():
            with gathered(reconstructions, rows, memory_gb=budget) as x_hat:
                seconds, waiting = _trained(x_hat, channels, steps)
            best[name] = min(best[name], seconds / steps)
            total[name] += seconds
            waited[name] += waiting
    return FeedingSpeed(
        samples=samples,
        x_shape=x_shape,
        mb=4e-6 * samples * float(np.prod(x_shape)),
        memory_step_ms=1e3 * best["memory"],
        file_step_ms=1e3 * best["file"],
        memory_waiting=waited["memory"] / total["memory"],
        file_waiting=waited["file"] / total["file"],
    )


def _trained(x_hat: Tensor, channels: tuple[int, ...], steps: int) -> tuple[float, float]:
    """Return the seconds of some steps, and those of fetching their batches."""
    bands, height, width = (int(size) for size in x_hat.shape[1:])
    channel = RandomMask((bands, height, width), keep=0.5, noise_std=0.1)
    torch.manual_seed(0)
    network = UNet(
        in_channels=bands,
        condition_channels=channel.condition_channels,
        out_channels=bands,
        channels=channels,
        blocks=(1,) * len(channels),
        embedding=64,
        dropout=0.0,
    )
    began = time.perf_counter()
    result = m_step(
        Denoiser(network),
        x_hat,
        channel,
        Scaling.from_range(-2, 2),
        VELogLinear(sigma_min=0.15, sigma_max=10.0),
        LogNormalTime(mean=0.3, std=1.2),
        steps=steps,
        batch_size=_BATCH,
        learning_rate=constant_rate(1e-3),
        ema_decay=0.99,
        clip_norm=1.0,
        seed=0,
    )
    return time.perf_counter() - began, result.waited


def _written(url: str, samples: int, x_shape: tuple[int, ...]) -> IterationStore:
    """Write reconstructions as an E-step does."""
    config = RunConfig.model_validate(
        {
            "name": "bench",
            "iterations": 1,
            "data": {"kind": "digits"},
            "channel": {"kind": "random_mask", "keep": 0.5, "noise_std": 0.1},
            "network": {"kind": "unet"},
            "m_step": {"steps": 1},
        }
    )
    folder = RunStore.create(url, config, collect_provenance()).iteration(0)
    plan = folder.create_reconstructions(
        np.arange(samples), x_shape=x_shape, shard_size=1000, parent_digest="0" * 64, seed=0
    )
    pattern = noisy_images(min(samples, plan.shard_size), shape=x_shape)
    for shard in range(plan.shards):
        start, stop = plan.rows(shard)
        folder.write_shard(shard, pattern[: stop - start], seed=0, seconds=0.0)
    return folder
