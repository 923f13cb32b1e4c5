"""A small run whose every number follows from its place, so that any process can make it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.config import (
    DigitsData,
    MStepConfig,
    RandomMaskChannel,
    RunConfig,
    UnetNetwork,
)
from storage_schemas.iteration_store import IterationStore
from storage_schemas.manifests import IterationManifest, Provenance, StageRecord
from storage_schemas.metrics import Metric, Metrics
from storage_schemas.objects import ObjectStore
from storage_schemas.observations import ObservationBlock
from storage_schemas.run_store import RunStore

X_SHAPE = (1, 4, 4)
SAMPLES = 50
SHARD = 16
PROVENANCE = Provenance(code_version="0", python="3", platform="test", packages={})


def make_config(**changes: Any) -> RunConfig:
    given: dict[str, Any] = {
        "name": "tiny",
        "iterations": 2,
        "data": DigitsData(),
        "channel": RandomMaskChannel(keep=0.5, noise_std=0.5),
        "network": UnetNetwork(channels=(8,), blocks=(1,), attention={}),
        "m_step": MStepConfig(steps=10),
    }
    return RunConfig(**(given | changes))


def make_block(start: int, stop: int, *, x_shape: tuple[int, ...] = X_SHAPE) -> ObservationBlock:
    """Row i depends on i alone, so that any cutting into blocks makes the same observations."""
    rows = [np.random.default_rng(i) for i in range(start, stop)]
    return ObservationBlock(
        sample=np.arange(start, stop) * 3,
        holdout=np.arange(start, stop) % 5 == 0,
        y=np.stack([r.normal(size=x_shape) for r in rows]).astype(np.float32),
        params={"mask": np.stack([r.random(x_shape) < 0.5 for r in rows])},
        x=np.stack([r.normal(size=x_shape) for r in rows]).astype(np.float32),
        label=np.arange(start, stop) % 10,
    )


def make_blocks(
    samples: int = SAMPLES, size: int = 13, *, x_shape: tuple[int, ...] = X_SHAPE
) -> Iterator[ObservationBlock]:
    for start in range(0, samples, size):
        yield make_block(start, min(samples, start + size), x_shape=x_shape)


def make_x_hat(iteration: int, start: int, stop: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(100 + iteration).normal(size=(1000, *X_SHAPE))
    return rows[start:stop].astype(np.float32)


def make_metrics(iteration: int) -> Metrics:
    return Metrics(
        values={
            "psnr": Metric(
                value=20.0 + iteration, standard_error=0.1, long_name="PSNR", units="dB"
            ),
            "distance": Metric(value=None, long_name="distance", better="lower"),
        }
    )


def make_stage(stage: str, **fields: Any) -> StageRecord:
    return StageRecord(stage=stage, seconds=1.5, finished=datetime.now(UTC), **fields)


def write_start(store: RunStore) -> None:
    start = store.start()
    if start.manifest() is None:
        record = start.write_tensors("model", {"mean": np.zeros(16, np.float32)})
        stage = make_stage("fit", objects={"model.safetensors": record})
        start.write_stage(stage)
        start.commit(metrics=make_metrics(-1), stages={"fit": stage})


def write_prior(store: RunStore) -> None:
    last, prior = store.completed()[-1], store.prior()
    committed = prior.manifest()
    if committed is not None and committed.parent_digest == last.model_digest:
        return
    if committed is not None:
        prior.clear()
    record = prior.write_tensors("model", {"w": np.full(16, last.iteration, np.float32)})
    parent = last.model_digest
    stage = make_stage("fit", parent_digest=parent, objects={"model.safetensors": record})
    prior.write_stage(stage)
    prior.commit(last, metrics=make_metrics(last.iteration), stages={"fit": stage})


def lay_out(store: RunStore, iteration: int) -> IterationStore:
    folder = store.iteration(iteration)
    parent = store.parent_digest(iteration)
    assert parent is not None
    folder.create_reconstructions(
        store.observations("train").sample_ids,
        x_shape=X_SHAPE,
        shard_size=SHARD,
        parent_digest=parent,
        seed=7,
        units="grey level",
    )
    return folder


def draw(folder: IterationStore, shard: int) -> None:
    plan = folder.reconstructions()
    assert plan is not None
    x_hat = make_x_hat(folder.iteration, *plan.rows(shard))
    folder.write_shard(shard, x_hat, seed=1000 + shard, seconds=0.5)


def resume_iteration(store: RunStore, iteration: int) -> IterationManifest:
    """Do what is not done of an iteration, as the pipeline does."""
    folder = lay_out(store, iteration)
    for shard in folder.missing_shards():
        draw(folder, shard)
    parent = folder.reconstructions_digest()
    stage = folder.stage("m_step", parent_digest=parent)
    if stage is None:
        weights = folder.read_reconstructions().mean(axis=0) + iteration
        record = folder.write_tensors("model", {"w": weights}, {"iteration": iteration})
        stage = make_stage("m_step", parent_digest=parent, objects={"model.safetensors": record})
        folder.write_stage(stage)
    model = stage.objects["model.safetensors"].sha256
    judged = folder.stage("evaluate", parent_digest=model)
    if judged is None:
        records = {
            "metrics.json": folder.write_metrics(make_metrics(iteration)),
            "preview.png": folder.write_bytes("preview.png", b"picture %d" % iteration),
        }
        judged = make_stage("evaluate", parent_digest=model, objects=records)
        folder.write_stage(judged)
    return folder.commit(
        metrics=make_metrics(iteration), stages={"m_step": stage, "evaluate": judged}
    )


def resume_run(url: str | ObjectStore) -> RunStore:
    """Create or resume a run until it is complete, as the pipeline does."""
    store = RunStore.create(url, make_config(), PROVENANCE)
    store.tidy()
    if not store.has_observations():
        store.write_observations(make_blocks(), x_shape=X_SHAPE, units="grey level", source="test")
    write_start(store)
    for iteration in range(len(store.completed()), store.config.iterations):
        resume_iteration(store, iteration)
    write_prior(store)
    return store


def results(objects: ObjectStore) -> dict[str, bytes]:
    """The bytes that must be equal in a resumed and in an uninterrupted run."""
    paths = [
        path
        for path in objects.list()
        if ".zarr/" in path or path.endswith((".safetensors", "metrics.json", ".png"))
    ]
    return objects.read_many(paths)
