"""How fast reconstructions are drawn: whole batches of an E-step, noise and sampler included."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from diffem_core.noise import SampleNoise
from pipelines import build
from pipelines.bench.core import SpeedBenchmark, device_name, over_references, rate_beside
from pipelines.bench.reference import Reference, against_official
from pipelines.bench.timing import in_turns, median, peak_memory
from pipelines.costs.flops import call_flops
from storage_schemas._base import Record
from storage_schemas.config import RunConfig

__all__ = ["EStepBenchmark", "EStepSpeed", "bench_e_step"]


class EStepSpeed(Record):
    """How fast one config's E-step is."""

    network: str
    """Which."""
    precision: str
    """Arithmetic."""
    batch: int
    """Reconstructions drawn together."""
    calls: int
    """Network calls per reconstruction."""
    images_s: float
    """Reconstructions per second, median."""
    image_calls_s: float
    """Reconstructions times calls per second."""
    gflop_s: float
    """Rate of the network's arithmetic."""
    of_ceiling: float
    """Median of the rate over the convolution's in the same turn and precision."""
    noise: float
    """Fraction of the time that drawing the samples' own noise takes."""
    against_official: float | None
    """Rate over the official implementation's, scaled; None where unknown."""
    peak_mb: float
    """Most memory that the process (the GPU) has had up to here."""


class EStepBenchmark(SpeedBenchmark):
    """What `diffem bench e-step` tells."""

    speeds: tuple[EStepSpeed, ...]
    """The configs, in the precisions measured."""


def bench_e_step(
    config: RunConfig | None, *, seconds: float = 10.0, batches: Sequence[int] = ()
) -> EStepBenchmark:
    """Measure E-steps from corrupted noise.

    Arguments:
        config: A config, measured as it is; None for the paper's U-Net and a small one, in both
            precisions, with 4 steps.
        seconds: How long to measure each, at least three batches.
        batches: Reconstructions drawn together, each measured; those of the networks by default.

    Raises:
        ValueError: The device has no memory for one of the batches.
    """
    measure = functools.partial(_speed, seconds=seconds)
    device, speeds = over_references(config, measure, batches=batches)
    return EStepBenchmark(
        device=device_name(device), threads=torch.get_num_threads(), speeds=speeds
    )


def _speed(
    subject: Reference, precision: str, device: torch.device, *, seconds: float
) -> EStepSpeed:
    config = subject.config.model_copy(update={"precision": precision})
    channel = build.build_channel(config.channel, config.data.x_shape)
    channel = build.build_conditioning_channel(config, channel, build.stand_in_prior(channel))
    denoiser = build.build_denoiser(config, channel, device=device)
    scaling = build.build_scaling(config.data)
    posterior = build.build_posterior(config, channel, denoiser)
    n = subject.sampling_batch
    generator = torch.Generator().manual_seed(0)
    x = scaling.to_data(torch.randn(n, *channel.x_shape, generator=generator))
    params = channel.draw_params(n, generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    seeds = list(range(n))
    calls = build.network_calls(config.e_step.sampler)
    condition = channel.condition(y, params, scaling)
    flops = call_flops(denoiser.eval(), x.to(device), condition.to(device))

    def draw_noise() -> None:
        noise = SampleNoise(seeds, device=device)
        noise.expect(calls)
        for _ in range(calls):
            noise.normal(channel.x_shape)

    try:
        one, rate, ratio, convolution_float32 = rate_beside(
            lambda: posterior.sample(y, params, seeds=seeds),
            n * calls * flops,
            device,
            precision,
            seconds=seconds,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device_name(device)} has no memory for batches of {n}; give smaller ones"
        ) from error
    noise_time = median(in_turns({"noise": draw_noise}, device, seconds=0.0)["noise"])
    official = subject.official_sampling
    return EStepSpeed(
        network=subject.name,
        precision=precision,
        batch=n,
        calls=calls,
        images_s=n / one,
        image_calls_s=n * calls / one,
        gflop_s=rate,
        of_ceiling=ratio,
        noise=noise_time / one,
        against_official=against_official(n * calls / one, official, convolution_float32, device),
        peak_mb=peak_memory(device),
    )
