"""The stages of one EM iteration: layout, E-step shards, M-step, evaluation, commit."""

from __future__ import annotations

import itertools
import time

import torch

from diffem_core.e_step import e_step, refreshed
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.seeds import derive_seed
from pipelines import build, cancellation
from pipelines.progress import reporter, stage
from pipelines.runners import distributed
from pipelines.stages.bench import Bench, Json, as_arrays, observed
from pipelines.stages.ceiling import CLEAN_ATTRIBUTES, clean_samples, learns_from_clean
from pipelines.stages.feeding import gathered, spread_rows
from pipelines.stages.judge import announce, judge
from pipelines.stages.training import Plan, split_rows, train
from storage_schemas.config import JointPrior, RunConfig
from storage_schemas.manifests import StageRecord
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import now

__all__ = [
    "commit_iteration",
    "e_step_shard",
    "evaluate_iteration",
    "is_complete",
    "is_done",
    "lay_out_iteration",
    "model_digest",
    "reconstructions_digest",
    "refine_model",
]

# Reconstructions, at most, whose covariance MMPS may take.
_COV_X_SAMPLES = 65_536

# Batch size that was found to fit this process's GPU, by config and iteration: the shards after
# the first one begin with it.
_fitting: dict[tuple[str, int], int] = {}


def is_complete(run_url: str, iteration: int) -> bool:
    """Tell whether an iteration is committed and follows from the model before it."""
    store = RunStore.open(run_url)
    manifest = store.iteration(iteration).manifest()
    return manifest is not None and manifest.parent_digest == store.parent_digest(iteration)


def lay_out_iteration(run_url: str, iteration: int) -> Json:
    """Lay out an iteration's reconstructions before the fan-out; tell which shards are missing."""
    bench = Bench.open(run_url)
    observations = bench.store.training(iteration)
    parent = bench.model_before(iteration)
    folder = bench.store.iteration(iteration)
    plan = folder.create_reconstructions(
        observations.sample_ids,
        x_shape=observations.x_shape,
        shard_size=bench.config.e_step.shard_size,
        parent_digest=parent,
        seed=bench.seed("e_step", iteration),
        units=observations.manifest.units,
        dtype=bench.config.e_step.stored_as,
        attributes=CLEAN_ATTRIBUTES if learns_from_clean(bench.config) else None,
    )
    missing = folder.missing_shards(checksum=True)
    return {
        "config_digest": bench.config.digest,
        "parent_digest": parent,
        "shards": plan.shards,
        "missing": missing,
        "missing_samples": sum(stop - start for start, stop in map(plan.rows, missing)),
    }


def reconstructions_digest(run_url: str, iteration: int) -> str:
    """Return the digest of an iteration's reconstructions: what its M-step works from."""
    return RunStore.open(run_url).iteration(iteration).reconstructions_digest()


def model_digest(run_url: str, iteration: int) -> str:
    """Return the digest of the model that an iteration's M-step made, as the store tells it."""
    record = RunStore.open(run_url).iteration(iteration).stage("m_step", checksum=False)
    assert record is not None, "the flow asks after the M-step"
    return record.objects["model.safetensors"].sha256


def is_done(run_url: str, iteration: int, name: str, parent_digest: str) -> bool:
    """Tell whether a stage is complete in the store and was computed from that parent."""
    folder = RunStore.open(run_url).iteration(iteration)
    return folder.stage(name, parent_digest=parent_digest) is not None


def e_step_shard(
    run_url: str, iteration: int, shard: int, config_digest: str, parent_digest: str
) -> Json:
    """Reconstruct one shard of observations and write it as one object.

    Arguments:
        run_url: The run.
        iteration: EM iteration.
        shard: Number of the shard.
        config_digest: Digest of the run's config.
        parent_digest: Digest of the model that draws.

    Returns:
        The shard's checksum and whether it was found complete.

    Raises:
        Cancelled: An end was asked for; the shard is not written.
    """
    bench = Bench.open(run_url, config_digest)
    folder = bench.store.iteration(iteration)
    found = folder.shard(shard, checksum=True)
    if found is not None and found.parent_digest == parent_digest:
        return {"sha256": found.object.sha256, "seconds": found.seconds, "reused": True}
    plan = folder.reconstructions()
    assert plan is not None, "the coordinator lays the array out before the fan-out"
    began = time.perf_counter()
    rows = slice(*plan.rows(shard))
    title = f"iteration {iteration:03d} · {{}} · shard {shard + 1}/{plan.shards}"
    if learns_from_clean(bench.config):
        count = rows.stop - rows.start
        with stage(title.format("clean samples"), total=count, unit="samples") as advance:
            x_hat = clean_samples(bench, iteration, rows)
            advance(count)
    else:
        x_hat = _reconstructed(
            bench, iteration, rows, plan.seed, parent_digest, title.format("E-step")
        )
    manifest = folder.write_shard(
        shard, x_hat.numpy(), seed=plan.seed, seconds=time.perf_counter() - began
    )
    return {"sha256": manifest.object.sha256, "seconds": manifest.seconds, "reused": False}


def _reconstructed(
    bench: Bench, iteration: int, rows: slice, seed: int, parent_digest: str, title: str
) -> torch.Tensor:
    """Draw the reconstructions of some observations, or keep those that are not due again."""
    config = bench.config.e_step
    given = observed(bench.store.training(iteration), rows)
    seeds = [derive_seed(seed, int(sample)) for sample in given.sample_ids]
    x_hat = torch.empty((len(given), *bench.channel.x_shape))
    redrawn = torch.ones(len(given), dtype=torch.bool)
    if iteration > 0 and config.refresh < 1:
        before = bench.store.iteration(iteration - 1).read_reconstructions(rows)
        # Observations that have come since have no reconstruction yet.
        x_hat[: len(before)] = torch.from_numpy(before).float()
        redrawn[: len(before)] = refreshed(
            given.sample_ids,
            iteration=iteration,
            fraction=config.refresh,
            seed=bench.seed("refresh"),
        )[: len(before)]
    wanted, drawn = int(redrawn.sum()), 0
    with stage(title, total=wanted, unit="samples") as advance:

        def on_progress(samples: int) -> None:
            nonlocal drawn
            advance(samples)
            drawn += samples
            if drawn < wanted:  # A shard that is all drawn is written.
                cancellation.check()

        def on_smaller_batch(size: int) -> None:
            _fitting[bench.config.digest, iteration] = size
            reporter().note(
                f"{title}: no memory for a larger batch, going on with batches of {size}"
            )

        if redrawn.any():
            x_hat[redrawn] = e_step(
                bench.posterior(iteration, parent_digest, annealed=True),
                given.y[redrawn],
                {name: value[redrawn] for name, value in given.params.items()},
                seeds=list(itertools.compress(seeds, redrawn.tolist())),
                batch_size=_fitting.get((bench.config.digest, iteration), config.batch_size),
                temperature=build.build_temperature(config, iteration),
                on_progress=on_progress,
                on_smaller_batch=on_smaller_batch,
            )
    return x_hat


def refine_model(
    run_url: str, iteration: int, config_digest: str, reconstructions_digest: str
) -> Json:
    """Refine the model on the reconstructions, re-corrupted, from a checkpoint if there is one.

    Where the config asks for several processes, this one starts them and waits for them.

    Arguments:
        run_url: The run.
        iteration: EM iteration.
        config_digest: Digest of the run's config.
        reconstructions_digest: Digest of all reconstructions.

    Returns:
        The model's digest and whether it was found complete.
    """
    bench = Bench.open(run_url, config_digest)
    folder = bench.store.iteration(iteration)
    found = folder.stage("m_step", parent_digest=reconstructions_digest)
    if found is not None:
        return {"model_digest": found.objects["model.safetensors"].sha256, "reused": True}
    config = bench.config
    group = distributed.current_group()
    if group is None and (workers := distributed.training_workers(config.runner)) > 1:
        arguments = (run_url, iteration, config_digest, reconstructions_digest)
        distributed.train_together("refine_model", arguments, config.runner, workers)
        return {"model_digest": model_digest(run_url, iteration), "reused": False}
    mmps = config.is_mmps(iteration)
    training = bench.store.training(iteration)
    sample_ids = training.sample_ids
    learned, kept = split_rows(
        sample_ids,
        config.m_step.validation,
        seed=config.seed,
        sizes=training.sizes,
    )
    memory_gb = config.runner.memory_gb / (1 if group is None else group.size)
    with (
        gathered(folder, learned, memory_gb=memory_gb) as x_hat,
        gathered(folder, kept, memory_gb=memory_gb) as held_out,
    ):
        trained = train(
            bench,
            folder,
            bench.denoiser(bench.weights_before(iteration), conditional=not mmps),
            x_hat,
            Plan(
                title=f"iteration {iteration:03d} · M-step",
                parent_digest=reconstructions_digest,
                steps=build.m_step_length(config, iteration),
                batch_size=config.m_step.batch_size,
                learning_rate=build.build_learning_rate(config, iteration),
                ema_decay=config.m_step.ema_decay,
                seed=bench.seed("m_step", iteration),
                channel=None if mmps else bench.recorrupting_channel,
                drop_condition=_drop_condition(config),
                augmentation=build.build_augmentation(config.m_step),
                validation=build.build_validation(config.m_step, held_out),
            ),
            group,
        )
    if group is not None and group.rank > 0:
        return {}  # The first process writes.
    kind = "unconditional denoiser" if mmps else "conditional denoiser"
    if learns_from_clean(config):
        kind += " of clean samples"
    weights = as_arrays(trained.result.weights)
    model = folder.write_tensors("model", weights, {"kind": kind})
    objects = {"model.safetensors": model, "losses.json": trained.losses}
    if mmps and config.mmps.covariance == "cov_x":
        some = spread_rows(len(sample_ids), _COV_X_SAMPLES)
        with gathered(folder, some, memory_gb=memory_gb) as x_hat:
            rank = build.cov_x_rank(config, bench.channel)
            moments = GaussianPrior.from_samples(x_hat, rank=rank)
        objects["cov_x.safetensors"] = folder.write_tensors("cov_x", as_arrays(moments.tensors()))
    folder.write_stage(
        StageRecord(
            stage="m_step",
            parent_digest=reconstructions_digest,
            objects=objects,
            seconds=trained.seconds,
            units=trained.result.steps,
            reused=trained.reused,
            finished=now(),
        )
    )
    folder.delete_checkpoint()
    return {"model_digest": model.sha256, "reused": False}


def _drop_condition(config: RunConfig) -> float:
    return config.prior.probability if isinstance(config.prior, JointPrior) else 0.0


def evaluate_iteration(
    run_url: str, iteration: int, config_digest: str, model_digest: str
) -> Json:
    """Judge the iteration's model on the held-out observations.

    Arguments:
        run_url: The run.
        iteration: EM iteration.
        config_digest: Digest of the run's config.
        model_digest: Digest of the model that the M-step made.

    Returns:
        The numbers and whether they were found complete.
    """
    bench = Bench.open(run_url, config_digest)
    folder = bench.store.iteration(iteration)
    found = folder.stage("evaluate", parent_digest=model_digest)
    if found is None:
        posterior = bench.posterior(iteration + 1, model_digest, annealed=False)
        judge(bench, folder, posterior, f"iteration {iteration:03d}", model_digest)
    metrics = folder.metrics()
    assert metrics is not None, "an evaluation's record stands only over its metrics"
    return {"metrics": metrics.numbers(), "reused": found is not None}


def commit_iteration(run_url: str, iteration: int, shards_reused: int) -> Json:
    """Write `iteration.json`, which alone means that the iteration is complete."""
    bench = Bench.open(run_url)
    folder = bench.store.iteration(iteration)
    shards = folder.shards()
    e_record = StageRecord(
        stage="e_step",
        parent_digest=bench.model_before(iteration),
        seconds=sum(manifest.seconds for manifest in shards.values()),
        units=len(shards),
        reused=shards_reused,
        finished=max(manifest.finished for manifest in shards.values()),
    )
    stages = {"e_step": e_record}
    for name in ("m_step", "evaluate"):
        record = folder.stage(name)
        assert record is not None, f"the flow commits after {name}"
        stages[name] = record
    manifest = folder.commit(metrics=folder.metrics(), stages=stages)
    announce(f"iteration {iteration:03d}", manifest)
    return {"model_digest": manifest.model_digest}
