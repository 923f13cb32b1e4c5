"""The prior: a model of clean data alone, made after the last EM iteration, and judged."""

from __future__ import annotations

import time

import numpy as np

from diffem_core.posterior import DiffusionPrior
from pipelines import build
from pipelines.runners import distributed
from pipelines.stages.bench import Bench, Json, as_arrays
from pipelines.stages.feeding import gathered
from pipelines.stages.judge import announce, judge_prior
from pipelines.stages.training import Plan, train
from storage_schemas.config import JointPrior, UnconditionalPrior
from storage_schemas.manifests import IterationManifest, StageRecord
from storage_schemas.stage_folder import now

__all__ = ["fit_prior", "train_prior"]


def fit_prior(run_url: str) -> Json:
    """Make the prior that the config asks for, and judge it.

    Arguments:
        run_url: A run whose iterations are complete.

    Returns:
        The model's digest and whether it was found complete; nothing where no prior is wanted.
    """
    bench = Bench.open(run_url)
    config = bench.config.prior
    if config is None:
        return {}
    last = bench.store.completed()[-1]
    folder = bench.store.prior()
    committed = folder.manifest()
    if committed is not None and committed.parent_digest == last.model_digest:
        return {"model_digest": committed.model_digest, "reused": True}
    if committed is not None:
        folder.clear()
    fit = folder.stage("fit", parent_digest=last.model_digest)
    if fit is None and config.kind == "unconditional":
        train_prior(run_url)
        fit = folder.stage("fit", parent_digest=last.model_digest)
        assert fit is not None, "a training ends with its record"
    elif fit is None:
        fit = _copy(bench, last)
    model_digest = fit.objects["model.safetensors"].sha256
    evaluation = folder.stage("evaluate", parent_digest=model_digest)
    if evaluation is None:
        prior = _prior(bench, config, model_digest)
        evaluation = judge_prior(bench, folder, prior, config.samples, model_digest)
    manifest = folder.commit(
        last, metrics=folder.metrics(), stages={"fit": fit, "evaluate": evaluation}
    )
    announce("prior", manifest)
    return {"model_digest": model_digest, "reused": False}


def train_prior(run_url: str) -> None:
    """Train a model of the last reconstructions alone, from a checkpoint if there is one.

    Where the config asks for several processes, this one starts them and waits for them.

    Arguments:
        run_url: A run whose iterations are complete.
    """
    bench = Bench.open(run_url)
    config, runner = bench.config.prior, bench.config.runner
    assert isinstance(config, UnconditionalPrior)
    group = distributed.current_group()
    if group is None and (workers := distributed.training_workers(runner)) > 1:
        distributed.train_together("train_prior", (run_url,), runner, workers)
        return
    last = bench.store.completed()[-1]
    folder = bench.store.prior()
    reconstructions = bench.store.iteration(last.iteration)
    memory_gb = runner.memory_gb / (1 if group is None else group.size)
    with gathered(reconstructions, np.arange(last.samples), memory_gb=memory_gb) as x_hat:
        trained = train(
            bench,
            folder,
            bench.denoiser(None, conditional=False),
            x_hat,
            Plan(
                title="prior · training",
                parent_digest=last.model_digest,
                steps=config.steps,
                batch_size=config.batch_size,
                learning_rate=build.build_rate(config.learning_rate, steps=config.steps),
                ema_decay=config.ema_decay,
                seed=bench.seed("prior"),
                channel=None,
                augmentation=build.build_augmentation(bench.config.m_step),
            ),
            group,
        )
    if group is not None and group.rank > 0:
        return  # The first process writes.
    weights = as_arrays(trained.result.weights)
    model = folder.write_tensors("model", weights, {"kind": "unconditional denoiser"})
    record = StageRecord(
        stage="fit",
        parent_digest=last.model_digest,
        objects={"model.safetensors": model, "losses.json": trained.losses},
        seconds=trained.seconds,
        units=config.steps,
        reused=trained.reused,
        finished=now(),
    )
    folder.write_stage(record)
    folder.delete_checkpoint()


def _copy(bench: Bench, last: IterationManifest) -> StageRecord:
    """Take the last model over, which learned the prior by dropping its condition."""
    began = time.perf_counter()
    source, folder = bench.store.iteration(last.iteration), bench.store.prior()
    weights, metadata = source.read_tensors("model", digest=last.model_digest)
    record = StageRecord(
        stage="fit",
        parent_digest=last.model_digest,
        objects={"model.safetensors": folder.write_tensors("model", weights, metadata)},
        seconds=time.perf_counter() - began,
        finished=now(),
    )
    folder.write_stage(record)
    return record


def _prior(
    bench: Bench, config: UnconditionalPrior | JointPrior, model_digest: str
) -> DiffusionPrior:
    weights, _ = bench.store.prior().read_tensors("model", digest=model_digest)
    conditional = isinstance(config, JointPrior)
    denoiser = bench.denoiser(weights, conditional=conditional)
    return build.build_prior(
        bench.config, bench.conditioning_channel, denoiser, conditional=conditional
    )
