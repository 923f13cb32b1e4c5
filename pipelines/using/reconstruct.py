"""New observations to draws from their posteriors, in shards, into a store that xarray opens.

Everything that can be refused is refused before anything is written: the observations are read
once, every one of them. Then shards are drawn in order. What is complete is not drawn again, and
a draw depends on its observation's number and the seed alone, so that a command that was killed
and repeated ends with the bytes of one that was not.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from pipelines import cancellation
from pipelines.progress import reporter
from pipelines.runners.choice import open_pool
from pipelines.runners.fan_out import fan_out
from pipelines.using.drawing import build_posterior, draw, opened_for, opened_run
from pipelines.using.incoming import Block, Incoming, Survey, survey
from pipelines.using.likeness import PROBE, Likeness, compare, compare_simulated
from pipelines.using.request import ReconstructRequest
from pipelines.using.run import Run, RunPosterior
from pipelines.using.under_prior import SOLVER_ITERATIONS
from storage_schemas._base import Record
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.posterior_store import DrawPlan, DrawStore, Summary
from storage_schemas.provenance import collect_provenance

__all__ = ["ReconstructSummary", "parse_summaries", "reconstruct"]

LEVELS = (0.05, 0.5, 0.95)
"""Levels of the quantiles that are kept."""
_SHARD_BYTES = 2**25
_LARGEST_SHARD = 512
_SUMMARIES: tuple[Summary, ...] = ("mean", "std", "quantiles")


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
    cancellation.begin()  # An end that an earlier run was asked for is not meant here.
    objects = ObjectStore(request.out)
    store = DrawStore(objects)
    run = opened_run(request)
    posterior = build_posterior(run, request)
    with opened_for(request, posterior) as incoming:
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
                _draw(run, store, plan, posterior, request, incoming, missing, lease)
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
    run: Run,
    store: DrawStore,
    plan: DrawPlan,
    posterior: RunPosterior,
    request: ReconstructRequest,
    incoming: Incoming,
    missing: set[int],
    lease: RunLease,
) -> None:
    """Draw the missing shards, here or side by side wherever the run's runner works."""
    with open_pool(run.config.runner) as pool:
        if pool.here:
            undone = sum(stop - start for start, stop in map(plan.rows, missing))
            done = (plan.samples - undone) * request.draws
            draw(store, plan, posterior, request, incoming, missing, done=done, lease=lease)
            return
        parts = _parts(sorted(missing), pool.size)
        encoded = _pinned(request, run, posterior, incoming).encoded()
        of = [f"drawing · part {number} of {len(parts)}" for number in range(1, len(parts) + 1)]
        calls = [(encoded, part, title) for part, title in zip(parts, of, strict=True)]
        fan_out(
            pool,
            "draw_shards",
            calls,
            retries=run.config.runner.retries,
            while_waiting=lease.check,
        )


def _parts(shards: list[int], workers: int) -> list[list[int]]:
    """Divide shards into runs of neighbours, one for each worker, as equal as can be."""
    return [part.tolist() for part in np.array_split(shards, min(workers, len(shards)))]


def _pinned(
    request: ReconstructRequest, run: Run, posterior: RunPosterior, incoming: Incoming
) -> ReconstructRequest:
    """Name the model, the observations and the places so that no process can find others."""
    return replace(
        request,
        run=run.url,
        out=ObjectStore(request.out).url,
        observations=str(Path(request.observations).absolute())
        if Path(request.observations).exists()
        else request.observations,
        iteration=posterior.iteration if request.channel is None else -1,
        limit=len(incoming),
    )
