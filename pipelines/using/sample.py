"""Draws from the prior of a run, in shards, into a store that xarray opens."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from pipelines.progress import stage
from pipelines.using.arguments import require_positive
from pipelines.using.pictures import sample_grid
from pipelines.using.run import RunPrior, open_run
from storage_schemas._base import Record
from storage_schemas.lease import RunLease
from storage_schemas.objects import ObjectStore, redact_url
from storage_schemas.posterior_store import DrawPlan, DrawStore
from storage_schemas.provenance import collect_provenance

__all__ = ["SampleRequest", "SampleSummary", "sample"]

_SHARD_BYTES = 2**25
_LARGEST_SHARD = 512
_SHOWN = 256


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What `diffem sample` was asked for."""

    run: str
    """Path or fsspec URL of the run."""
    out: str
    """Path or fsspec URL of the samples."""
    n: int
    """How many."""
    steps: int | None = None
    """Steps of the sampler; those of the run's config by default."""
    seed: int = 0
    """Seed of all samples."""
    batch_size: int | None = None
    """Samples per network call; that of the run's config by default."""
    device: str | None = None
    """Where to compute; as the run's config says by default."""
    png: str | None = None
    """Path of a picture of the first samples."""

    def __post_init__(self) -> None:
        require_positive("-n", self.n)
        require_positive("--steps", self.steps)
        require_positive("--batch-size", self.batch_size)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; give 0 or a positive integer")
        if self.png is not None and not Path(self.png).expanduser().parent.is_dir():
            raise ValueError(
                f"--png is {self.png!r} but there is no folder "
                f"{Path(self.png).expanduser().parent}; create it, or give another path"
            )


class SampleSummary(Record):
    """What was drawn."""

    out: str
    """Where the samples are."""
    arrays: dict[str, tuple[int, ...]]
    """The arrays of `draws.zarr` and their shapes."""
    samples: int
    """Samples."""
    shards: int
    """Shards."""
    reused: int
    """Shards that were there already."""
    model_digest: str
    """SHA-256 of the model's file."""
    png: str | None
    """The picture."""
    seconds: float
    """Seconds that it took."""


def sample(request: SampleRequest) -> SampleSummary:
    """Draw samples of a run's prior.

    Arguments:
        request: Of which, how many, and where they go.

    Returns:
        What is there now.

    Raises:
        ValueError: The run has no prior, or something else is at `out`.
        LeaseHeld: Another process is writing there.
        DamageError: The model is not what was written.
    """
    began = time.monotonic()
    objects = ObjectStore(request.out)
    store = DrawStore(objects)
    run = open_run(request.run, device=request.device)
    prior = run.prior()
    sampler = prior.sampler(request.steps)
    width = 4 * math.prod(prior.x_shape)
    plan = DrawPlan(
        request={
            "run": run.store.manifest.config_digest,
            "using": "prior",
            "model": prior.model_digest,
            "sampler": sampler,
            "seed": request.seed,
        },
        samples=request.n,
        x_shape=prior.x_shape,
        draws=None,
        kept=True,
        shard_size=max(1, min(_LARGEST_SHARD, _SHARD_BYTES // width, request.n)),
        units=run.store.observations().manifest.units,
    )
    attributes: dict[str, JsonValue] = {
        "title": "DiffEM samples of the learned prior",
        "run": run.config.name,
        "method": run.config.method,
        "config_digest": run.store.manifest.config_digest,
        "em_iteration": prior.iteration.iteration,
        "using": "prior",
        "model_digest": prior.model_digest,
        "sampler": sampler,
        "seed": request.seed,
        "code_version": collect_provenance().code_version,
        "run_code_version": run.store.manifest.provenance.code_version,
    }
    store.require_same(plan)
    with RunLease(objects, owner="diffem sample") as lease:
        objects.sweep()  # what a writer that was killed had open
        plan = store.create(plan, np.arange(request.n), attributes)
        missing = store.missing()
        if missing:
            objects.delete("draws.json")
            _draw(store, plan, prior, request, missing, lease)
        if store.manifest() is None:
            store.seal(attributes, {})
    if request.png is not None:
        _picture(store, plan, run.config.data.value_range, request.png, run.config.name)
    return SampleSummary(
        out=redact_url(request.out),
        arrays={name: (plan.samples, *shape) for name, shape in plan.shapes().items()},
        samples=plan.samples,
        shards=plan.shards,
        reused=plan.shards - len(missing),
        model_digest=prior.model_digest,
        png=request.png,
        seconds=time.monotonic() - began,
    )


def _draw(
    store: DrawStore,
    plan: DrawPlan,
    prior: RunPrior,
    request: SampleRequest,
    missing: list[int],
    lease: RunLease,
) -> None:
    undone = sum(stop - start for start, stop in map(plan.rows, missing))
    with stage(
        "drawing", total=plan.samples, unit="samples", done=plan.samples - undone
    ) as advance:
        for shard in missing:
            began = time.perf_counter()
            start, stop = plan.rows(shard)
            drawn = prior.sample(
                stop - start,
                seed=request.seed,
                steps=request.steps,
                batch_size=request.batch_size,
                first=start,
                on_progress=advance,
            )
            lease.check()
            store.write_shard(shard, {"x_hat": drawn.numpy()}, seconds=time.perf_counter() - began)


def _picture(
    store: DrawStore,
    plan: DrawPlan,
    value_range: tuple[float, float] | None,
    png: str,
    name: str,
) -> None:
    shards = range(min(plan.shards, -(-_SHOWN // plan.shard_size)))
    shown = np.concatenate([store.read("x_hat", shard) for shard in shards])[:_SHOWN]
    picture = sample_grid(shown, value_range, title=f"{name} · samples of the prior")
    path = Path(png).expanduser()
    ObjectStore(str(path.parent)).write(path.name, picture)
