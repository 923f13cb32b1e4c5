"""A run in Python: its status, its posterior, its prior.

    from pipelines import open_run

    run = open_run("runs/digits")
    draws = run.posterior().sample(y, {"mask": mask}, draws=16)      # (16, n, 1, 8, 8)
    samples = run.prior().sample(64)                                 # (64, 1, 8, 8)

Observations and samples are in the data's own units. Draws depend on the model, the observation,
its number and the seed, and on nothing else: not on the other observations of a call nor, beyond
rounding, on the batch size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.denoiser import Denoiser
from diffem_core.drawing import draw_prior
from diffem_core.e_step import e_step
from diffem_core.posterior import DiffusionPrior, Posterior
from diffem_core.seeds import derive_seed
from pipelines import build
from pipelines.config_io import with_runner
from pipelines.stages.bench import Bench
from pipelines.using import under_prior
from pipelines.using.arguments import Array, checked_observations, require_positive
from storage_schemas.config import JointPrior, RunConfig
from storage_schemas.manifests import IterationManifest
from storage_schemas.objects import redact_url
from storage_schemas.run_store import RunStore

if TYPE_CHECKING:
    from pipelines.status import RunStatus
    from storage_schemas.config import ChannelConfig

__all__ = ["Levels", "Run", "RunPosterior", "RunPrior", "Summary", "open_run", "summarized"]

Levels = tuple[float, ...]
"""Levels of quantiles, each in [0, 1]."""

_LEVELS: Levels = (0.05, 0.5, 0.95)


def open_run(url: str, *, device: str | None = None, overrides: Sequence[str] = ()) -> Run:
    """Open a run for use; nothing of it is changed.

    Arguments:
        url: Path or fsspec URL of a run, finished or going on.
        device: `cpu`, `cuda`, `cuda:N` or `auto`; that of the run's config by default.
        overrides: Where to work, as assignments `runner.key=value`; as the run did by default.

    Returns:
        The run.

    Raises:
        ValueError: There is no run, or no such device or runner.
    """
    store = RunStore.open(url)
    chosen = [*overrides, *([] if device is None else [f"runner.device={device}"])]
    return Run(store, with_runner(store.config, chosen) if chosen else store.config)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What draws from a posterior say of each sample, pixel by pixel, in data units."""

    mean: Tensor
    """Mean of the draws, shape (n, *x_shape)."""
    std: Tensor | None
    """Their standard deviation, shape (n, *x_shape); None of a single draw."""
    quantiles: Tensor
    """Their quantiles, shape (levels, n, *x_shape)."""
    levels: Levels
    """The levels of the quantiles."""


class Run:
    """A run that exists; made by `open_run`.

    Arguments:
        store: The run's store.
        config: Its config; where to compute may differ from what is stored.
    """

    def __init__(self, store: RunStore, config: RunConfig) -> None:
        self.store = store
        self.config = config
        """The config, every default filled in."""

    def __repr__(self) -> str:
        return f"Run({redact_url(self.store.url)!r})"

    @property
    def url(self) -> str:
        """Where the run is."""
        return self.store.url

    def status(self) -> RunStatus:
        """Read what the run has done, and every number of it; see `diffem status`."""
        from pipelines.status import read_status

        return read_status(self.store)

    @property
    def iterations(self) -> tuple[IterationManifest, ...]:
        """The complete EM iterations, in order, as their manifests: metrics, model digests."""
        return tuple(self.store.completed())

    @functools.cached_property
    def bench(self) -> Bench:
        """The objects that the config describes."""
        return Bench.of(self.store, self.config)

    def iteration(self, iteration: int | Literal["best"] = -1) -> IterationManifest:
        """Choose a complete iteration.

        Arguments:
            iteration: Its number; negative numbers count from the last complete one, -1.
                `best` is the one that a stopping decision names, where the run has one.

        Returns:
            Its manifest: metrics, digest of the model.

        Raises:
            ValueError: There is none.
        """
        found = self.iterations
        where = redact_url(self.url)
        if not found:
            raise ValueError(
                f"{where} has no complete EM iteration yet, so that there is no model to use; "
                "finish one with `diffem run`"
            )
        if iteration == "best":
            stopped = self.store.stopped()
            if stopped is None:
                raise ValueError(
                    f"iteration is 'best' but {where} holds no stopping decision; give a number, "
                    f"0 to {len(found) - 1}, or -1 for the last"
                )
            return found[stopped.best]
        if not -len(found) <= iteration < len(found):
            raise ValueError(
                f"iteration is {iteration} but {where} has the complete iterations 0 to "
                f"{len(found) - 1}; give one of them, or -1 for the last"
            )
        return found[iteration]

    def posterior(self, iteration: int | Literal["best"] = -1) -> RunPosterior:
        """Return the posterior q(x | y) that an EM iteration learned.

        Arguments:
            iteration: See `iteration`.

        Returns:
            The posterior, which draws samples and summaries of them.

        Raises:
            ValueError: There is no such iteration.
            DamageError: Its model is not what was written.
        """
        chosen = self.iteration(iteration)

        def built(bench: Bench) -> Posterior:
            return bench.posterior(chosen.iteration + 1, chosen.model_digest, annealed=False)

        return RunPosterior(
            self.bench, self.bench.channel, built, iteration=chosen, using="posterior"
        )

    def prior(self) -> RunPrior:
        """Return the model of clean data alone.

        It is the one that `prior:` in the config asks for. The model of an EM-MMPS run is
        unconditional: without `prior:`, it is taken itself.

        Raises:
            ValueError: The run has none; the message says how to get one.
            DamageError: It is not what was written.
        """
        return RunPrior(self.bench)

    def posterior_under_prior(
        self,
        channel: ChannelConfig | Channel,
        *,
        solver_iterations: int = under_prior.SOLVER_ITERATIONS,
    ) -> RunPosterior:
        """Return the posterior of another channel under the learned prior.

        Arguments:
            channel: A linear channel with Gaussian noise, for samples of the same shape.
            solver_iterations: Iterations of conjugate gradients per step of the sampler.

        Returns:
            The posterior, for observations of that channel.

        Raises:
            ValueError: The run has no prior, or the channel does not fit.

        References:
            Rozet et al. 2024 (arXiv 2405.13712), moment matching posterior sampling.
        """
        return under_prior.posterior_under_prior(
            self, channel, solver_iterations=solver_iterations
        )


class RunPosterior:
    """A posterior that is sampled from; made by `Run.posterior`.

    Arguments:
        bench: The run.
        channel: The channel whose observations it takes.
        built: Builds the core's posterior from a bench.
        iteration: The commit that its model belongs to.
        using: `posterior`, or `prior` where the prior and another channel make it.
        model_digest: Digest of the model, where it is not that of the commit.
    """

    def __init__(
        self,
        bench: Bench,
        channel: Channel,
        built: Callable[[Bench], Posterior],
        *,
        iteration: IterationManifest,
        using: Literal["posterior", "prior"],
        model_digest: str | None = None,
    ) -> None:
        self._bench = bench
        self._built = built
        self.channel = channel
        """The channel: shapes and parameters of the observations."""
        self.iteration = iteration.iteration
        """EM iteration of the model."""
        self.using = using
        """Which model draws."""
        self.model_digest = model_digest or iteration.model_digest
        """SHA-256 of the model's file."""
        self._posteriors: dict[int | None, Posterior] = {}

    def sample(
        self,
        y: Array,
        params: Mapping[str, Array] | None = None,
        *,
        draws: int = 16,
        seed: int = 0,
        steps: int | None = None,
        batch_size: int | None = None,
        numbers: Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw from the posterior of each observation.

        Arguments:
            y: Observations, shape (n, *y_shape), in the data's units.
            params: Their operator parameters by name, each of shape (n, ...).
            draws: Draws of each.
            seed: Seed of all draws.
            steps: Steps of the sampler; those of the run's config by default.
            batch_size: Samples per network call; that of the run's config by default.
            numbers: A number for each observation, from which its draws are seeded; 0 to n - 1 by
                default.
            on_progress: Called with the number of draws just made.

        Returns:
            Shape (draws, n, *x_shape), in the data's units, on the device of y.

        Raises:
            ValueError: The observations do not fit the channel, or a number is out of range.
            FloatingPointError: A draw is not finite.
        """
        require_positive("draws", draws)
        require_positive("batch_size", batch_size)
        observed, checked = checked_observations(self.channel, y, params)
        n = len(observed)
        if numbers is not None and len(numbers) != n:
            raise ValueError(
                f"numbers has length {len(numbers)} for {n} observations; give one for each"
            )
        numbered = range(n) if numbers is None else numbers
        drawn = e_step(
            self._posterior(steps),
            observed.repeat_interleave(draws, dim=0),
            {name: value.repeat_interleave(draws, dim=0) for name, value in checked.items()},
            seeds=[
                derive_seed(seed, "reconstruct", int(number), draw)
                for number in numbered
                for draw in range(draws)
            ],
            batch_size=batch_size or self._bench.config.e_step.batch_size,
            on_progress=on_progress,
        )
        return drawn.reshape(n, draws, *self.channel.x_shape).transpose(0, 1)

    def summary(
        self,
        y: Array,
        params: Mapping[str, Array] | None = None,
        *,
        draws: int = 16,
        seed: int = 0,
        steps: int | None = None,
        batch_size: int | None = None,
        levels: Levels = _LEVELS,
    ) -> Summary:
        """Summarize draws from the posterior of each observation, pixel by pixel.

        Arguments:
            y: Observations, shape (n, *y_shape), in the data's units.
            params: Their operator parameters by name, each of shape (n, ...).
            draws: Draws of each.
            seed: Seed of all draws.
            steps: Steps of the sampler; those of the run's config by default.
            batch_size: Samples per network call; that of the run's config by default.
            levels: Levels of the quantiles.

        Returns:
            Mean, standard deviation and quantiles of the draws, in the data's units.

        Raises:
            ValueError: As `sample`, or a level is outside of [0, 1].
        """
        _require_levels(levels)
        drawn = self.sample(y, params, draws=draws, seed=seed, steps=steps, batch_size=batch_size)
        return summarized(drawn, levels)

    def sampler(self, steps: int | None = None) -> dict[str, JsonValue]:
        """Describe the sampler, as in a config."""
        return _sampler(self._bench, steps)

    def _posterior(self, steps: int | None) -> Posterior:
        if steps not in self._posteriors:
            self._posteriors[steps] = self._built(_with_steps(self._bench, steps))
        return self._posteriors[steps]


class RunPrior:
    """The prior of a run; made by `Run.prior`.

    Arguments:
        bench: The run.

    Raises:
        ValueError: It has none.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        config, store = bench.config, bench.store
        completed = store.completed()
        committed = store.prior().manifest()
        last = completed[-1] if completed else None
        self.conditional = False
        """Whether its network sees a condition, which is 0 for the prior (`prior.kind: joint`)."""
        if committed is not None and last and committed.parent_digest == last.model_digest:
            self.model_digest = committed.model_digest
            """SHA-256 of the model's file."""
            self.iteration = last
            """The EM iteration that it was made after."""
            self.conditional = isinstance(config.prior, JointPrior)
            self._folder = store.prior()
        elif last is not None and config.prior is None and config.is_mmps(last.iteration):
            self.model_digest, self.iteration = last.model_digest, last
            self._folder = store.iteration(last.iteration)  # type: ignore[assignment]
        else:
            raise ValueError(_no_prior(store, last is not None))

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of a sample."""
        return self._bench.channel.x_shape

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """Its denoiser."""
        weights, _ = self._folder.read_tensors("model", digest=self.model_digest)
        return self._bench.denoiser(weights, conditional=self.conditional)

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        steps: int | None = None,
        batch_size: int | None = None,
        first: int = 0,
        on_progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw clean samples.

        Arguments:
            n: How many.
            seed: Seed of all of them.
            steps: Steps of the sampler; those of the run's config by default.
            batch_size: Samples per network call; that of the run's config by default.
            first: Number of the first: samples `first` to `first + n - 1` of the seed are drawn.
            on_progress: Called with the number of samples just drawn.

        Returns:
            Shape (n, *x_shape), in the data's units, on the CPU.

        Raises:
            ValueError: A number is out of range.
            FloatingPointError: A sample is not finite.
        """
        require_positive("n", n)
        require_positive("batch_size", batch_size)
        size = batch_size or self._bench.config.e_step.batch_size
        prior = self._prior(_with_steps(self._bench, steps))
        seeds = [derive_seed(seed, "sample", i) for i in range(first, first + n)]
        return draw_prior(prior, seeds, batch_size=size, on_progress=on_progress)

    def sampler(self, steps: int | None = None) -> dict[str, JsonValue]:
        """Describe the sampler, as in a config."""
        return _sampler(self._bench, steps)

    def _prior(self, bench: Bench) -> DiffusionPrior:
        channel = bench.conditioning_channel if self.conditional else bench.channel
        return build.build_prior(
            bench.config, channel, self.denoiser, conditional=self.conditional
        )


def summarized(draws: Tensor, levels: Levels = _LEVELS) -> Summary:
    """Summarize draws, in float64.

    Arguments:
        draws: Shape (draws, n, *x_shape).
        levels: Levels of the quantiles.

    Returns:
        Mean, standard deviation and quantiles, each of shape (n, *x_shape).
    """
    exact = draws.double()
    at = torch.tensor(levels, dtype=torch.float64, device=draws.device)
    quantiles = exact.new_empty((0, *draws.shape[1:]))
    if levels:
        quantiles = torch.stack([exact.quantile(level, dim=0) for level in at])
    return Summary(
        mean=exact.mean(dim=0).to(draws.dtype),
        std=exact.std(dim=0).to(draws.dtype) if len(draws) > 1 else None,
        quantiles=quantiles.to(draws.dtype),
        levels=levels,
    )


def _require_levels(levels: Levels) -> None:
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels is {levels}; give numbers from 0 to 1")


def _sampler(bench: Bench, steps: int | None) -> dict[str, JsonValue]:
    config = build.sampler_of(_with_steps(bench, steps).config.e_step)
    described: dict[str, JsonValue] = config.model_dump(mode="json")
    return described


def _with_steps(bench: Bench, steps: int | None) -> Bench:
    if steps is None:
        return bench
    require_positive("steps", steps)
    config = bench.config
    sampler = config.e_step.sampler.model_copy(update={"steps": steps})
    e_step_config = config.e_step.model_copy(update={"sampler": sampler})
    return dataclasses.replace(bench, config=config.model_copy(update={"e_step": e_step_config}))


def _no_prior(store: RunStore, any_iteration: bool) -> str:
    where = redact_url(store.url)
    if store.config.prior is not None:
        return (
            f"the prior of {where} is not complete; finish the run with `diffem run`"
            if any_iteration
            else f"{where} has no complete EM iteration yet; finish the run with `diffem run`"
        )
    last = max(0, len(store.completed()) - 1)
    return (
        f"{where} has no prior: its config has no `prior:`, which is part of what a run is, so "
        "that it cannot be added to this one. Start another run with `prior: {kind: "
        "unconditional, steps: ...}`; to go on from this one's model, give it `start: {kind: "
        f"model, url: {where}/iterations/{last:03d}/model.safetensors}}`, iterations: 1, and no "
        "m_step.first_steps"
    )
