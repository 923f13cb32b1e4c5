"""Measuring what a run will cost, by doing a little of everything that it does.

A rehearsal writes a run of few observations into a temporary folder, with the config's own
channel, network, precision, batch sizes and threads, and times the stages' own functions. Nothing
of it is kept. Batches that would take long are measured smaller, and at two sizes, between and
beyond which seconds are taken to grow linearly. Evaluations are given samples that are there
already, since drawing them is counted by the network's calls.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffem_core.gaussian import GaussianPosterior, GaussianPrior, fit_gaussian_prior
from diffem_core.metrics import sinkhorn_divergence
from diffem_core.posterior import Posterior, PseudoInverse
from pipelines import build, stages
from pipelines.costs import measuring
from pipelines.costs.measuring import line_through, white_noise, with_threads
from pipelines.costs.networks import conditional_modes, network_rates
from pipelines.costs.peaks import peak_memory
from pipelines.costs.rates import Affine, NetworkRates, Rates
from pipelines.evaluation import Observed
from pipelines.evaluation.classifier import fit_classifier
from pipelines.ingest.stored import open_stored
from pipelines.model_files import read_model
from pipelines.process_memory import base_memory
from pipelines.sources import choose_holdout, load_clean_samples
from pipelines.stages.bench import Bench, as_arrays, observed
from pipelines.stages.judge import judge
from pipelines.stages.observations import corrupt_block, corruption_rows
from storage_schemas.config import (
    FrechetDistance,
    GaussianStart,
    LocalRunner,
    MMPSStart,
    ModelStart,
    RunConfig,
    SinkhornDistance,
    StoreData,
)
from storage_schemas.manifests import StageRecord
from storage_schemas.observations import ObservationBlock
from storage_schemas.run_store import RunStore
from storage_schemas.stage_folder import now

__all__ = ["POOL", "rehearse", "workers_of"]

POOL = 16_384
"""Training observations, at most, that an evaluation looks at."""

_BYTES = 2**27  # Observations of a rehearsal, at most.
_ROWS = 16  # Observations of the shard that is rehearsed.
_CLASSIFIED = 1280
_TRANSPORTED = 512


def workers_of(config: RunConfig, device: torch.device) -> int:
    """Return how many shards a machine works on side by side."""
    runner = config.runner
    if not isinstance(runner, LocalRunner):
        return 1
    return runner.workers or (torch.cuda.device_count() if device.type == "cuda" else 1)


def rehearse(config: RunConfig) -> Rates:
    """Do a little of everything that a run does, and time it.

    Arguments:
        config: The config, which has been checked.

    Returns:
        The rates.

    Raises:
        ValueError: The data cannot be read, or the device is not there.
    """
    began, ran = time.perf_counter(), time.thread_time()
    device = build.build_device(config.runner)
    threads = torch.get_num_threads()
    share = max(1, threads // workers_of(config, device)) if device.type == "cpu" else threads
    base = base_memory()
    with tempfile.TemporaryDirectory(prefix="diffem-rehearsal-") as folder, with_threads(threads):
        url = str(Path(folder) / "run")
        store = RunStore.create(url, _shortened(config))
        given = _observations(store, config)
        bench = Bench.open(url)
        seconds, some = _start(bench, config)
        judged = _judge(bench, config, seconds.pop("posterior"), some, given["fraction"])
        beside, sizes = _stages_beside(bench, config, url, seconds["start_draw"])
        rates: dict[str, NetworkRates | None] = {"conditional": None, "unconditional": None}
        for conditional in conditional_modes(config):
            rates["conditional" if conditional else "unconditional"] = network_rates(
                bench, config, some, conditional=conditional, share=share, threads=threads
            )
        return Rates.model_validate(
            {
                "device": str(device),
                "threads": threads,
                "seconds": (seconds_taken := time.perf_counter() - began),
                "contention": max(1.0, seconds_taken / max(time.thread_time() - ran, 1e-3))
                if device.type == "cpu"
                else 1.0,
                "load": given["load"],
                "observe": given["observe"],
                "observation_bytes": given["bytes"],
                "base_bytes": base,
                **seconds,
                **judged,
                **beside,
                **sizes,
                **rates,
            }
        )


# ------------------------------------------------------------------------------------ observations


def _shortened(config: RunConfig) -> RunConfig:
    """Return the config of the rehearsed run: small shards, evaluations without distance."""
    evaluation = config.evaluation
    if isinstance(evaluation.distance, FrechetDistance | SinkhornDistance):
        evaluation = evaluation.model_copy(update={"distance": None})
    return config.model_copy(
        update={
            "e_step": config.e_step.model_copy(update={"shard_size": _ROWS, "annealing": None}),
            "evaluation": evaluation,
            "runner": LocalRunner(device=config.runner.device, threads=config.runner.threads),
        }
    )


def _observations(store: RunStore, config: RunConfig) -> dict[str, float]:
    """Write some of the run's observations; tell what that took, and which part they are."""
    data, seed = config.data, config.seed
    began = time.perf_counter()
    if isinstance(data, StoreData):
        split = [open_stored(data, "holdout"), open_stored(data, "train")]
        sizes = [len(part) for part in split]
        sample_bytes = 4 * (
            2 * math.prod(data.x_shape)
            + math.prod(split[0].y_shape)
            + sum(math.prod(shape) for shape in split[0].manifest.parameters.values())
        )
        clean = None
    else:
        clean = load_clean_samples(data, seed=seed)
        held = choose_holdout(len(clean.x), data.holdout, seed=seed)
        rows = [np.flatnonzero(held), np.flatnonzero(~held)]
        sizes = [len(part) for part in rows]
        sample_bytes = 4 * 3 * math.prod(data.x_shape)
    load = time.perf_counter() - began if clean is not None else 0.0
    wanted = sizes[0] + min(sizes[1], POOL)
    fraction = min(1.0, _BYTES / (wanted * sample_bytes))
    counts = [
        min(size, max(2 * _ROWS, round(fraction * size)))
        for size in (sizes[0], min(sizes[1], POOL))
    ]

    def blocks() -> Iterator[ObservationBlock]:
        first = 0
        for number, count in enumerate(counts):
            step = corruption_rows(config.data.x_shape)
            for start in range(0, count, step):
                at = slice(start, min(start + step, count))
                n = at.stop - at.start
                ids, holdout = np.arange(first, first + n), np.full(n, number == 0)
                first += n
                if clean is None:
                    part = split[number]
                    yield ObservationBlock(
                        sample=ids,
                        holdout=holdout,
                        y=part.y(at),
                        params=part.params(at),
                        x=part.truth(at),
                        label=part.labels(at),
                    )
                    continue
                chosen = rows[number][at]
                x = clean.x[chosen]
                y, params = corrupt_block(channel, x, seed=seed, block=first)
                label = None if clean.label is None else clean.label[chosen]
                yield ObservationBlock(
                    sample=ids, holdout=holdout, y=y, params=params, x=x, label=label
                )

    channel = build.build_channel(config.channel, config.data.x_shape)
    began = time.perf_counter()
    manifest = store.write_observations(blocks(), x_shape=config.data.x_shape)
    seconds = time.perf_counter() - began
    size = sum(record.bytes for record in manifest.objects.values())
    return {
        "load": load,
        "observe": seconds / manifest.samples,
        "bytes": size / manifest.samples,
        "fraction": min(1.0, counts[0] / sizes[0], counts[1] / min(sizes[1], POOL)),
    }


# ------------------------------------------------------------------------------- start, evaluation


@dataclass(frozen=True)
class _Given:
    """A posterior whose samples are there already."""

    x: Tensor

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        """Return as many samples, from a place that the seeds decide."""
        rows = (torch.arange(len(y)) + seeds[0]) % len(self.x)
        return self.x[rows]


def _start(bench: Bench, config: RunConfig) -> tuple[dict[str, Any], Observed]:
    """Fit the start to some observations, and draw from it; return seconds and observations."""
    training = bench.store.observations("train")
    some = observed(training, slice(0, min(len(training), 1024)))
    start = config.start
    nothing = Affine(fixed=0.0, each=0.0)
    fitting: dict[str, Any] = {"fit_round": nothing, "fit_first": nothing, "fit_bytes": 0}
    posterior: Posterior | None = None
    tensors: dict[str, Any] = {}
    kind = "pseudo_inverse"
    match start:
        case GaussianStart() | MMPSStart():
            gaussian = start.gaussian if isinstance(start, MMPSStart) else start
            prior, fitting = _fitted(bench, gaussian, some, training)
            posterior = GaussianPosterior(prior, bench.channel)
            tensors, kind = as_arrays(prior.tensors()), "gaussian"
        case ModelStart():
            tensors, kind = read_model(start.url), "denoiser"
        case _:
            posterior = PseudoInverse(bench.channel)
    folder = bench.store.start()
    model = folder.write_tensors("model", tensors, {"kind": kind})
    record = StageRecord(
        stage="fit",
        parent_digest=bench.store.observations().manifest.data_digest,
        objects={"model.safetensors": model},
        seconds=0.0,
        finished=now(),
    )
    folder.write_stage(record)
    draw = 0.0
    if posterior is None:  # The network draws, which is measured by its calls.
        x = white_noise(bench, len(some))
    else:
        x, draw = _drawn(posterior, some)
    return {
        **fitting,
        "start_draw": draw,
        "posterior": _Given(x),
    }, some


def _fitted(
    bench: Bench, start: GaussianStart, some: Observed, training: Any
) -> tuple[GaussianPrior, dict[str, Any]]:
    """Fit a Gaussian prior to a few and to more observations; time two rounds of each."""

    def fit(given: Observed) -> tuple[GaussianPrior, float, float]:
        marks = [time.perf_counter()]
        prior = fit_gaussian_prior(
            given.y,
            given.params,
            bench.channel,
            rank=start.rank,
            iterations=2,
            seed=0,
            on_progress=lambda *_: marks.append(time.perf_counter()),
        )
        first, later = marks[1] - marks[0], marks[2] - marks[1]
        return prior, later, max(0.0, first - later)

    few = some.take(torch.arange(min(128, len(some))))
    fit(few)  # The very first one waits for code to be loaded.
    prior, seconds, extra = fit(few)
    wanted = min(len(training), start.samples)
    count = max(len(few), min(wanted, round(len(few) * measuring.BUDGET / 2 / max(seconds, 1e-6))))
    if count == len(few):
        with peak_memory(bench.device) as peak:
            prior, seconds, extra = fit(few)
        line, more = (Affine(fixed=0.0, each=t / len(few)) for t in (seconds, extra))
        return prior, {"fit_round": line, "fit_first": more, "fit_bytes": peak.bytes}
    many = observed(training, slice(0, count))
    with peak_memory(bench.device) as peak:
        prior, longer, longer_extra = fit(many)
    return prior, {
        "fit_round": line_through((len(few), seconds), (count, longer)),
        "fit_first": line_through((len(few), extra), (count, longer_extra)),
        "fit_bytes": round(peak.bytes * wanted / count),
    }


def _drawn(posterior: Posterior, some: Observed) -> tuple[Tensor, float]:
    """Draw from the start's posterior, as many samples as there is time for."""
    count, seconds = min(len(some), 8), 0.0
    while True:
        given = some.take(torch.arange(count))
        began = time.perf_counter()
        x = posterior.sample(given.y, given.params, seeds=list(range(count)))
        seconds = time.perf_counter() - began
        if count == len(some) or seconds > measuring.BUDGET / 4:
            return x, seconds / count
        count = min(len(some), 4 * count)


def _judge(
    bench: Bench, config: RunConfig, posterior: _Given, some: Observed, fraction: float
) -> dict[str, float]:
    """Judge samples that are there already, as the start and as an iteration."""
    start = bench.store.start()
    fit = start.stage("fit")
    assert fit is not None
    digest = fit.objects["model.safetensors"].sha256
    began = time.perf_counter()
    record = judge(bench, start, posterior, "rehearsal", digest)
    first = (time.perf_counter() - began) / fraction
    start.commit(metrics=start.metrics(), stages={"fit": fit, "evaluate": record})
    folder = bench.store.iteration(0)
    with peak_memory(torch.device("cpu")) as peak:
        began = time.perf_counter()
        judge(bench, folder, posterior, "rehearsal", digest)
        later = (time.perf_counter() - began) / fraction
    fitting, looking = _classified(bench, config)
    transported = _transported(bench, config)
    names = ("metrics.json", "preview.png")
    sizes = bench.store.objects.sizes(folder.prefix)
    return {
        # At the start the floor is measured too, of other clean samples.
        "judge_first": first + fitting + 2 * (looking + transported),
        "judge": later + looking + transported,
        "judge_bytes": round(peak.bytes / fraction),
        "evaluation_bytes": 3 * sum(sizes.get(folder.path(name), 0) for name in names[:1])
        + sizes.get(folder.path(names[1]), 0),
    }


def _transported(bench: Bench, config: RunConfig) -> float:
    """Return the seconds of a Sinkhorn divergence, which grow with the square of the points."""
    distance = config.evaluation.distance
    if not isinstance(distance, SinkhornDistance):
        return 0.0
    training = bench.store.observations("train")
    clean = training.truth(slice(0, 2 * _TRANSPORTED))
    if clean is None or len(clean) < 2:
        return 0.0
    first, second = torch.from_numpy(clean).chunk(2)
    began = time.perf_counter()
    sinkhorn_divergence(first, second, regularization=distance.regularization)
    seconds = time.perf_counter() - began
    return seconds * (min(distance.samples, len(training)) / len(first)) ** 2


def _classified(bench: Bench, config: RunConfig) -> tuple[float, float]:
    """Return the seconds of fitting the evaluation's classifier, and of asking it each time."""
    training, holdout = (bench.store.observations(split) for split in ("train", "holdout"))
    labels = training.labels(slice(0, _CLASSIFIED))
    clean = training.truth(slice(0, _CLASSIFIED))
    if not isinstance(config.evaluation.distance, FrechetDistance) or labels is None:
        return 0.0, 0.0
    assert clean is not None
    x, y = torch.from_numpy(clean), torch.from_numpy(labels)
    fit = functools.partial(
        fit_classifier,
        scaling=bench.scaling,
        seed=0,
        epochs=1,
        runner=config.runner,
        device=bench.device,
    )
    fit(x[:64], y[:64])
    began = time.perf_counter()
    classifier = fit(x, y)
    fitted = time.perf_counter()
    classifier.features(x)
    asked = time.perf_counter()
    pool = min(len(training), POOL)
    seen = math.ceil(30_000 / pool) * pool
    drawn = config.evaluation.reconstructions + config.evaluation.draws * len(holdout)
    each = (asked - fitted) / len(x)
    return (fitted - began) / len(x) * seen, each * (pool + drawn)


# ------------------------------------------------------------------------------ beside computing


def _stages_beside(
    bench: Bench, config: RunConfig, url: str, start_draw: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Time what stages do beside computing: opening, reading, building, writing."""
    began = time.perf_counter()
    plan = stages.lay_out_iteration(url, 0)
    commit = 2 * (time.perf_counter() - began)
    seconds = math.inf
    for shard in range(min(3, plan["shards"])):
        began = time.perf_counter()
        stages.e_step_shard(url, 0, shard, plan["config_digest"], plan["parent_digest"])
        seconds = min(seconds, time.perf_counter() - began)
    folder = bench.store.iteration(0)
    manifest = folder.shard(0)
    assert manifest is not None
    conditional = conditional_modes(config)[-1]
    weights = as_arrays(bench.denoiser(None, conditional=conditional).state_dict())
    began = time.perf_counter()
    model = folder.write_tensors("model", weights)
    written = time.perf_counter()
    read, _ = folder.read_tensors("model", digest=model.sha256)
    bench.denoiser(read, conditional=conditional)
    built = time.perf_counter() - written
    beside = {
        "shard": max(0.0, seconds - (manifest.stop - manifest.start) * start_draw) + built,
        "training": built + 2 * (written - began),
        "checkpoint": 4 * (written - began),
        "commit": commit,
    }
    rows = manifest.stop - manifest.start
    return beside, {"reconstruction_bytes": manifest.object.bytes / rows}
