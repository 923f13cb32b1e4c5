"""Do posterior samples scatter as much as they are wrong?

If the truth v and samples v_1, ..., v_S come from one posterior, the rank of v among them is
uniform, in each entry (simulation-based calibration). With a uniform V in [0, 1), so is

    u = (#{s: v_s < v} + V (1 + #{s: v_s = v})) / (S + 1)     in [0, 1)

for any S. The central credible interval of level p holds v as often as |2 u - 1| <= p; a
histogram of u that is high at its ends belongs to samples that are too sure, one that is high in
the middle to samples that scatter too widely. Entries of one image go together: everything is
counted image by image, and errors are taken over images.

Without truth, the same can be asked of what is observed. Some of the seen pixels are hidden from
the network, and their observed values are ranked among those that its samples would be observed
with:

    x_s ~ q(x | y without the pixels J),      u of y_J among y_s,J ~ Q(. | x_s)

Given the rest, y_J and the y_s,J come from one distribution if q is the posterior, so that u is
uniform. It tells samples that are too sure of hidden pixels, or biased, or too wide. It is blunted
by noise: where that is larger than the posterior's spread, it dominates both sides. It looks at
single entries, at slightly fewer seen pixels than usual, and at nothing that is never observed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.measurement import Measurement

__all__ = ["Calibration", "calibration", "hide_more", "rank_positions"]

_MOST_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How posterior samples stand to the truth.

    Arguments:
        coverage: Share of entries inside the central credible interval, by its level.
        ranks: 12 E (u - 1/2)^2: 1 is calibrated, more is too sure, less too spread. Its p-value is
            of the whole histogram of u being flat, and its bins are that histogram, as shares.
        coverage_maps: The coverage of each entry, shape (...) like one sample, by level; NaN where
            an entry was never counted.
    """

    coverage: Mapping[float, Measurement]
    ranks: Measurement
    coverage_maps: Mapping[float, Tensor]


def calibration(
    draws: Tensor,
    truth: Tensor,
    *,
    counted: Tensor | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    seed: int,
) -> Calibration:
    """Compare posterior samples with the truth.

    Arguments:
        draws: Posterior samples of shape (S, n, ...).
        truth: The truth, shape (n, ...).
        counted: Booleans of the shape of the truth: which entries count; None counts all.
        levels: Levels of credible intervals, in (0, 1).
        seed: Seed of what breaks ties and of V.

    Returns:
        Coverage and ranks. The p-value of the ranks is Hotelling's test over images, a chi-square
        test that allows for entries of an image that go together. Left out where fewer images
        count than it needs: 5 for each bin.

    References:
        Talts et al. 2018 (arXiv 1804.06788).
    """
    if draws.shape[1:] != truth.shape:
        raise ValueError(
            f"calibration received draws of shape {tuple(draws.shape)} and a truth of shape "
            f"{tuple(truth.shape)}; give (S, n, ...) and (n, ...)"
        )
    u = rank_positions(draws, truth, seed=seed).flatten(1)
    mask = torch.ones_like(u) if counted is None else counted.flatten(1).to(u.dtype)
    present = mask.sum(1) > 0
    u, mask = u[present], mask[present]
    bins = min(len(draws) + 1, _MOST_BINS)
    if len(u) < 5 * bins:
        nothing = Measurement.left_out(
            f"{len(u)} observations with entries that count are too few, {5 * bins} are needed"
        )
        return Calibration(
            coverage=dict.fromkeys(levels, nothing), ranks=nothing, coverage_maps={}
        )

    def of_images(values: Tensor) -> Tensor:
        return (values * mask).sum(1) / mask.sum(1)

    coverage, maps = {}, {}
    for level in levels:
        inside = ((2 * u - 1).abs() <= level).double()
        coverage[level] = Measurement.of_means(of_images(inside), expected=level)
        maps[level] = ((inside * mask).sum(0) / mask.sum(0)).reshape(truth.shape[1:])
    shares = torch.stack(
        [of_images(((u * bins).long() == k).double()) for k in range(bins)], dim=1
    )
    dispersion = Measurement.of_means(of_images(12 * (u - 0.5).square()))
    ranks = Measurement(
        value=dispersion.value,
        standard_error=dispersion.standard_error,
        interval=dispersion.interval,
        p_value=_flatness(shares),
        bins=tuple(shares.mean(0).tolist()),
    )
    return Calibration(coverage=coverage, ranks=ranks, coverage_maps=maps)


def rank_positions(draws: Tensor, truth: Tensor, *, seed: int) -> Tensor:
    """Compute u, the position of the truth among samples, for each entry.

    Arguments:
        draws: Samples of shape (S, ...).
        truth: Shape (...).
        seed: Seed of what breaks ties and of V.

    Returns:
        Values in [0, 1), float64, of the shape of the truth.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.rand(truth.shape, generator=generator, dtype=torch.float64).to(truth.device)
    below, equal = ((draws < truth).sum(0), (draws == truth).sum(0))
    return (below + v * (1 + equal)) / (len(draws) + 1)


def hide_more(
    channel: Channel, y: Tensor, params: Mapping[str, Tensor], *, fraction: float, seed: int
) -> tuple[Tensor, dict[str, Tensor], Tensor] | None:
    """Hide some of the seen pixels of observations.

    Arguments:
        channel: The channel.
        y: Observations of shape (n, *y_shape).
        params: Their operator parameters.
        fraction: Probability that a seen pixel is hidden, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Observations and parameters with fewer seen pixels, and which entries of y were hidden, of
        its shape. None where the channel does not select pixels by a mask.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"hide_more received fraction {fraction}; give a number in (0, 1)")
    if not channel.selects or "mask" not in params or channel.y_shape != channel.x_shape:
        return None
    mask = params["mask"]
    generator = torch.Generator().manual_seed(seed)
    stays = torch.rand(mask.shape, generator=generator).to(mask.device) >= fraction
    fewer = {**params, "mask": mask * stays}
    kept, seen = (m.to(y.dtype).expand_as(y) > 0.5 for m in (fewer["mask"], mask))
    return y * kept, fewer, seen & ~kept


def _flatness(shares: Tensor) -> float:
    """Return Hotelling's p-value of shares (n, bins) having equal means."""
    n, bins = shares.shape
    degrees = bins - 1
    gap = shares[:, :degrees].mean(0) - 1 / bins
    # The last digit of the identity keeps bins that are empty for every image invertible.
    covariance = torch.cov(shares[:, :degrees].mT).reshape(degrees, degrees)
    covariance = covariance + 1e-9 * torch.eye(degrees, dtype=shares.dtype)
    squared = n * float(gap @ torch.linalg.solve(covariance, gap))
    f = squared * (n - degrees) / (degrees * (n - 1))
    return max(float(stats.f.sf(f, degrees, n - degrees)), 1e-300)
