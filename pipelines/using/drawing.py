"""Draws of some shards of new observations: by this process, or as a stage of another one."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import cancellation
from pipelines.progress import stage
from pipelines.using.incoming import Incoming, opened_observations
from pipelines.using.request import ReconstructRequest
from pipelines.using.run import Run, RunPosterior, open_run, summarized
from pipelines.using.under_prior import SOLVER_ITERATIONS
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore
from storage_schemas.posterior_store import DrawPlan, DrawStore

__all__ = ["build_posterior", "draw", "draw_shards", "opened_for", "opened_run"]


def opened_run(request: ReconstructRequest) -> Run:
    """Open the run of a request, to draw where the request says."""
    return open_run(request.run, device=request.device, overrides=request.overrides)


def build_posterior(run: Run, request: ReconstructRequest) -> RunPosterior:
    """Build what draws: the run's posterior, or that of another channel under its prior."""
    if request.channel is None:
        return run.posterior(request.iteration)
    return run.posterior_under_prior(
        request.channel.channel,
        solver_iterations=request.solver_iterations or SOLVER_ITERATIONS,
    )


def opened_for(
    request: ReconstructRequest, posterior: RunPosterior
) -> AbstractContextManager[Incoming]:
    """Open the observations of a request."""
    return opened_observations(
        request.observations,
        posterior.channel,
        y=request.y,
        params=request.params,
        x_shape=request.x_shape,
        channels_last=request.channels_last,
        limit=request.limit,
    )


def draw_shards(encoded: dict[str, Any], shards: Sequence[int], title: str) -> int:
    """Draw some shards of a store that is laid out.

    Arguments:
        encoded: The request; its model and its observations are named so that they cannot change.
        shards: Numbers of the shards.
        title: What progress is shown as.

    Returns:
        The shards that were drawn; those that are there already are left.

    Raises:
        ValueError: The model is another one than that of the plan.
        Cancelled: An end was asked for; the shard in hand is not written.
    """
    request = ReconstructRequest.of(encoded)
    store = DrawStore(ObjectStore(request.out))
    plan = store.plan()
    assert plan is not None, "the coordinator lays the arrays out before the fan-out"
    missing = {shard for shard in shards if store.shard(shard) is None}
    if not missing:
        return 0
    posterior = build_posterior(opened_run(request), request)
    if posterior.model_digest != plan.request["model"]:
        raise ValueError(
            f"the model has digest {posterior.model_digest} here but {plan.request['model']} "
            "where the draws were begun; see that all processes read the same run"
        )
    with opened_for(request, posterior) as incoming:
        draw(store, plan, posterior, request, incoming, missing, title=title)
    return len(missing)


def draw(
    store: DrawStore,
    plan: DrawPlan,
    posterior: RunPosterior,
    request: ReconstructRequest,
    incoming: Incoming,
    missing: Collection[int],
    *,
    done: int = 0,
    title: str = "drawing",
    lease: RunLease | None = None,
) -> None:
    """Draw the missing shards, in order.

    Arguments:
        store: Where they go.
        plan: What was asked for, laid out.
        posterior: What draws.
        request: Draws, seed, steps and batch size.
        incoming: The observations.
        missing: Numbers of the shards.
        done: Draws that are there already, for showing progress.
        title: What progress is shown as.
        lease: Checked before a shard is written, where this process holds it.
    """
    undone = sum(stop - start for start, stop in map(plan.rows, missing)) * request.draws
    with stage(title, total=done + undone, unit="draws", done=done) as advance:

        def on_progress(draws: int) -> None:
            advance(draws)
            cancellation.check()

        first, last = min(missing), max(missing)
        for shard, block in enumerate(incoming.blocks(plan.shard_size, first), first):
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
                on_progress=on_progress,
            )
            if lease is not None:
                lease.check()
            store.write_shard(shard, _arrays(plan, drawn), seconds=time.perf_counter() - began)
            if shard == last:
                break


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
