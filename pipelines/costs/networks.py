"""Measuring a network: in the config's sampler, and in training."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffem_core.e_step import e_step
from diffem_core.gaussian import GaussianPrior
from pipelines import build
from pipelines.costs import measuring
from pipelines.costs.measuring import line_through, median_of, ticking, white_noise, with_threads
from pipelines.costs.peaks import peak_memory
from pipelines.costs.rates import Affine, NetworkRates
from pipelines.evaluation import Observed
from pipelines.stages.bench import Bench
from pipelines.stages.training import Plan, train
from storage_schemas.config import JointPrior, RunConfig, UnconditionalPrior

__all__ = ["conditional_modes", "network_rates"]


def conditional_modes(config: RunConfig) -> list[bool]:
    """Tell which networks the run trains: conditional ones, unconditional ones, or both."""
    modes = {not config.is_mmps(k) for k in range(config.iterations)}
    if isinstance(config.prior, UnconditionalPrior | JointPrior):
        modes.add(isinstance(config.prior, JointPrior))
    return sorted(modes)


def network_rates(
    bench: Bench,
    config: RunConfig,
    some: Observed,
    *,
    conditional: bool,
    share: int,
    threads: int,
) -> NetworkRates:
    """Measure a network in a sampler, and in training."""
    with with_threads(share):
        call, sample, late, sampling_bytes, shorter = _sampled(bench, config, some, conditional)
    with with_threads(threads):
        step, first, training_bytes, smaller = _trained(bench, config, some, conditional)
    return NetworkRates(
        call=call,
        sample=sample,
        step=step,
        warm_up=late + first,
        sampling_bytes=sampling_bytes,
        training_bytes=training_bytes,
        extrapolated=shorter or smaller,
    )


def _sampled(
    bench: Bench, config: RunConfig, some: Observed, conditional: bool
) -> tuple[Affine, float, float, int, bool]:
    """Measure one call of a network in the config's sampler."""
    full = config.e_step.sampler.steps
    batch_size = config.e_step.batch_size
    mmps = not conditional and any(config.is_mmps(k) for k in range(config.iterations))
    denoiser = bench.denoiser(None, conditional=conditional)
    covariance = _standard(bench) if mmps and config.mmps.covariance == "cov_x" else None

    def posterior(steps: int) -> Any:
        sampler = config.e_step.sampler.model_copy(update={"steps": steps})
        shorter = config.model_copy(
            update={"e_step": config.e_step.model_copy(update={"sampler": sampler})}
        )
        if conditional or mmps:
            channel = bench.channel if mmps else bench.conditioning_channel
            return build.build_posterior(
                shorter, channel, denoiser, mmps=mmps, covariance=covariance
            )
        prior = build.build_prior(shorter, bench.channel, denoiser, conditional=False)
        return _Unconditional(prior)

    def seconds(steps: int, count: int) -> float:
        given = some.take(torch.arange(count) % len(some))
        began = time.perf_counter()
        e_step(
            posterior(steps),
            given.y,
            given.params,
            seeds=list(range(count)),
            batch_size=count,
        )
        return time.perf_counter() - began

    few, least = min(batch_size, 8), min(full, 2)
    calls = build.network_calls
    sampler = config.e_step.sampler

    def calls_of(steps: int) -> int:
        return calls(sampler.model_copy(update={"steps": steps}))

    first = seconds(least, few)
    each = min(seconds(least, few) for _ in range(2)) / calls_of(least) / few
    late = max(0.0, first - each * calls_of(least) * few)
    room = max(1, int(measuring.BUDGET / each / calls_of(least)))
    count = batch_size if room >= batch_size else max(few, 1 << (room.bit_length() - 1))
    with peak_memory(bench.device) as peak:
        short = seconds(least, count)
    each = short / calls_of(least) / count
    steps = max(least, min(full, int(measuring.BUDGET / each / count)))
    long = median_of(lambda: seconds(steps, count)) if steps > least else short
    more = calls_of(steps) - calls_of(least)
    one = long / calls_of(steps)
    if (
        more and long > short
    ):  # Otherwise they differ by chance, and the whole is all that is known.
        one = min((long - short) / more, one)
    sample = max(0.0, long - calls_of(steps) * one) / count
    fewer = max(1, count // 4)
    if fewer < count:
        part = median_of(lambda: seconds(steps, fewer))
        quarter = min(one, max(0.0, part - fewer * sample) / calls_of(steps))
        line = line_through((fewer, quarter), (count, one))
    else:
        line = Affine(fixed=0.0, each=one / count)
    scale = batch_size / count
    return line, sample, late, round(peak.bytes * scale), count < batch_size


@dataclass(frozen=True)
class _Unconditional:
    """A prior, sampled from as if it were a posterior."""

    prior: Any

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw from the prior, whatever the observations."""
        drawn: Tensor = self.prior.sample(seeds=seeds)
        return drawn.cpu()


def _standard(bench: Bench) -> GaussianPrior:
    size = math.prod(bench.channel.x_shape)
    return GaussianPrior.from_samples(
        white_noise(bench, 2 * size if size < 512 else 256),
        rank=max(1, min(64, size // 4)),
    )


def _trained(
    bench: Bench, config: RunConfig, some: Observed, conditional: bool
) -> tuple[Affine, float, int, bool]:
    """Measure gradient steps."""
    batch_size = config.m_step.batch_size
    x_hat = white_noise(bench, max(256, min(len(some), batch_size)))
    folder = bench.store.prior()

    def steps(count: int, batch: int) -> list[float]:
        denoiser = bench.denoiser(None, conditional=conditional)
        with ticking() as marks:
            train(
                bench,
                folder,
                denoiser,
                x_hat,
                Plan(
                    title="rehearsal",
                    parent_digest="0" * 64,
                    steps=count,
                    batch_size=batch,
                    learning_rate=lambda _: 1e-9,
                    ema_decay=config.m_step.ema_decay,
                    seed=0,
                    channel=bench.recorrupting_channel if conditional else None,
                    augmentation=build.build_augmentation(config.m_step),
                ),
            )
        return [after - before for before, after in itertools.pairwise(marks)]

    few = min(batch_size, 8)
    first, *rest = steps(3, few)
    each = min(rest) / few
    late = max(0.0, first - min(rest))
    room = max(1, int(measuring.BUDGET / each / 3))
    batch = batch_size if room >= batch_size else max(few, 1 << (room.bit_length() - 1))
    with peak_memory(bench.device) as peak:
        probe = steps(3, batch)[1:]
    count = max(2, min(60, int(1.5 * measuring.BUDGET / statistics.median(probe))))
    seconds = statistics.fmean(steps(count + 1, batch)[1:])
    if batch == batch_size:
        return Affine(fixed=0.0, each=seconds / batch), late, peak.bytes, False
    fewer = max(1, batch // 4)
    quarter = statistics.fmean(steps(4, fewer)[1:])
    line = line_through((fewer, quarter), (batch, seconds))
    weights = 20 * sum(
        p.numel() for p in bench.denoiser(None, conditional=conditional).parameters()
    )
    grown = weights + max(0, peak.bytes - weights) * batch_size / batch
    return line, late, round(grown), True
