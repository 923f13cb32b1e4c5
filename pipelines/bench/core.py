"""How fast networks compute, against what this machine can do at most.

The ceilings are a 3 x 3 convolution of 128 channels on 32 images of 32 x 32, a product of two
2048 x 2048 matrices, and a copy of 256 MB. A network's rate is its multiplications and additions
per second; it stands beside the convolution in its own precision, measured in the same turn.

The official implementation (JAX, float32) was measured on another machine, whose convolution
reached 500 GFLOP/s in float32; its rates are scaled by this machine's float32 convolution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffem_core.examples import denoising_loss
from diffem_core.networks.dropout import Dropout
from pipelines import build
from pipelines.bench.reference import Reference, against_official, references
from pipelines.bench.timing import Work, in_turns, median, peak_memory
from pipelines.costs.flops import call_flops
from storage_schemas._base import Record
from storage_schemas.config import RunConfig

__all__ = [
    "Ceilings",
    "CoreBenchmark",
    "NetworkSpeed",
    "SpeedBenchmark",
    "bench_core",
    "convolution",
    "convolution_rate",
    "device_name",
    "measure_ceilings",
    "over_references",
    "rate_beside",
]

Speed = TypeVar("Speed")

_CONVOLUTION = 2 * 32 * 32 * 32 * 128 * 128 * 9
_MATMUL = 2 * 2048**3
_COPIED = 256 * 2**20
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Ceilings(Record):
    """The machine's own limits, medians: GFLOP/s and GB/s."""

    convolution_float32: float
    """3 x 3 convolution, 128 channels, batch 32 (on GPUs PyTorch takes TF32)."""
    convolution_bfloat16: float
    """The same in bfloat16."""
    matmul_float32: float
    """Product of matrices of 2048 x 2048."""
    matmul_bfloat16: float
    """The same in bfloat16."""
    memory_gb_s: float
    """Bytes read and written per second by a copy of 256 MB."""


class NetworkSpeed(Record):
    """How fast one network does one kind of work."""

    network: str
    """Which."""
    work: str
    """`sampling` (a call without gradient) or `training` (loss and gradient)."""
    precision: str
    """Arithmetic."""
    batch: int
    """Images per call."""
    parameters: int
    """Weights."""
    gflop: float
    """Multiplications and additions per image and call, forward, in 1e9."""
    images_s: float
    """Images (times calls, in sampling) per second, median."""
    gflop_s: float
    """Rate, median; a gradient step counts as three calls."""
    of_ceiling: float
    """Median of the rate over the convolution's in the same turn and precision."""
    against_official: float | None
    """Images per second over the official implementation's, which ran on a processor, scaled; None
    where unknown."""
    peak_mb: float
    """Most memory that the process (the GPU) has had up to here."""


class SpeedBenchmark(Record):
    """What every benchmark of speed tells first."""

    device: str
    """Where it ran."""
    threads: int
    """Threads of the processor."""


class CoreBenchmark(SpeedBenchmark):
    """What `diffem bench core` tells."""

    ceilings: Ceilings
    """The machine's limits."""
    speeds: tuple[NetworkSpeed, ...]
    """The networks."""


def bench_core(config: RunConfig | None, *, seconds: float = 10.0) -> CoreBenchmark:
    """Measure the machine's ceilings and the networks.

    Arguments:
        config: A config, whose network is measured in both precisions; None for the paper's U-Net
            and a small one.
        seconds: How long to measure each thing.
    """
    subjects = references(config)
    device = build.build_device(subjects[0].config.runner)
    ceilings = measure_ceilings(device, seconds=seconds)
    speeds = [
        _speed(subject, precision, work, device, seconds)
        for subject in subjects
        for precision in _TYPES
        for work in ("sampling", "training")
    ]
    return CoreBenchmark(
        device=device_name(device),
        threads=torch.get_num_threads(),
        ceilings=ceilings,
        speeds=tuple(speeds),
    )


def over_references(
    config: RunConfig | None,
    speed: Callable[[Reference, str, torch.device], Speed],
    *,
    batches: Sequence[int] = (),
) -> tuple[torch.device, tuple[Speed, ...]]:
    """Measure the networks that are asked for: a config's in its precision, or all in both.

    Arguments:
        config: The config; None for the paper's U-Net and a small one.
        speed: What measures one network in one precision.
        batches: Images per call in sampling, each measured; those of the networks by default.

    Returns:
        The device, and what was measured.
    """
    subjects = [
        dataclasses.replace(subject, sampling_batch=batch)
        for subject in references(config)
        for batch in batches or (subject.sampling_batch,)
    ]
    device = build.build_device(subjects[0].config.runner)
    precisions = tuple(_TYPES) if config is None else (config.precision,)
    return device, tuple(
        speed(subject, precision, device) for subject in subjects for precision in precisions
    )


def measure_ceilings(device: torch.device, *, seconds: float) -> Ceilings:
    """Measure the machine's limits, in turns."""
    source = torch.randn(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    works: dict[str, Work] = {"memory": lambda: target.copy_(source)}
    for name, dtype in _TYPES.items():
        a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
        works[f"matmul_{name}"] = functools.partial(torch.matmul, a, b)
        works[f"convolution_{name}"] = convolution(device, name)
    with torch.inference_mode():
        taken = in_turns(works, device, seconds=seconds)
    rates = {
        name: (_CONVOLUTION if name.startswith("convolution") else _MATMUL) / median(times) / 1e9
        for name, times in taken.items()
        if name != "memory"
    }
    return Ceilings(**rates, memory_gb_s=2 * _COPIED / median(taken["memory"]) / 1e9)


def convolution(device: torch.device, precision: str) -> Work:
    """Return the convolution that is the ceiling; it costs what `_CONVOLUTION` says."""
    x, weight = (
        torch.randn(shape).to(device, _TYPES[precision], memory_format=torch.channels_last)
        for shape in ((32, 128, 32, 32), (128, 128, 3, 3))
    )

    def convolve() -> Tensor:
        with torch.inference_mode():
            return F.conv2d(x, weight, padding=1)

    return convolve


def convolution_rate(seconds: float) -> float:
    """Return the operations per second of a `convolution` that took so long."""
    return _CONVOLUTION / seconds


def rate_beside(
    work: Work, flops: float, device: torch.device, precision: str, *, seconds: float
) -> tuple[float, float, float, float]:
    """Measure work beside the convolution, in turns.

    Arguments:
        work: What is measured.
        flops: Multiplications and additions of one call.
        device: Where.
        precision: The convolution's precision.
        seconds: How long.

    Returns:
        Medians: seconds of a call; GFLOP/s; these over the convolution's in `precision`; the
        convolution's GFLOP/s in float32.
    """
    works = {"own": convolution(device, precision), "float32": convolution(device, "float32")}
    taken = in_turns({**works, "work": work}, device, seconds=seconds)
    ratios = [
        flops / own_time / convolution_rate(conv_time)
        for own_time, conv_time in zip(taken["work"], taken["own"], strict=True)
    ]
    one = median(taken["work"])
    return one, flops / one / 1e9, median(ratios), convolution_rate(median(taken["float32"])) / 1e9


def device_name(device: torch.device) -> str:
    """Name the GPU, or say that it is a processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"


def _speed(
    subject: Reference, precision: str, work: str, device: torch.device, seconds: float
) -> NetworkSpeed:
    config = subject.config.model_copy(update={"precision": precision})
    channel = build.build_channel(config.channel, config.data.x_shape)
    channel = build.build_conditioning_channel(config, channel, build.stand_in_prior(channel))
    denoiser = build.build_denoiser(config, channel, device=device)
    n = subject.sampling_batch if work == "sampling" else subject.training_batch
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, z = normal(n, *channel.x_shape), normal(n, *channel.x_shape)
    condition = normal(n, channel.condition_channels, *channel.x_shape[1:])
    sigma, sigmas = torch.ones(1, device=device), normal(n).exp()
    flops = call_flops(denoiser.eval(), x, condition)
    for module in denoiser.modules():
        if isinstance(module, Dropout):
            module.generator = generator

    def learn() -> None:
        denoiser.zero_grad()
        denoising_loss(denoiser, x, z, sigmas, condition).backward()  # type: ignore[no-untyped-call]

    if work == "sampling":
        with torch.inference_mode(), denoiser.repeated():
            call = functools.partial(denoiser, x, sigma, condition)
            found = rate_beside(call, n * flops, device, precision, seconds=seconds)
    else:
        denoiser.train()
        found = rate_beside(learn, 3 * n * flops, device, precision, seconds=seconds)
    one, rate, ratio, convolution_float32 = found
    official = subject.official_sampling if work == "sampling" else subject.official_training
    return NetworkSpeed(
        network=subject.name,
        work=work,
        precision=precision,
        batch=n,
        parameters=sum(p.numel() for p in denoiser.parameters()),
        gflop=flops / 1e9,
        images_s=n / one,
        gflop_s=rate,
        of_ceiling=ratio,
        against_official=against_official(n / one, official, convolution_float32, device),
        peak_mb=peak_memory(device),
    )
