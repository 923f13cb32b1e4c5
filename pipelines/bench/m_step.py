"""How fast the model is refined: whole gradient steps, from examples to the moving average."""

from __future__ import annotations

import functools
import time

import torch

from diffem_core.m_step import m_step
from diffem_core.training import TrainingState
from pipelines import build
from pipelines.bench.core import (
    SpeedBenchmark,
    convolution,
    convolution_rate,
    device_name,
    over_references,
)
from pipelines.bench.reference import Reference, against_official
from pipelines.bench.timing import median, peak_memory, seconds_of
from pipelines.costs.flops import call_flops
from storage_schemas._base import Record
from storage_schemas.config import RunConfig

__all__ = ["MStepBenchmark", "MStepSpeed", "bench_m_step"]

_LEAST = 4
_BATCHES_AT_HAND = 4


class MStepSpeed(Record):
    """How fast one config's M-step is."""

    network: str
    """Which."""
    precision: str
    """Arithmetic."""
    batch: int
    """Reconstructions per gradient step."""
    steps: int
    """Steps that were measured."""
    step_ms: float
    """Milliseconds of a step, median."""
    images_s: float
    """Reconstructions per second."""
    gflop_s: float
    """Rate of the network's arithmetic; a step counts as three calls."""
    of_ceiling: float
    """Median of the rate over the convolution's right after the step, in the same precision."""
    waiting: float
    """Fraction of the time that steps waited for data."""
    against_official: float | None
    """Rate over the official implementation's, scaled; None where unknown."""
    peak_mb: float
    """Most memory that the process (the GPU) has had up to here."""


class MStepBenchmark(SpeedBenchmark):
    """What `diffem bench m-step` tells."""

    speeds: tuple[MStepSpeed, ...]
    """The configs, in the precisions measured."""


def bench_m_step(config: RunConfig | None, *, seconds: float = 10.0) -> MStepBenchmark:
    """Measure M-steps on random reconstructions.

    Arguments:
        config: A config, measured as it is; None for the paper's U-Net and a small one, in both
            precisions.
        seconds: How long to measure each, at least four steps.
    """
    device, speeds = over_references(config, functools.partial(_speed, seconds=seconds))
    return MStepBenchmark(
        device=device_name(device), threads=torch.get_num_threads(), speeds=speeds
    )


def _speed(
    subject: Reference, precision: str, device: torch.device, *, seconds: float
) -> MStepSpeed:
    config = subject.config.model_copy(update={"precision": precision})
    channel = build.build_channel(config.channel, config.data.x_shape)
    prior = build.stand_in_prior(channel)
    recorrupting = build.build_recorrupting_channel(
        config.channel, channel, channel.draw_params(64, generator=torch.Generator())
    )
    recorrupting = build.build_conditioning_channel(config, recorrupting, prior)
    denoiser = build.build_denoiser(config, recorrupting, device=device)
    scaling = build.build_scaling(config.data)
    n = subject.training_batch
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_BATCHES_AT_HAND * n, *channel.x_shape, generator=generator)
    condition = torch.zeros(1, recorrupting.condition_channels, *channel.x_shape[1:])
    flops = call_flops(denoiser.eval(), x[:1].to(device), condition.to(device))
    own, plain = convolution(device, precision), convolution(device, "float32")
    repeats = 50 if device.type == "cuda" else 1
    own()
    plain()
    taken: list[float] = []
    ceilings: list[tuple[float, float]] = []
    ends = last = time.perf_counter()

    def on_step(_: TrainingState) -> None:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - last)
        own_time, plain_time = (seconds_of(f, device, repeats=repeats) for f in (own, plain))
        ceilings.append((own_time, plain_time))
        last = time.perf_counter()

    ends = last + seconds
    result = m_step(
        denoiser,
        scaling.to_data(x),
        recorrupting,
        scaling,
        build.build_schedule(config.schedule),
        build.build_times(config.time),
        steps=10**9,
        batch_size=n,
        learning_rate=lambda _: 1e-6,
        ema_decay=config.m_step.ema_decay,
        clip_norm=config.m_step.clip_norm,
        adam_betas=config.m_step.adam_betas,
        recorruption=config.m_step.recorruption,
        augmentation=build.build_augmentation(config.m_step),
        seed=0,
        on_step=on_step,
        stop=lambda: len(taken) > _LEAST and time.perf_counter() > ends,
    )
    # The first step warms up.
    taken, ceilings = taken[1:], ceilings[1:]
    one = median(taken)
    ratios = [
        3 * n * flops / step / convolution_rate(conv)
        for step, (conv, _) in zip(taken, ceilings, strict=True)
    ]
    reached = convolution_rate(median([plain_time for _, plain_time in ceilings])) / 1e9
    return MStepSpeed(
        network=subject.name,
        precision=precision,
        batch=n,
        steps=len(taken),
        step_ms=1e3 * one,
        images_s=n / one,
        gflop_s=3 * n * flops / one / 1e9,
        of_ceiling=median(ratios),
        waiting=result.waited / sum(taken),
        against_official=against_official(n / one, subject.official_training, reached, device),
        peak_mb=peak_memory(device),
    )
