"""What every stage works with: the run, its config, and the objects that both describe."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.denoiser import Denoiser
from diffem_core.gaussian import GaussianPosterior
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.posterior import Posterior, PseudoInverse
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from pipelines import build, cancellation
from pipelines.evaluation import Observed
from pipelines.model_files import load_weights
from pipelines.stages.feeding import spread_rows
from storage_schemas.config import RunConfig
from storage_schemas.objects import redact_url
from storage_schemas.observations import Observations
from storage_schemas.run_store import RunStore

__all__ = ["Bench", "Json", "Weights", "as_arrays", "as_tensors", "observed"]

Json = dict[str, Any]
Weights = Mapping[str, NDArray[Any]]

# Operators, at most, that are resampled from those of the observations.
_OPERATORS = 65_536


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a stage works with, built anew from the run's config."""

    store: RunStore
    config: RunConfig
    device: torch.device
    scaling: Scaling
    channel: Channel

    @classmethod
    def open(cls, run_url: str, config_digest: str | None = None) -> Bench:
        """Open a run.

        Arguments:
            run_url: The run.
            config_digest: Digest that its config must have; None accepts any.

        Raises:
            RuntimeError: The config is another by now.
        """
        store = RunStore.open(run_url)
        config = store.config
        if config_digest not in (None, config.digest):
            raise RuntimeError(f"the config of {redact_url(run_url)} changed while it was running")
        return cls.of(store, config)

    @classmethod
    def of(cls, store: RunStore, config: RunConfig) -> Bench:
        """Build what a config describes, for a run whose own config may be for other devices."""
        return cls(
            store=store,
            config=config,
            device=build.build_device(config.runner),
            scaling=build.build_scaling(config.data),
            channel=build.build_channel(config.channel, store.observations().x_shape),
        )

    def seed(self, *parts: str | int) -> int:
        """Return the seed of a part of the run."""
        return derive_seed(self.config.seed, *parts)

    @functools.cached_property
    def recorrupting_channel(self) -> Channel:
        """The channel that corrupts reconstructions."""
        params: Mapping[str, Tensor] = {}
        if build.resamples_operators(self.config.channel):
            training = self.store.observations("train")
            params = as_tensors(training.params(spread_rows(len(training), _OPERATORS)))
        channel = build.build_recorrupting_channel(self.config.channel, self.channel, params)
        return build.build_conditioning_channel(self.config, channel, self._start_prior)

    @functools.cached_property
    def conditioning_channel(self) -> Channel:
        """The channel that says what the network sees of an observation."""
        return build.build_conditioning_channel(self.config, self.channel, self._start_prior)

    @functools.cached_property
    def _start_prior(self) -> GaussianPrior | None:
        """The Gaussian prior of the start; None where the network does not need it."""
        if self.config.condition == "observation":
            return None
        fit = self.store.start().stage("fit", checksum=False)
        if fit is None:
            raise RuntimeError("the Gaussian start is not there, or damaged; run `diffem run`")
        digest = fit.objects["model.safetensors"].sha256
        return GaussianPrior.from_tensors(
            as_tensors(self.store.start().read_tensors("model", digest=digest)[0])
        )

    def denoiser(self, weights: Weights | None, *, conditional: bool = True) -> Denoiser:
        """Build the denoiser, with the run's initial weights or with the given ones.

        Raises:
            ValueError: The weights belong to another network.
        """
        denoiser = build.build_denoiser(
            self.config, self.conditioning_channel, device=self.device, conditional=conditional
        )
        if weights is not None:
            load_weights(denoiser, as_tensors(weights))
        return denoiser

    def weights_before(self, iteration: int) -> Weights | None:
        """Return the weights that an iteration's M-step begins with; None for the initial ones."""
        if build.starts_anew(self.config, iteration):
            return None
        digest = self.model_before(iteration)
        folder = self.store.iteration(iteration - 1) if iteration else self.store.start()
        return folder.read_tensors("model", digest=digest)[0]

    def model_before(self, iteration: int) -> str:
        """Return the digest of the model that draws the reconstructions of an iteration."""
        digest = self.store.parent_digest(iteration)
        if digest is None:
            raise RuntimeError(
                f"iteration {iteration} has no model to begin with; run `diffem run`"
            )
        return digest

    def posterior(self, iteration: int, digest: str, *, annealed: bool) -> Posterior:
        """Return the posterior that draws the reconstructions of an iteration.

        Arguments:
            iteration: EM iteration; the number of iterations gives the last model's posterior.
            digest: Digest of its model.
            annealed: Whether the sampler takes the iteration's number of steps, or all.
        """
        steps_of = iteration if annealed else None
        if iteration == 0:
            return self._start_posterior(digest, steps_of)
        folder = self.store.iteration(iteration - 1)
        weights, _ = folder.read_tensors("model", digest=digest)
        mmps = self.config.is_mmps(iteration - 1)
        covariance = None
        if mmps and self.config.mmps.covariance == "cov_x":
            covariance = GaussianPrior.from_tensors(as_tensors(folder.read_tensors("cov_x")[0]))
        return build.build_posterior(
            self.config,
            self.channel if mmps else self.conditioning_channel,
            _interruptible(self.denoiser(weights, conditional=not mmps)),
            mmps=mmps,
            covariance=covariance,
            iteration=steps_of,
        )

    def _start_posterior(self, digest: str, steps_of: int | None) -> Posterior:
        tensors, metadata = self.store.start().read_tensors("model", digest=digest)
        match metadata["kind"]:
            case "gaussian":
                prior = GaussianPrior.from_tensors(as_tensors(tensors))
                return GaussianPosterior(prior, self.channel)
            case "pseudo_inverse":
                return PseudoInverse(self.channel)
            case _:
                mmps = self.config.is_mmps(0)
                return build.build_posterior(
                    self.config,
                    self.channel,
                    _interruptible(self.denoiser(tensors, conditional=not mmps)),
                    mmps=mmps,
                    iteration=steps_of,
                )


def _interruptible(denoiser: Denoiser) -> Denoiser:
    """Let sampling stop before any network call: nothing of a shard is written before its end."""
    denoiser.register_forward_pre_hook(lambda *_: cancellation.check())
    return denoiser


def observed(
    observations: Observations, rows: slice | NDArray[np.int64] | None = None
) -> Observed:
    """Read observations, all or some."""
    return Observed(
        sample_ids=observations.sample_ids[slice(None) if rows is None else rows].tolist(),
        y=torch.from_numpy(observations.y(rows)),
        params=as_tensors(observations.params(rows)),
    )


def as_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Wrap arrays as tensors, by name."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Turn tensors into arrays, by name."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
