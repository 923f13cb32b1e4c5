"""Whether a posterior explains its observations and is diverse: needs no clean samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffem_core.calibration import calibration, hide_more
from diffem_core.channel import Channel
from diffem_core.diversity import (
    collapse_verdict,
    draw_spread,
    nearest_neighbours,
    participation_ratio,
    uncovered_test,
)
from diffem_core.measurement import Measurement
from diffem_core.residuals import predictive_test, residual_test
from diffem_core.seeds import derive_seed
from pipelines.evaluation.metric import as_measurement, as_metric, left_out
from pipelines.evaluation.samples import Observed, spread
from storage_schemas.config import (
    DiversityMonitor,
    HiddenRanksMonitor,
    MonitorConfig,
    PredictiveMonitor,
    ResidualMonitor,
)
from storage_schemas.metrics import Metric

__all__ = ["health"]

# Reconstructions nearer to each other than this share of their usual distance count as the same.
_DUPLICATE = 0.01

Draw = Callable[[Observed, tuple[str | int, ...]], Tensor]


def health(
    channel: Channel,
    monitors: Sequence[MonitorConfig],
    *,
    draw: Draw,
    draws: Tensor,
    reconstructions: Tensor,
    holdout: Observed,
    fresh: Observed,
    start: Mapping[str, Metric] | None,
    seed: int,
) -> dict[str, Metric]:
    """Measure what the config names of a posterior, without clean samples.

    Arguments:
        channel: The channel.
        monitors: What to measure; kinds that compare two sets of observations are passed over.
        draw: Draws a posterior sample of each of some observations, with seeds from a key.
        draws: Posterior samples of the held-out observations, shape (S, n, *x_shape).
        reconstructions: One sample of each of other observations, shape (m, *x_shape).
        holdout: The held-out observations.
        fresh: The reconstructions, corrupted afresh.
        start: Metrics of the start, with which the diversity is compared; None for itself.
        seed: Seed of everything drawn here.

    Returns:
        Metrics by name.
    """
    values: dict[str, Metric] = {}
    for monitor in monitors:
        key = derive_seed(seed, "monitor", monitor.kind)
        match monitor:
            case ResidualMonitor():
                values["residual"] = as_metric(
                    residual_test(channel, draws, holdout.y, holdout.params, seed=key),
                    "mean square of y - A x_hat over that of the noise, held out; 1 is right",
                )
            case PredictiveMonitor():
                values["predictive"] = as_metric(
                    predictive_test(channel, draws, holdout.y, holdout.params, seed=key),
                    "share of held-out observations farther from A x_hat than what x_hat would be "
                    "observed as; 0.5 is right",
                )
            case DiversityMonitor():
                values |= _diversity(
                    channel, monitor, draws, reconstructions, holdout, fresh, start
                )
            case HiddenRanksMonitor():
                values["hidden_ranks"] = _hidden_ranks(channel, monitor, draw, holdout, key)
            case _:
                pass
    return values


def _diversity(
    channel: Channel,
    monitor: DiversityMonitor,
    draws: Tensor,
    reconstructions: Tensor,
    holdout: Observed,
    fresh: Observed,
    start: Mapping[str, Metric] | None,
) -> dict[str, Metric]:
    references = min(monitor.references, len(reconstructions) // 2)
    rows = torch.zeros(len(reconstructions), dtype=torch.bool)
    rows[spread(len(reconstructions), references)] = True
    queries = fresh.take(rows.logical_not().nonzero().flatten()[: monitor.observations])
    held_out = holdout.take(spread(len(holdout), min(monitor.observations, len(holdout))))
    uncovered = uncovered_test(
        channel,
        reconstructions[rows],
        held_out=(held_out.y, held_out.params),
        corrupted=(queries.y, queries.params),
    )
    participation = participation_ratio(reconstructions)
    values = {
        "uncovered": as_metric(
            uncovered,
            "share of pairs in which reconstructions explain a held-out observation worse than a "
            "corrupted reconstruction; 0.5 is right, near 1 is a collapse",
        ),
        "participation": as_metric(
            participation,
            "participation ratio of the covariance of reconstructions: directions that it fills",
        ),
        "draw_variance": as_metric(
            draw_spread(draws),
            "variance between posterior samples of one observation, over the variance of all",
        ),
    }
    if len(reconstructions) > 1:
        nearest = nearest_neighbours(reconstructions)
        values["nearest"] = Metric(
            value=float(nearest.median()),
            long_name="median distance of a reconstruction to the nearest other one, over their "
            "root mean square distance",
        )
        values["duplicates"] = Metric(
            value=float((nearest < _DUPLICATE).double().mean()),
            long_name=f"share of reconstructions nearer than {_DUPLICATE} of that to another one",
            better="lower",
        )
    if start is None:
        long_name = "the same for the start"
        values["participation_start"] = as_metric(participation, long_name)
        before: Measurement | None = participation
    else:
        before = as_measurement(start.get("participation_start"))
    verdict = collapse_verdict(uncovered=uncovered, participation=participation, start=before)
    values["collapse"] = Metric(
        value=float(verdict.warn),
        long_name=f"{'warning of' if verdict.warn else 'no'} collapse: {verdict.reason}",
        better="lower",
    )
    return values


def _hidden_ranks(
    channel: Channel, monitor: HiddenRanksMonitor, draw: Draw, holdout: Observed, seed: int
) -> Metric:
    some = holdout.take(spread(len(holdout), min(monitor.samples, len(holdout))))
    hidden = hide_more(
        channel, some.y, some.params, fraction=monitor.fraction, seed=derive_seed(seed, "hide")
    )
    if hidden is None:
        return left_out("the channel does not select pixels, so that none can be hidden")
    y, params, where = hidden
    fewer = Observed(sample_ids=some.sample_ids, y=y, params=params)
    generator = torch.Generator().manual_seed(derive_seed(seed, "noise"))
    again = torch.stack(
        [
            channel.corrupt(draw(fewer, ("hidden", s)), some.params, generator=generator)
            for s in range(monitor.draws)
        ]
    )
    found = calibration(again, some.y, counted=where, seed=derive_seed(seed, "ties"))
    return as_metric(
        found.ranks,
        f"spread of the ranks of observed pixels that were hidden from the network, among "
        f"{monitor.draws} samples; 1 is calibrated, more is too sure",
    )
