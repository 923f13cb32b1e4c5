"""Judging a posterior: metrics, picture, and the record of the stage. Truth is read here alone."""

from __future__ import annotations

import functools
import math
import time

import torch

from diffem_core.classifier import DigitClassifier
from diffem_core.drawing import draw_prior
from diffem_core.posterior import DiffusionPrior, Posterior
from diffem_core.seeds import derive_seed
from pipelines import build
from pipelines.evaluation import Evaluation, Observed, Truth, evaluate, work_of
from pipelines.evaluation.classifier import fit_classifier
from pipelines.preview import image_preview, observed_images, vector_preview
from pipelines.prior_evaluation import evaluate_prior
from pipelines.progress import reporter, stage
from pipelines.stages.bench import Bench, observed
from pipelines.stages.feeding import spread_rows
from storage_schemas.config import EvaluationConfig, FrechetDistance
from storage_schemas.manifests import (
    IterationManifest,
    ObjectRecord,
    PriorManifest,
    StageRecord,
    StartManifest,
)
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import StageFolder, now

__all__ = ["announce", "judge", "judge_prior"]

# Images that the evaluation's classifier sees in its training, each as often as needed.
_CLASSIFIER_IMAGES = 30_000

# Training observations, at most, that an evaluation looks at.
_POOL = 16_384


def judge(
    bench: Bench, folder: StageFolder, posterior: Posterior, title: str, model_digest: str
) -> StageRecord:
    """Evaluate a posterior, write its metrics and its picture, and record the stage."""
    began = time.perf_counter()
    config = bench.config.evaluation
    holdout = observed(bench.store.observations("holdout"))
    training = bench.store.observations("train")
    others = observed(training, spread_rows(len(training), _pool(config)))
    truth = _truth(bench)
    start = bench.store.start().manifest()
    total = work_of(config, holdout=len(holdout), others=len(others))
    with stage(f"{title} · evaluation", total=total, unit="samples") as advance:
        result = evaluate(
            posterior,
            channel=bench.recorrupting_channel,
            scaling=bench.scaling,
            config=config,
            holdout=holdout,
            others=others,
            truth=truth,
            floors=None if start is None or start.metrics is None else start.metrics.values,
            seed=bench.seed("evaluate"),
            batch_size=bench.config.e_step.batch_size,
            on_progress=advance,
            device=bench.device,
        )
    objects: dict[str, ObjectRecord] = {"metrics.json": folder.write_metrics(result.metrics)}
    if config.preview:
        picture = _preview(bench, result, holdout, truth, f"{bench.config.name} · {title}")
        objects["preview.png"] = folder.write_bytes("preview.png", picture)
    return _recorded(folder, objects, model_digest, units=total, began=began)


def _truth(bench: Bench) -> Truth | None:
    """Read the clean samples, where the run has any: called by the evaluation alone."""
    holdout = bench.store.observations("holdout")
    training = bench.store.observations("train")
    x_holdout = holdout.truth()
    x_training = training.truth(spread_rows(len(training), _pool(bench.config.evaluation)))
    if x_holdout is None or x_training is None:
        return None
    labels = holdout.labels()
    classifier = None
    if _wants_classifier(bench) and labels is not None:
        classifier = _classifier(bench.store.url, bench.config.digest, bench.device)
    return Truth(
        holdout=torch.from_numpy(x_holdout),
        holdout_labels=None if labels is None else torch.from_numpy(labels),
        training=torch.from_numpy(x_training),
        classifier=classifier,
    )


def _pool(config: EvaluationConfig) -> int:
    """Return how many training observations are looked at: as many as are reconstructed, at least.

    They are the same for every evaluation of a run.
    """
    return max(_POOL, config.reconstructions)


def _wants_classifier(bench: Bench) -> bool:
    """Tell whether anything is measured by a classifier of clean images, and there can be one."""
    config = bench.config.evaluation
    if isinstance(config.distance, FrechetDistance):
        return True
    shape = bench.channel.x_shape
    square = len(shape) == 3 and shape[1] == shape[2] >= 8
    return square and any(getattr(m, "features", "") == "classifier" for m in config.metrics)


@functools.lru_cache(maxsize=2)
def _classifier(run_url: str, config_digest: str, device: torch.device) -> DigitClassifier:
    """Fit the classifier of clean images, once a process: its seed makes it the same in each."""
    store = RunStore.open(run_url)
    assert store.config.digest == config_digest
    training = store.observations("train")
    rows = spread_rows(len(training), _pool(store.config.evaluation))
    x, labels = training.truth(rows), training.labels(rows)
    assert x is not None
    assert labels is not None
    return fit_classifier(
        torch.from_numpy(x),
        torch.from_numpy(labels),
        scaling=build.build_scaling(store.config.data),
        seed=derive_seed(store.config.seed, "classifier"),
        epochs=math.ceil(_CLASSIFIER_IMAGES / len(x)),
        runner=store.config.runner,
        device=device,
    )


def _preview(
    bench: Bench, result: Evaluation, holdout: Observed, truth: Truth | None, title: str
) -> bytes:
    if len(bench.channel.x_shape) == 1:
        return vector_preview(
            truth=None if truth is None else truth.training.numpy(),
            draws=result.reconstructions.numpy(),
            title=title,
        )
    # Data often come sorted, by class say: the first ones would look alike.
    shown = torch.from_numpy(spread_rows(len(holdout), bench.config.evaluation.preview))
    params = {name: value[shown] for name, value in holdout.params.items()}
    observed = observed_images(bench.channel, holdout.y[shown], params)
    selection = bench.channel.selection(params)
    seen = None
    if selection is not None:
        seen = selection.reshape(-1, *bench.channel.x_shape).any(dim=1, keepdim=True).numpy()
    assert bench.config.data.value_range is not None
    return image_preview(
        truth=None if truth is None else truth.holdout[shown].numpy(),
        observed=None if observed is None else observed.numpy(),
        seen=seen,
        draws=result.draws[:, shown].numpy(),
        value_range=bench.config.data.value_range,
        title=title,
    )


def announce(title: str, manifest: StartManifest | IterationManifest | PriorManifest) -> None:
    """Tell in one line how good the model of a committed stage is."""
    values = {} if manifest.metrics is None else manifest.metrics.values
    told = [
        f"{name} {metric.value:.3f}"
        for name in ("divergence", "hidden_rmse_mean", "rmse_mean", "distance")
        if (metric := values.get(name)) is not None and metric.value is not None
    ]
    seconds = sum(record.seconds for record in manifest.stages.values())
    reporter().note(f"{title}: {', '.join([*told, f'{seconds:.1f} s'])}")
    collapse = values.get("collapse")
    if collapse is not None and collapse.value:
        reporter().note(f"{title}: {collapse.long_name}")


def judge_prior(
    bench: Bench, folder: StageFolder, prior: DiffusionPrior, samples: int, model_digest: str
) -> StageRecord:
    """Draw from a prior, compare with clean samples and observations, record the stage."""
    began = time.perf_counter()
    config = bench.config
    seed = bench.seed("prior", "samples")
    with stage("prior · evaluation", total=samples, unit="samples") as advance:
        drawn = draw_prior(
            prior,
            [derive_seed(seed, i) for i in range(samples)],
            batch_size=config.e_step.batch_size,
            on_progress=advance,
        )
        start = bench.store.start().manifest()
        training = bench.store.observations("train")
        metrics = evaluate_prior(
            drawn,
            channel=bench.recorrupting_channel,
            scaling=bench.scaling,
            config=config.evaluation,
            holdout=observed(bench.store.observations("holdout")),
            others=observed(training, spread_rows(len(training), _pool(config.evaluation))),
            truth=_truth(bench),
            floors={} if start is None or start.metrics is None else start.metrics.values,
            seed=bench.seed("prior", "evaluate"),
            device=bench.device,
        )
    objects = {"metrics.json": folder.write_metrics(metrics)}
    objects["samples.safetensors"] = folder.write_tensors("samples", {"x": drawn.numpy()})
    return _recorded(folder, objects, model_digest, units=samples, began=began)


def _recorded(
    folder: StageFolder,
    objects: dict[str, ObjectRecord],
    model_digest: str,
    *,
    units: int,
    began: float,
) -> StageRecord:
    """Write the record of an evaluation, after its objects."""
    record = StageRecord(
        stage="evaluate",
        parent_digest=model_digest,
        objects=objects,
        seconds=time.perf_counter() - began,
        units=units,
        finished=now(),
    )
    folder.write_stage(record)
    return record
