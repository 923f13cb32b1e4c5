"""Are reconstructions as diverse as the data? What tells a model that has collapsed.

    participation ratio  (tr C)^2 / tr C^2      how many directions the covariance C fills
    nearest neighbours   min_j |x_hat_i - x_hat_j| over the root mean square distance
    spread               variance between posterior samples of one observation, over that of all

The covariance is what the Gaussian start knows of the data, so that the ratio has a reference. Of
distances to neighbours nobody knows what they should be (on a curve they are small), with one
exception, which is a test:

    d(y) = min_j |y - A x_hat_j|^2              over reconstructions of other observations

Held-out observations and corrupted reconstructions, neither of them among the x_hat_j, have the
same distances if reconstructions have the distribution of the data. Where they have collapsed to
fewer images, those images explain corrupted reconstructions well and held-out observations badly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.classifier_test import area_under_curve
from diffem_core.measurement import Measurement, block_jackknife, confidence_interval

__all__ = [
    "CollapseVerdict",
    "collapse_verdict",
    "draw_spread",
    "nearest_neighbours",
    "participation_ratio",
    "uncovered_test",
]

_LEAST = 20
_UNCOVERED = 0.75
_PARTICIPATION = 0.5
_ONE_SIDED = 1.96


def participation_ratio(x: Tensor) -> Measurement:
    """Compute how many directions the covariance of samples fills.

    Arguments:
        x: Samples of shape (n, ...), n >= 20.

    Returns:
        (tr C)^2 / tr C^2, at least 1 and at most the smaller of n - 1 and the number of entries.
        It is biased downwards for small n: compare equal numbers of samples. Left out for fewer
        samples, or where all are the same.
    """
    if len(x) < _LEAST:
        return Measurement.left_out(f"{len(x)} samples are too few, {_LEAST} are needed")
    rows = x.flatten(1).double()
    if not bool((rows != rows[0]).any()):
        return Measurement.left_out("every reconstruction is the same")

    def ratio(samples: Tensor, _: Tensor) -> float:
        centered = samples - samples.mean(0)
        wide = centered.shape[1] > centered.shape[0]
        gram = centered @ centered.mT if wide else centered.mT @ centered
        return float(gram.trace() ** 2 / gram.square().sum())

    error, degrees = block_jackknife(ratio, rows, rows)
    value = ratio(rows, rows)
    return Measurement(
        value=value,
        standard_error=error,
        interval=confidence_interval(value, error, degrees=degrees),
    )


def nearest_neighbours(x: Tensor) -> Tensor:
    """Compute how far each sample is from the nearest other one.

    Arguments:
        x: Samples of shape (n, ...), n >= 2.

    Returns:
        Distances of shape (n,), float64, as multiples of the root mean square distance between two
        samples; 0 where two are the same, and where all are.
    """
    rows = x.flatten(1).double()
    if len(rows) < 2:
        raise ValueError(f"nearest_neighbours received {len(rows)} samples; give at least 2")
    distances = torch.cdist(rows, rows)
    typical = distances.square().sum().div(len(rows) * (len(rows) - 1)).sqrt()
    nearest = distances.fill_diagonal_(torch.inf).amin(1)
    return nearest / typical if float(typical) > 0 else nearest


def draw_spread(draws: Tensor) -> Measurement:
    """Compare the variance between samples of one observation with that of all samples.

    Arguments:
        draws: Posterior samples of shape (S, n, ...), S >= 2.

    Returns:
        The share of the variance, in [0, 1] up to chance: 0 where every observation has one
        reconstruction only, near 1 where observations do not matter. Left out where all samples
        are the same, or for one draw.
    """
    if draws.shape[0] < 2 or draws.shape[1] < 2:
        return Measurement.left_out(
            f"{draws.shape[0]} draws of {draws.shape[1]} observations are too few, 2 of 2 are "
            "needed"
        )
    rows = draws.double().flatten(2)
    total = float(rows.flatten(0, 1).var(0).mean())
    if total == 0:
        return Measurement.left_out("every reconstruction is the same")
    return Measurement.of_means(rows.var(0).mean(1) / total)


def uncovered_test(
    channel: Channel,
    x_hat: Tensor,
    *,
    held_out: tuple[Tensor, Mapping[str, Tensor]],
    corrupted: tuple[Tensor, Mapping[str, Tensor]],
) -> Measurement:
    """Compare how well reconstructions explain held-out observations, and their own kind.

    Given x_hat, the distances d of both sets of observations are independent, and equally
    distributed if the model is right, so that the Mann-Whitney test of them is exact.

    Arguments:
        channel: The channel, whose A is applied to every reconstruction for every observation.
        x_hat: Reconstructions of shape (r, *x_shape), r >= 20.
        held_out: Real observations that were not reconstructed, at least 20, with parameters.
        corrupted: Other reconstructions corrupted afresh, at least 20, with their parameters.

    Returns:
        P(d of a held-out observation > d of a corrupted reconstruction): 1/2 is right, near 1 is a
        collapse. The p-value is one-sided. Left out for fewer of any.
    """
    sizes = (len(x_hat), len(held_out[0]), len(corrupted[0]))
    if min(sizes) < _LEAST:
        return Measurement.left_out(
            f"{sizes[0]} reconstructions, {sizes[1]} held-out and {sizes[2]} corrupted ones are "
            f"too few, {_LEAST} of each are needed"
        )
    theirs, ours = (
        _distances(channel, x_hat, y, params).cpu().numpy() for y, params in (held_out, corrupted)
    )
    area, error = area_under_curve(theirs, ours)
    p_value = float(stats.mannwhitneyu(theirs, ours, alternative="greater")[1])
    return Measurement(
        value=area,
        standard_error=error,
        interval=(max(0.0, area - 1.96 * error), min(1.0, area + 1.96 * error)),
        p_value=max(p_value, 1e-300),
    )


def _distances(channel: Channel, x_hat: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    nearest = []
    for i in range(len(y)):
        own = {name: v[i : i + 1].expand(len(x_hat), *v.shape[1:]) for name, v in params.items()}
        residual = (y[i] - channel.A(x_hat, own)).double().flatten(1)
        nearest.append(residual.square().sum(1).amin())
    return torch.stack(nearest)


@dataclass(frozen=True, kw_only=True)
class CollapseVerdict:
    """Whether a collapse is to be warned of.

    Arguments:
        warn: Whether.
        reason: Why, or why not, in words.
    """

    warn: bool
    reason: str


def collapse_verdict(
    *, uncovered: Measurement, participation: Measurement, start: Measurement | None
) -> CollapseVerdict:
    """Decide whether to warn of a collapse.

    Warn where the lower end of the interval of `uncovered` is above 0.75, or where the upper end
    of that of the participation ratio over the start's is below 1/2. Each is wrong for about 2.5 %
    of evaluations of a model that is just at the border, and practically never for one with the
    distribution of the data: 0.5 is many standard errors from 0.75.

    Arguments:
        uncovered: Of `uncovered_test`.
        participation: Of the reconstructions.
        start: Of as many reconstructions by the start; None where there is none yet.
    """
    found = []
    if uncovered.interval is not None and uncovered.interval[0] > _UNCOVERED:
        found.append(
            f"held-out observations are farther from reconstructions than these are from each "
            f"other in {uncovered.value:.0%} of pairs (50 % is right)"
        )
    ratio = _ratio(participation, start)
    if ratio is not None and ratio[0] + _ONE_SIDED * ratio[1] < _PARTICIPATION:
        found.append(
            f"their covariance fills {participation.value:.1f} directions, {ratio[0]:.0%} of the "
            "start's"
        )
    if not found:
        known = uncovered.value is not None or ratio is not None
        reason = "reconstructions are diverse" if known else "nothing is known of their diversity"
        return CollapseVerdict(warn=False, reason=reason)
    return CollapseVerdict(warn=True, reason="; ".join(found))


def _ratio(value: Measurement, start: Measurement | None) -> tuple[float, float] | None:
    """Return the ratio of two measurements and its standard error."""
    if start is None or value.value is None or not start.value:
        return None
    errors = [(m.standard_error or 0.0) / m.value for m in (value, start) if m.value]
    ratio = value.value / start.value
    return ratio, ratio * sum(e**2 for e in errors) ** 0.5
