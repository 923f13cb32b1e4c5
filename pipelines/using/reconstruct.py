"""New observations to draws from their posteriors, in shards, into a store that xarray opens.

Everything that can be refused is refused before anything is written: the observations are read
once, every one of them. Then shards are drawn in order. What is complete is not drawn again, and
a draw depends on its observation's number and the seed alone, so that a command that was killed
and repeated ends with the bytes of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from pipelines.progress import reporter, stage
from pipelines.using.arguments import require_positive
from pipelines.using.incoming import Block, Incoming, Survey, opened_observations, survey
from pipelines.using.likeness import PROBE, Likeness, compare, compare_simulated
from pipelines.using.run import Run, RunPosterior, open_run, summarized
from pipelines.using.under_prior import SOLVER_ITERATIONS
from storage_schemas._base import Record
from storage_schemas.config import RunConfig
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.posterior_store import DrawPlan, DrawStore, Summary
from storage_schemas.provenance import collect_provenance

__all__ = ["ReconstructRequest", "ReconstructSummary", "parse_summaries", "reconstruct"]

LEVELS = (0.05, 0.5, 0.95)
"""Levels of the quantiles that are kept."""
_SHARD_BYTES = 2**25
_LARGEST_SHARD = 512
_SUMMARIES: tuple[Summary, ...] = ("mean", "std", "quantiles")


@dataclass(frozen=True, kw_only=True)
class ReconstructRequest:
    """What `diffem reconstruct` was asked for."""

    run: str
    """Path or fsspec URL of the run."""
    observations: str
    """What `diffem ingest` reads or wrote."""
    out: str
    """Path or fsspec URL of the draws."""
    draws: int = 16
    """Draws of each observation."""
    steps: int | None = None
    """Steps of the sampler; those of the run's config by default."""
    summaries: tuple[Summary, ...] | None = None
    """What is kept beside the draws; mean and standard deviation by default."""
    keep_draws: bool = True
    """Whether the draws themselves are kept."""
    iteration: int | Literal["best"] = -1
    """EM iteration of the model; the last complete one by default."""
    seed: int = 0
    """Seed of all draws."""
    batch_size: int | None = None
    """Samples per network call; that of the run's config by default. Changes no number beyond
    rounding."""
    device: str | None = None
    """Where to compute; as the run's config says by default."""
    y: str | None = None
    """Name of the array of observations."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Names of the arrays of operator parameters, by the channel's name for each."""
    x_shape: tuple[int, ...] | None = None
    """Shape of a clean sample; only compared with the run's."""
    channels_last: bool = False
    """Whether the bands of images are the last axis."""
    limit: int | None = None
    """Use only the first observations."""
    channel: RunConfig | None = None
    """A config whose channel made the observations, to be inverted with the prior; None takes
    the run's posterior."""
    solver_iterations: int | None = None
    """Iterations of conjugate gradients per step, with the prior."""

    def __post_init__(self) -> None:
        for name in ("draws", "steps", "batch_size", "solver_iterations"):
            require_positive(f"--{name.replace('_', '-')}", getattr(self, name))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; give 0 or a positive integer")
        if self.channel is None and self.solver_iterations is not None:
            raise ValueError(
                "--solver-iterations is for sampling with the prior; leave it out, or give "
                "--using prior --channel CONFIG"
            )
        if self.channel is not None and self.iteration != -1:
            raise ValueError(
                "--iteration chooses an EM iteration's posterior, but the prior is made after the "
                "last one; leave it out"
            )
        if self.draws == 1 and "std" in (self.summaries or ()):
            raise ValueError("--summary std needs at least 2 draws but --draws is 1; give more")
        if not self.keep_draws and not self.kept_summaries:
            raise ValueError(
                "--no-draws without a summary would keep nothing; give --summary mean"
            )

    @property
    def kept_summaries(self) -> tuple[Summary, ...]:
        """What is kept beside the draws."""
        if self.summaries is not None:
            return self.summaries
        return ("mean", "std") if self.draws > 1 else ()


class ReconstructSummary(Record):
    """What was reconstructed."""

    out: str
    """Where the draws are."""
    arrays: dict[str, tuple[int, ...]]
    """The arrays of `draws.zarr` and their shapes."""
    samples: int
    """Observations."""
    draws: int
    """Draws of each."""
    shards: int
    """Shards."""
    reused: int
    """Shards that were there already."""
    using: str
    """`posterior`, or `prior`."""
    iteration: int
    """EM iteration of the model."""
    model_digest: str
    """SHA-256 of the model's file."""
    likeness: Likeness
    """How the observations compare with those of the run."""
    seconds: float
    """Seconds that it took."""


def reconstruct(request: ReconstructRequest) -> ReconstructSummary:
    """Draw from the posteriors of new observations.

    Arguments:
        request: Which, with what, and where the draws go.

    Returns:
        What is there now.

    Raises:
        ValueError: The observations cannot be read or do not fit, the run has no model, or
            something else is at `out`.
        LeaseHeld: Another process is writing there.
        DamageError: The model is not what was written.
    """
    began = time.monotonic()
    objects = ObjectStore(request.out)
    store = DrawStore(objects)
    run = open_run(request.run, device=request.device)
    posterior = _posterior(run, request)
    with opened_observations(
        request.observations,
        posterior.channel,
        y=request.y,
        params=request.params,
        x_shape=request.x_shape,
        channels_last=request.channels_last,
        limit=request.limit,
    ) as incoming:
        seen = survey(incoming, probe=PROBE)
        plan = _plan(run, posterior, request, incoming, seen)
        store.require_same(plan)
        likeness = _likeness(run, posterior, seen.probe)
        reporter().note(("warning: " if likeness.differs else "") + likeness.words())
        attributes = _attributes(run, posterior, request, incoming)
        with RunLease(objects, owner="diffem reconstruct") as lease:
            objects.sweep()  # what a writer that was killed had open
            plan = store.create(plan, incoming.sample_ids, attributes)
            missing = set(store.missing())
            reused = plan.shards - len(missing)
            if missing:
                objects.delete("draws.json")
                _draw(store, plan, posterior, request, incoming, missing, lease)
            if store.manifest() is None:
                lease.check()
                store.seal(attributes, {"likeness": likeness.model_dump(mode="json")})
    return ReconstructSummary(
        out=redact_url(request.out),
        arrays={name: (plan.samples, *shape) for name, shape in plan.shapes().items()},
        samples=plan.samples,
        draws=request.draws,
        shards=plan.shards,
        reused=reused,
        using=posterior.using,
        iteration=posterior.iteration,
        model_digest=posterior.model_digest,
        likeness=likeness,
        seconds=time.monotonic() - began,
    )


def parse_summaries(text: str) -> tuple[Summary, ...]:
    """Read `mean,std,quantiles`, or `none`.

    Raises:
        ValueError: A name is none of these.
    """
    names = [] if text.strip() == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _SUMMARIES:
            raise ValueError(
                f"--summary is {text!r} but {name!r} is no summary; known are "
                f"{', '.join(_SUMMARIES)}, or none"
            )
    return tuple(name for name in _SUMMARIES if name in names)


def _posterior(run: Run, request: ReconstructRequest) -> RunPosterior:
    if request.channel is None:
        return run.posterior(request.iteration)
    return run.posterior_under_prior(
        request.channel.channel,
        solver_iterations=request.solver_iterations or SOLVER_ITERATIONS,
    )


def _likeness(run: Run, posterior: RunPosterior, probe: Block) -> Likeness:
    if posterior.using == "posterior":
        return compare(run.bench, posterior.channel, probe)
    return compare_simulated(run.bench, posterior.channel, probe, iteration=posterior.iteration)


def _plan(
    run: Run,
    posterior: RunPosterior,
    request: ReconstructRequest,
    incoming: Incoming,
    seen: Survey,
) -> DrawPlan:
    x_shape = posterior.channel.x_shape
    width = 4 * math.prod(x_shape) * request.draws
    inverted: dict[str, JsonValue] = {}
    if request.channel is not None:
        inverted = {
            "channel": request.channel.channel.model_dump(mode="json"),
            "solver_iterations": request.solver_iterations or SOLVER_ITERATIONS,
        }
    return DrawPlan(
        request={
            "run": run.store.manifest.config_digest,
            "using": posterior.using,
            "iteration": posterior.iteration,
            "model": posterior.model_digest,
            "observations": seen.digest,
            "sampler": posterior.sampler(request.steps),
            "seed": request.seed,
            **inverted,
        },
        samples=len(incoming),
        x_shape=x_shape,
        draws=request.draws,
        kept=request.keep_draws,
        summaries=request.kept_summaries,
        levels=LEVELS if "quantiles" in request.kept_summaries else (),
        shard_size=max(1, min(_LARGEST_SHARD, _SHARD_BYTES // width, len(incoming))),
        units=run.store.observations().manifest.units,
    )


def _attributes(
    run: Run, posterior: RunPosterior, request: ReconstructRequest, incoming: Incoming
) -> dict[str, JsonValue]:
    channel = run.config.channel if request.channel is None else request.channel.channel
    return {
        "title": "DiffEM reconstructions of new observations",
        "source": incoming.description,
        "run": run.config.name,
        "method": run.config.method,
        "config_digest": run.store.manifest.config_digest,
        "em_iteration": posterior.iteration,
        "using": posterior.using,
        "model_digest": posterior.model_digest,
        "channel": channel.kind,
        "sampler": posterior.sampler(request.steps),
        "seed": request.seed,
        "code_version": collect_provenance().code_version,
        "run_code_version": run.store.manifest.provenance.code_version,
    }


def _draw(
    store: DrawStore,
    plan: DrawPlan,
    posterior: RunPosterior,
    request: ReconstructRequest,
    incoming: Incoming,
    missing: set[int],
    lease: RunLease,
) -> None:
    total = plan.samples * request.draws
    undone = sum(stop - start for start, stop in (plan.rows(shard) for shard in missing))
    done = total - undone * request.draws
    with stage("drawing", total=total, unit="draws", done=done) as advance:
        for shard, block in enumerate(incoming.blocks(plan.shard_size)):
            if shard not in missing:
                continue
            began = time.perf_counter()
            start, stop = plan.rows(shard)
            drawn = posterior.sample(
                block.y,
                block.params,
                draws=request.draws,
                seed=request.seed,
                steps=request.steps,
                batch_size=request.batch_size,
                numbers=incoming.sample_ids[start:stop].tolist(),
                on_progress=advance,
            )
            lease.check()
            arrays = _arrays(plan, drawn)
            store.write_shard(shard, arrays, seconds=time.perf_counter() - began)


def _arrays(plan: DrawPlan, drawn: torch.Tensor) -> dict[str, NDArray[Any]]:
    """Bring draws (draws, n, *x_shape) and their summaries to the store's order."""
    summary = summarized(drawn, plan.levels)
    found: dict[str, NDArray[Any]] = {}
    if plan.kept:
        found["x_hat"] = drawn.transpose(0, 1).numpy()
    for name in plan.summaries:
        match name:
            case "mean":
                found[name] = summary.mean.numpy()
            case "std":
                assert summary.std is not None, "a single draw has none, and is refused"
                found[name] = summary.std.numpy()
            case "quantiles":
                found[name] = np.moveaxis(summary.quantiles.numpy(), 0, 1)
    return found
