"""The start: what makes the first reconstructions, judged like every model after it."""

from __future__ import annotations

import time

from diffem_core.gaussian import fit_gaussian_prior
from pipelines import cancellation
from pipelines.model_files import read_model
from pipelines.progress import stage
from pipelines.stages.bench import Bench, Json, Weights, as_arrays, observed
from pipelines.stages.feeding import spread_rows
from pipelines.stages.judge import announce, judge
from storage_schemas.config import (
    GaussianStart,
    MMPSStart,
    ModelStart,
    PseudoInverseStart,
)
from storage_schemas.manifests import StageRecord
from storage_schemas.stage_folder import now

__all__ = ["fit_start"]


def fit_start(run_url: str) -> Json:
    """Make what draws the first reconstructions, and judge its posterior.

    Arguments:
        run_url: The run.

    Returns:
        The model's digest and whether the start was found complete.
    """
    bench = Bench.open(run_url)
    folder = bench.store.start()
    committed = folder.manifest()
    if committed is not None:
        return {"model_digest": committed.model_digest, "reused": True}
    data_digest = bench.store.observations().manifest.data_digest
    fit = folder.stage("fit", parent_digest=data_digest)
    if fit is None:
        fit = _fit(bench, data_digest)
    model_digest = fit.objects["model.safetensors"].sha256
    evaluation = folder.stage("evaluate", parent_digest=model_digest)
    if evaluation is None:
        posterior = bench.posterior(0, model_digest, annealed=False)
        evaluation = judge(bench, folder, posterior, "start", model_digest)
    manifest = folder.commit(metrics=folder.metrics(), stages={"fit": fit, "evaluate": evaluation})
    announce("start", manifest)
    return {"model_digest": model_digest, "reused": False}


def _fit(bench: Bench, data_digest: str) -> StageRecord:
    began = time.perf_counter()
    start = bench.config.start
    units = 1
    match start:
        case GaussianStart():
            tensors, kind, units = _gaussian(bench, start), "gaussian", start.iterations
        case MMPSStart():
            gaussian = start.gaussian
            tensors, kind, units = _gaussian(bench, gaussian), "gaussian", gaussian.iterations
        case PseudoInverseStart():
            tensors, kind = {}, "pseudo_inverse"
        case ModelStart():
            tensors, kind = read_model(start.url), "denoiser"
            bench.denoiser(tensors, conditional=not bench.config.is_mmps(0))  # refuses others
    folder = bench.store.start()
    record = StageRecord(
        stage="fit",
        parent_digest=data_digest,
        objects={"model.safetensors": folder.write_tensors("model", tensors, {"kind": kind})},
        seconds=time.perf_counter() - began,
        units=units,
        finished=now(),
    )
    folder.write_stage(record)
    return record


def _gaussian(bench: Bench, config: GaussianStart) -> Weights:
    observations = bench.store.observations("train")
    training = observed(observations, spread_rows(len(observations), config.samples))
    with stage("start · Gaussian prior", total=config.iterations, unit="rounds") as advance:

        def on_progress(*_: object) -> None:
            advance(1)
            cancellation.check()

        prior = fit_gaussian_prior(
            training.y,
            training.params,
            bench.channel,
            rank=config.rank,
            iterations=config.iterations,
            seed=bench.seed("start"),
            on_progress=on_progress,
        )
    return as_arrays(prior.tensors())
