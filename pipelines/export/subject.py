"""The model that is exported: its denoiser as one function, and what belongs to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffem_core.channel import Channel
from diffem_core.denoiser import Denoiser
from pipelines.using.run import Run
from pipelines.using.under_prior import unconditional_denoiser
from storage_schemas.manifests import IterationManifest
from storage_schemas.metrics import Metrics
from storage_schemas.stage_folder import StageFolder

__all__ = ["Subject", "What", "choose_subject"]

What = Literal["posterior", "prior"]
"""The conditional model of an EM iteration, or the model of clean data alone."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with what belongs to it."""

    run: Run
    """The run."""
    what: What
    """Which model it is."""
    iteration: IterationManifest
    """The EM iteration that made it, or after which it was made."""
    model_digest: str
    """SHA-256 of the model's file in the run."""
    weights: bytes
    """That file."""
    denoiser: Denoiser
    """The denoiser f(x_t, sigma_t, condition), on the CPU, in evaluation mode, in float32."""
    channel: Channel
    """The channel, which says what a conditional network sees."""
    condition_channels: int
    """Channels of the condition that the denoiser takes; 0 for none."""
    gaussian_prior: Mapping[str, NDArray[Any]] | None
    """The Gaussian prior whose posterior mean is part of the condition, if it is."""
    metrics: Metrics | None
    """What was measured of it."""

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """Shape of one condition."""
        return (self.condition_channels, *self.channel.x_shape[1:])

    def example(self, n: int) -> tuple[Tensor, ...]:
        """Return arguments of the denoiser: zeros at noise level 1."""
        x_t, sigma_t = torch.zeros((n, *self.channel.x_shape)), torch.ones(n)
        if not self.condition_channels:
            return x_t, sigma_t
        return x_t, sigma_t, torch.zeros((n, *self.condition_shape))


def choose_subject(run: Run, what: What, iteration: int | Literal["best"] = -1) -> Subject:
    """Read the model that is to be exported.

    Arguments:
        run: The run.
        what: Which model.
        iteration: EM iteration of the posterior.

    Raises:
        ValueError: The run has no such model.
        DamageError: It is not what was written.
    """
    bench, store = run.bench, run.store
    folder: StageFolder
    gaussian_prior = None
    if what == "posterior":
        chosen = run.iteration(iteration)
        if run.config.is_mmps(chosen.iteration):
            raise ValueError(
                f"the model of iteration {chosen.iteration} is unconditional (EM-MMPS): it is no "
                "posterior by itself; export it with --what prior"
            )
        folder, digest = store.iteration(chosen.iteration), chosen.model_digest
        weights, _ = folder.read_tensors("model", digest=digest)
        denoiser = bench.denoiser(weights)
        channels = bench.conditioning_channel.condition_channels
        metrics = chosen.metrics
        if run.config.condition != "observation":
            gaussian_prior = store.start().read_tensors("model")[0]
    else:
        if iteration != -1:
            raise ValueError(
                f"--iteration is {iteration} but the prior is made after the last one; leave it "
                "out, or export the posterior"
            )
        prior = run.prior()
        chosen, digest = prior.iteration, prior.model_digest
        made = store.prior().manifest() if run.config.prior is not None else None
        folder = store.iteration(chosen.iteration) if made is None else store.prior()
        metrics = chosen.metrics if made is None else made.metrics
        denoiser = unconditional_denoiser(prior, bench)
        channels = 0
    return Subject(
        run=run,
        what=what,
        iteration=chosen,
        model_digest=digest,
        weights=folder.read_bytes("model.safetensors"),
        denoiser=_plain(denoiser),
        channel=bench.conditioning_channel,
        condition_channels=channels,
        gaussian_prior=gaussian_prior,
        metrics=metrics,
    )


def _plain(denoiser: Denoiser) -> Denoiser:
    """Return a copy on the CPU that computes in float32, weights in C order."""
    plain = copy.deepcopy(denoiser).cpu()
    plain.precision = torch.float32
    for parameter in plain.parameters():
        parameter.data = parameter.data.contiguous()
        parameter.requires_grad_(False)
    nn.Module.eval(plain)
    return plain
