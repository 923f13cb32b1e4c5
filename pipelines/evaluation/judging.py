"""Judging a posterior: the samples that are drawn from it, and all that is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.e_step import e_step
from diffem_core.posterior import Posterior
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from pipelines.evaluation.against_truth import calibrations, chosen_metrics, distances, errors
from pipelines.evaluation.health import health
from pipelines.evaluation.observation_space import divergences, recorrupted
from pipelines.evaluation.samples import Evaluation, Observed, Truth, spread
from storage_schemas.config import EvaluationConfig, HiddenRanksMonitor, SinkhornDistance
from storage_schemas.metrics import Metric, Metrics

__all__ = ["evaluate", "spare_observations", "work_of"]


def work_of(config: EvaluationConfig, *, holdout: int, others: int) -> int:
    """Count the posterior samples that `evaluate` draws."""
    hidden = sum(
        monitor.draws * min(monitor.samples, holdout)
        for monitor in config.monitors
        if isinstance(monitor, HiddenRanksMonitor)
    )
    return config.draws * holdout + _others_used(config, others) + hidden


def evaluate(
    posterior: Posterior,
    *,
    channel: Channel,
    scaling: Scaling,
    config: EvaluationConfig,
    holdout: Observed,
    others: Observed,
    truth: Truth | None,
    floors: Mapping[str, Metric] | None,
    seed: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Judge a posterior.

    Arguments:
        posterior: The posterior to judge; not changed.
        channel: The channel, which corrupts reconstructions afresh.
        scaling: The change to network units, in which errors are also given.
        config: What to measure.
        holdout: Held-out observations.
        others: Observations of the training split. Some of them, spread evenly, are reconstructed;
            features are fitted to the rest.
        truth: Clean samples, or None where nobody knows them.
        floors: Metrics of the start, judged with the same config and data, whose floors (they
            depend on the data alone) are taken over; None computes them.
        seed: Seed of all draws of this evaluation.
        batch_size: Observations per call of the posterior.
        on_progress: Called with the number of samples just drawn.
        device: Where the networks of metrics are put.

    Returns:
        The metrics and the samples behind them.
    """

    def draw(observed: Observed, key: tuple[str | int, ...]) -> Tensor:
        return e_step(
            posterior,
            observed.y,
            observed.params,
            seeds=[derive_seed(seed, *key, int(sample)) for sample in observed.sample_ids],
            batch_size=batch_size,
            on_progress=on_progress,
        )

    draws = torch.stack([draw(holdout, ("draw", s)) for s in range(config.draws)])
    rows = spread(len(others), _others_used(config, len(others)))
    subset = others.take(rows)
    reconstructions = draw(subset, ("others",))
    fresh = recorrupted(channel, reconstructions, derive_seed(seed, "recorruption"))
    values = divergences(
        channel,
        scaling,
        reconstructions,
        holdout,
        subset,
        floors,
        seed,
        monitors=config.monitors,
        spare=spare_observations(config, others),
        fresh=fresh,
    )
    values |= health(
        channel,
        config.monitors,
        draw=draw,
        draws=draws,
        reconstructions=reconstructions,
        holdout=holdout,
        fresh=fresh,
        start=floors,
        seed=seed,
    )
    if truth is not None:
        values |= errors(draws, truth, channel, scaling, holdout)
        values |= calibrations(draws, truth, channel, holdout, derive_seed(seed, "calibration"))
        values |= distances(reconstructions, draws, truth, rows, floors, config, scaling)
        key, on = derive_seed(seed, "metrics"), torch.device(device)
        values |= chosen_metrics(
            reconstructions, draws, truth, rows, floors, config, scaling, key, on
        )
    return Evaluation(metrics=Metrics(values=values), draws=draws, reconstructions=reconstructions)


def spare_observations(config: EvaluationConfig, others: Observed) -> Observed:
    """Return the observations of the training split that `evaluate` does not reconstruct."""
    kept = torch.ones(len(others), dtype=torch.bool)
    kept[spread(len(others), _others_used(config, len(others)))] = False
    return others.take(kept.nonzero().flatten())


def _others_used(config: EvaluationConfig, available: int) -> int:
    wanted = config.reconstructions
    if isinstance(config.distance, SinkhornDistance):
        wanted = max(wanted, config.distance.samples)
    return min(wanted, available)
