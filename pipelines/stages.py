"""The stages of a run: plain functions of the run's URL, importable and testable without Prefect.

Each stage looks into the store first. What is complete there and was computed from the same
parent is returned as it is (`reused`); everything else is computed, written object first,
recorded last. A stage gets and returns URLs, numbers and digests, never tensors, so that it can
run in any process that reaches the store.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.classifier import DigitClassifier
from diffem_core.denoiser import Denoiser
from diffem_core.e_step import e_step
from diffem_core.gaussian import GaussianPosterior, GaussianPrior, fit_gaussian_prior
from diffem_core.m_step import m_step
from diffem_core.posterior import Posterior
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from diffem_core.training import TrainingState
from pipelines import build
from pipelines.evaluation import Evaluation, Observed, Truth, evaluate, work_of
from pipelines.preview import image_preview, vector_preview
from pipelines.progress import reporter, stage
from pipelines.sources import load_clean_samples
from storage_schemas.config import FrechetDistance, RunConfig
from storage_schemas.manifests import (
    IterationManifest,
    ObjectRecord,
    StageRecord,
    StartManifest,
)
from storage_schemas.objects import redact_url
from storage_schemas.observations import ObservationBlock, Observations
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import StageFolder, now
from storage_schemas.verify import repair, verify

__all__ = [
    "commit_iteration",
    "e_step_shard",
    "evaluate_iteration",
    "first_unfinished_iteration",
    "fit_start",
    "is_complete",
    "is_done",
    "lay_out_iteration",
    "model_before",
    "model_digest",
    "prepare_observations",
    "reconstructions_digest",
    "recover",
    "refine_model",
]

Json = dict[str, Any]

# Images that the evaluation's classifier sees in its training, each as often as needed.
_CLASSIFIER_IMAGES = 30_000

# Observations are corrupted in blocks of this many, each with a seed of its own. Changing it
# changes the data of every run.
_CORRUPTION_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What a stage works with, built anew from the run's config."""

    store: RunStore
    config: RunConfig
    device: torch.device
    scaling: Scaling
    channel: Channel

    @classmethod
    def open(cls, run_url: str, config_digest: str | None = None) -> _Bench:
        store = RunStore.open(run_url)
        config = store.config
        if config_digest not in (None, config.digest):
            raise RuntimeError(f"the config of {redact_url(run_url)} changed while it was running")
        return cls(
            store=store,
            config=config,
            device=build.build_device(config.runner),
            scaling=build.build_scaling(config.data),
            channel=build.build_channel(config.channel, store.observations().x_shape),
        )

    def seed(self, *parts: str | int) -> int:
        return derive_seed(self.config.seed, *parts)

    def denoiser(self, weights: Mapping[str, NDArray[Any]] | None) -> Denoiser:
        denoiser = build.build_denoiser(self.config, self.channel, device=self.device)
        if weights is not None:
            denoiser.load_state_dict(_tensors(weights))
        return denoiser

    def posterior(self, iteration: int, digest: str) -> Posterior:
        """Return the posterior that draws the reconstructions of an iteration.

        Arguments:
            iteration: EM iteration; the number of iterations gives the last model's posterior.
            digest: Digest of its model.
        """
        if iteration == 0:
            tensors, _ = self.store.start().read_tensors("gaussian", digest=digest)
            return GaussianPosterior(GaussianPrior.from_tensors(_tensors(tensors)), self.channel)
        weights, _ = self.store.iteration(iteration - 1).read_tensors("model", digest=digest)
        return build.build_posterior(self.config, self.channel, self.denoiser(weights))


# --------------------------------------------------------------------------------- observations


def prepare_observations(run_url: str) -> Json:
    """Corrupt the bundled data once and keep the corruption, or find it sealed."""
    store = RunStore.open(run_url)
    sealed = store.observations_manifest() if store.has_observations() else None
    if sealed is None:
        config = store.config
        clean = load_clean_samples(config.data, seed=derive_seed(config.seed, "data"))
        x_shape = tuple(clean.x.shape[1:])
        channel = build.build_channel(config.channel, x_shape)
        order = np.random.default_rng(derive_seed(config.seed, "holdout")).permutation(
            len(clean.x)
        )
        holdout = np.zeros(len(clean.x), bool)
        holdout[order[: config.data.holdout]] = True

        with stage("observations", total=len(clean.x), unit="samples") as advance:

            def blocks() -> Iterator[ObservationBlock]:
                for start in range(0, len(clean.x), _CORRUPTION_BLOCK):
                    rows = slice(start, start + _CORRUPTION_BLOCK)
                    seed = derive_seed(config.seed, "corruption", start // _CORRUPTION_BLOCK)
                    generator = torch.Generator().manual_seed(seed)
                    x = torch.from_numpy(clean.x[rows])
                    params = channel.draw_params(len(x), generator=generator)
                    y = channel.corrupt(x, params, generator=generator)
                    yield ObservationBlock(
                        sample=np.arange(start, start + len(x)),
                        holdout=holdout[rows],
                        y=y.numpy(),
                        params={name: value.numpy() for name, value in params.items()},
                        x=clean.x[rows],
                        label=None if clean.label is None else clean.label[rows],
                    )
                    advance(len(x))

            sealed = store.write_observations(
                blocks(),
                x_shape=x_shape,
                units=clean.units,
                source=clean.source,
                attributes={"channel": config.channel.kind},
            )
    return {"data_digest": sealed.data_digest, "samples": sealed.samples}


def _observed(observations: Observations, rows: slice | None = None) -> Observed:
    return Observed(
        sample_ids=observations.sample_ids[rows or slice(None)].tolist(),
        y=torch.from_numpy(observations.y(rows)),
        params=_tensors(observations.params(rows)),
    )


# ---------------------------------------------------------------------------------------- start


def fit_start(run_url: str) -> Json:
    """Fit the Gaussian prior that makes the first reconstructions, and judge its posterior."""
    bench = _Bench.open(run_url)
    folder = bench.store.start()
    data_digest = bench.store.observations().manifest.data_digest
    committed = folder.manifest()
    if committed is not None:
        return {"model_digest": committed.model_digest, "reused": True}
    fit = folder.stage("fit", parent_digest=data_digest)
    if fit is None:
        fit = _fit_gaussian(bench, folder, data_digest)
    model_digest = fit.objects["gaussian.safetensors"].sha256
    evaluation = folder.stage("evaluate", parent_digest=model_digest)
    if evaluation is None:
        evaluation = _judge(bench, folder, bench.posterior(0, model_digest), "start", model_digest)
    manifest = folder.commit(metrics=folder.metrics(), stages={"fit": fit, "evaluate": evaluation})
    _announce("start", manifest)
    return {"model_digest": model_digest, "reused": False}


def _fit_gaussian(bench: _Bench, folder: StageFolder, data_digest: str) -> StageRecord:
    began = time.perf_counter()
    start = bench.config.start
    training = _observed(bench.store.observations("train"))
    with stage("start · Gaussian prior", total=start.iterations, unit="rounds") as advance:
        prior = fit_gaussian_prior(
            training.y,
            training.params,
            bench.channel,
            rank=start.rank,
            iterations=start.iterations,
            seed=bench.seed("start"),
            on_progress=lambda *_: advance(1),
        )
    record = StageRecord(
        stage="fit",
        parent_digest=data_digest,
        objects={
            "gaussian.safetensors": folder.write_tensors(
                "gaussian", _arrays(prior.tensors()), {"kind": "gaussian"}
            )
        },
        seconds=time.perf_counter() - began,
        units=start.iterations,
        finished=now(),
    )
    folder.write_stage(record)
    return record


# ----------------------------------------------------------------------------------- iterations


def recover(run_url: str) -> Json:
    """Compare every object of the run with its manifests, and make room for what has to be redone.

    Returns:
        The number of objects that were checked, and a line for each that has to be made anew.
    """
    store = RunStore.open(run_url)
    with stage("checking the run", total=None, unit="objects") as advance:
        report = verify(store, on_object=lambda *_: advance(1))
    repair(store, report)
    store.objects.sweep()
    findings = (*report.missing, *report.damaged, *report.orphaned)
    return {"objects": report.objects, "findings": [f"{f.path}: {f.problem}" for f in findings]}


def first_unfinished_iteration(run_url: str) -> int:
    """Return the first iteration that is not complete."""
    store = RunStore.open(run_url)
    return min(len(store.completed()), store.config.iterations)


def is_complete(run_url: str, iteration: int) -> bool:
    """Tell whether an iteration is committed and follows from the model before it."""
    store = RunStore.open(run_url)
    manifest = store.iteration(iteration).manifest()
    return manifest is not None and manifest.parent_digest == store.parent_digest(iteration)


def model_before(store: RunStore, iteration: int) -> str:
    """Return the digest of the model that draws the reconstructions of an iteration."""
    digest = store.parent_digest(iteration)
    if digest is None:
        raise RuntimeError(f"iteration {iteration} has no model to begin with; run `diffem run`")
    return digest


def lay_out_iteration(run_url: str, iteration: int) -> Json:
    """Lay out an iteration's reconstructions before the fan-out; tell which shards are missing."""
    store = RunStore.open(run_url)
    observations = store.observations("train")
    parent = model_before(store, iteration)
    folder = store.iteration(iteration)
    plan = folder.create_reconstructions(
        observations.sample_ids,
        x_shape=observations.x_shape,
        shard_size=store.config.e_step.shard_size,
        parent_digest=parent,
        seed=derive_seed(store.config.seed, "e_step", iteration),
        units=observations.manifest.units,
    )
    return {
        "config_digest": store.config.digest,
        "parent_digest": parent,
        "shards": plan.shards,
        "missing": folder.missing_shards(checksum=True),
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
    """
    bench = _Bench.open(run_url, config_digest)
    folder = bench.store.iteration(iteration)
    found = folder.shard(shard, checksum=True)
    if found is not None and found.parent_digest == parent_digest:
        return {"sha256": found.object.sha256, "seconds": found.seconds, "reused": True}
    plan = folder.reconstructions()
    assert plan is not None, "the coordinator lays the array out before the fan-out"
    began = time.perf_counter()
    rows = slice(*plan.rows(shard))
    observed = _observed(bench.store.observations("train"), rows)
    name = f"iteration {iteration:03d} · E-step · shard {shard + 1}/{plan.shards}"
    with stage(name, total=len(observed), unit="samples") as advance:
        x_hat = e_step(
            bench.posterior(iteration, parent_digest),
            observed.y,
            observed.params,
            seeds=[derive_seed(plan.seed, int(sample)) for sample in observed.sample_ids],
            batch_size=bench.config.e_step.batch_size,
            temperature=build.build_temperature(bench.config.e_step, iteration),
            on_progress=advance,
        )
    manifest = folder.write_shard(
        shard, x_hat.numpy(), seed=plan.seed, seconds=time.perf_counter() - began
    )
    return {"sha256": manifest.object.sha256, "seconds": manifest.seconds, "reused": False}


def refine_model(
    run_url: str, iteration: int, config_digest: str, reconstructions_digest: str
) -> Json:
    """Refine the model on the reconstructions, re-corrupted, from a checkpoint if there is one.

    Arguments:
        run_url: The run.
        iteration: EM iteration.
        config_digest: Digest of the run's config.
        reconstructions_digest: Digest of all reconstructions.

    Returns:
        The model's digest and whether it was found complete.
    """
    bench = _Bench.open(run_url, config_digest)
    folder = bench.store.iteration(iteration)
    found = folder.stage("m_step", parent_digest=reconstructions_digest)
    if found is not None:
        return {"model_digest": found.objects["model.safetensors"].sha256, "reused": True}
    config = bench.config.m_step
    steps = build.m_step_length(config, iteration)
    weights = None
    if iteration > 0:
        weights, _ = bench.store.iteration(iteration - 1).read_tensors(
            "model", digest=model_before(bench.store, iteration)
        )
    state, seconds_before = _checkpoint(folder, reconstructions_digest)
    done = 0 if state is None else state.step
    x_hat = torch.from_numpy(folder.read_reconstructions()).float()
    began = last = time.perf_counter()

    name = f"iteration {iteration:03d} · M-step"
    with stage(name, total=steps, unit="steps", done=done) as advance:

        def on_step(live: TrainingState) -> None:
            nonlocal last
            advance(1)
            if time.perf_counter() - last >= config.checkpoint_seconds and live.step < steps:
                folder.write_checkpoint(
                    _arrays(live.tensors()),
                    {
                        "reconstructions": reconstructions_digest,
                        "seconds": seconds_before + time.perf_counter() - began,
                    },
                )
                last = time.perf_counter()

        result = m_step(
            bench.denoiser(weights),
            x_hat,
            bench.channel,
            bench.scaling,
            build.build_schedule(bench.config.schedule),
            build.build_times(bench.config.time),
            steps=steps,
            batch_size=config.batch_size,
            learning_rate=build.build_learning_rate(bench.config, iteration),
            ema_decay=config.ema_decay,
            clip_norm=config.clip_norm,
            adam_betas=config.adam_betas,
            recorruption=config.recorruption,
            seed=bench.seed("m_step", iteration),
            state=state,
            on_step=on_step,
        )
    model = folder.write_tensors(
        "model", _arrays(result.weights), {"kind": "conditional denoiser"}
    )
    losses = folder.write_bytes(
        "losses.json", f'{{"mean": {result.mean_loss!r}, "last": {result.last_loss!r}}}\n'.encode()
    )
    folder.write_stage(
        StageRecord(
            stage="m_step",
            parent_digest=reconstructions_digest,
            objects={"model.safetensors": model, "losses.json": losses},
            seconds=seconds_before + time.perf_counter() - began,
            units=steps,
            reused=done,
            finished=now(),
        )
    )
    folder.delete_checkpoint()
    return {"model_digest": model.sha256, "reused": False}


def _checkpoint(folder: StageFolder, digest: str) -> tuple[TrainingState | None, float]:
    """Return the M-step's state and its seconds, if it learned from these reconstructions."""
    found = folder.read_checkpoint()
    if found is None or found[1].get("reconstructions") != digest:
        return None, 0.0
    return TrainingState.from_tensors(_tensors(found[0])), float(found[1]["seconds"])


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
    bench = _Bench.open(run_url, config_digest)
    folder = bench.store.iteration(iteration)
    found = folder.stage("evaluate", parent_digest=model_digest)
    if found is None:
        posterior = bench.posterior(iteration + 1, model_digest)
        _judge(bench, folder, posterior, f"iteration {iteration:03d}", model_digest)
    metrics = folder.metrics()
    assert metrics is not None, "an evaluation's record stands only over its metrics"
    return {"metrics": metrics.numbers(), "reused": found is not None}


def commit_iteration(run_url: str, iteration: int, shards_reused: int) -> Json:
    """Write `iteration.json`, which alone means that the iteration is complete."""
    store = RunStore.open(run_url)
    folder = store.iteration(iteration)
    shards = folder.shards()
    e_record = StageRecord(
        stage="e_step",
        parent_digest=model_before(store, iteration),
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
    _announce(f"iteration {iteration:03d}", manifest)
    return {"model_digest": manifest.model_digest}


def _announce(title: str, manifest: StartManifest | IterationManifest) -> None:
    """Tell in one line how good the model of a committed stage is."""
    values = {} if manifest.metrics is None else manifest.metrics.values
    told = [
        f"{name} {metric.value:.3f}"
        for name in ("divergence", "hidden_rmse_mean", "rmse_mean", "distance")
        if (metric := values.get(name)) is not None and metric.value is not None
    ]
    seconds = sum(record.seconds for record in manifest.stages.values())
    reporter().note(f"{title}: {', '.join([*told, f'{seconds:.1f} s'])}")


# ----------------------------------------------------------------------------------- evaluation


def _judge(
    bench: _Bench, folder: StageFolder, posterior: Posterior, title: str, model_digest: str
) -> StageRecord:
    """Evaluate a posterior, write its metrics and its picture, and record the stage."""
    began = time.perf_counter()
    config = bench.config.evaluation
    holdout = _observed(bench.store.observations("holdout"))
    others = _observed(bench.store.observations("train"))
    truth = _truth(bench)
    start = bench.store.start().manifest()
    total = work_of(config, holdout=len(holdout), others=len(others))
    with stage(f"{title} · evaluation", total=total, unit="samples") as advance:
        result = evaluate(
            posterior,
            channel=bench.channel,
            scaling=bench.scaling,
            config=config,
            holdout=holdout,
            others=others,
            truth=truth,
            floors=None if start is None or start.metrics is None else start.metrics.values,
            seed=bench.seed("evaluate"),
            batch_size=bench.config.e_step.batch_size,
            on_progress=advance,
        )
    objects: dict[str, ObjectRecord] = {"metrics.json": folder.write_metrics(result.metrics)}
    if config.preview:
        picture = _preview(bench, result, holdout, truth, f"{bench.config.name} · {title}")
        objects["preview.png"] = folder.write_bytes("preview.png", picture)
    record = StageRecord(
        stage="evaluate",
        parent_digest=model_digest,
        objects=objects,
        seconds=time.perf_counter() - began,
        units=total,
        finished=now(),
    )
    folder.write_stage(record)
    return record


def _truth(bench: _Bench) -> Truth | None:
    """Read the clean samples, where the run has any: called by the evaluation alone."""
    holdout = bench.store.observations("holdout")
    training = bench.store.observations("train")
    x_holdout, x_training = holdout.truth(), training.truth()
    if x_holdout is None or x_training is None:
        return None
    labels = holdout.labels()
    classifier = None
    if isinstance(bench.config.evaluation.distance, FrechetDistance) and labels is not None:
        classifier = _classifier(bench.store.url, bench.config.digest)
    return Truth(
        holdout=torch.from_numpy(x_holdout),
        holdout_labels=None if labels is None else torch.from_numpy(labels),
        training=torch.from_numpy(x_training),
        classifier=classifier,
    )


@functools.lru_cache(maxsize=2)
def _classifier(run_url: str, config_digest: str) -> DigitClassifier:
    """Fit the classifier of clean images, once a process: its seed makes it the same in each."""
    store = RunStore.open(run_url)
    assert store.config.digest == config_digest
    training = store.observations("train")
    x, labels = training.truth(), training.labels()
    assert x is not None
    assert labels is not None
    return DigitClassifier.fit(
        torch.from_numpy(x),
        torch.from_numpy(labels),
        scaling=build.build_scaling(store.config.data),
        seed=derive_seed(store.config.seed, "classifier"),
        epochs=math.ceil(_CLASSIFIER_IMAGES / len(x)),
    )


def _preview(
    bench: _Bench, result: Evaluation, holdout: Observed, truth: Truth | None, title: str
) -> bytes:
    if len(bench.channel.x_shape) == 1:
        return vector_preview(
            truth=None if truth is None else truth.training.numpy(),
            draws=result.reconstructions.numpy(),
            title=title,
        )
    shown = slice(0, bench.config.evaluation.preview)
    params = {name: value[shown] for name, value in holdout.params.items()}
    observed = bench.channel.A_dagger(holdout.y[shown], params)
    selection = bench.channel.selection(params)
    seen = None
    if selection is not None:
        seen = selection.reshape(observed.shape).any(dim=1, keepdim=True).numpy()
    assert bench.config.data.value_range is not None
    return image_preview(
        truth=None if truth is None else truth.holdout[shown].numpy(),
        observed=observed.numpy(),
        seen=seen,
        draws=result.draws[:, shown].numpy(),
        value_range=bench.config.data.value_range,
        title=title,
    )


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
