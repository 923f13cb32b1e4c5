"""What can be watched without clean data: the fit in observation space.

Reconstructions of one half of the data are corrupted again and compared with held-out observations
that the model has not seen. If the learned prior were the true one, both would have the same
distribution, and the divergence would be that of two samples of true observations (its floor).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffem_core.gaussian_condition import GaussianMeanChannel
from diffem_core.metrics import unit_directions
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["ObservationDivergence", "observation_divergence", "observation_features"]

_JACKKNIFE_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class ObservationDivergence:
    """A divergence in observation space.

    Arguments:
        value: Sliced 2-Wasserstein distance between held-out and re-corrupted observations, in
            network units.
        standard_error: Its standard error over held-out observations (delete-a-block jackknife);
            NaN for a single one.
        floor: The same distance between held-out and other true observations; None if none were
            given.
    """

    value: float
    standard_error: float
    floor: float | None


def observation_divergence(
    channel: Channel,
    scaling: Scaling,
    x_hat: Tensor,
    y: Tensor,
    params: Mapping[str, Tensor],
    *,
    reference: tuple[Tensor, Mapping[str, Tensor]] | None = None,
    recorrupted: tuple[Tensor, Mapping[str, Tensor]] | None = None,
    seed: int,
    projections: int = 256,
) -> ObservationDivergence:
    """Compare held-out observations with re-corrupted reconstructions of others.

    What is compared is what the network sees of observations, so that they may have any shape; of
    images, the bands that stand for x without the maps of parameters.

    Arguments:
        channel: The channel, which corrupts the reconstructions with fresh parameters and noise.
        scaling: The change to network units.
        x_hat: Reconstructions of shape (m, *x_shape) of observations that are not held out, in the
            data's units.
        y: Held-out observations of shape (n, *y_shape).
        params: Their operator parameters.
        reference: True observations that are not held out, with their parameters, for the floor.
        recorrupted: The reconstructions corrupted afresh, with their parameters, where the caller
            has them already; None corrupts them here.
        seed: Seed of the corruption, the subsample and the directions.
        projections: Random directions.

    Returns:
        The divergence, with equal numbers on both sides (the smaller of n and m).

    References:
        DiffEM (arXiv 2510.12691), monotonic improvement property.
    """
    features = observation_features(channel, scaling, y, params).flatten(1)
    directions = unit_directions(
        features.shape[1], projections, seed=derive_seed(seed, "directions")
    )
    directions = directions.to(features.device, features.dtype)
    ours = features @ directions

    def others(theirs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, "subsample"))
        rows = torch.randperm(len(theirs), generator=generator)[: len(ours)]
        return theirs[rows.to(theirs.device)] @ directions

    if recorrupted is None:
        generator = torch.Generator(x_hat.device).manual_seed(derive_seed(seed, "recorruption"))
        fresh: Mapping[str, Tensor] = channel.draw_params(len(x_hat), generator=generator)
        y_tilde = channel.corrupt(x_hat, fresh, generator=generator)
    else:
        y_tilde, fresh = recorrupted
    theirs = observation_features(channel, scaling, y_tilde, fresh).flatten(1)
    corrupted = others(theirs.to(features.device))
    value, error = _jackknife(_sliced, ours[: len(corrupted)], corrupted)
    floor = None
    if reference is not None:
        true = others(
            observation_features(channel, scaling, *reference).flatten(1).to(features.device)
        )
        floor = _sliced(ours[: len(true)], true)
    return ObservationDivergence(value=value, standard_error=error, floor=floor)


def observation_features(
    channel: Channel, scaling: Scaling, y: Tensor, params: Mapping[str, Tensor]
) -> Tensor:
    """Compute what monitors compare of observations: what the network sees of them.

    Arguments:
        channel: The channel.
        scaling: The change to network units.
        y: Observations of shape (n, *y_shape).
        params: Their operator parameters.

    Returns:
        For images, the bands that stand for x, shape (n, C, H, W): maps of the parameters, which
        have one distribution on both sides, would add noise only. For vectors, the whole condition
        of shape (n, features): what of it belongs to the parameters says what y is of. What a
        Gaussian prior knows is left out of both.
    """
    while isinstance(channel, GaussianMeanChannel):
        channel = channel.channel
    seen = channel.condition(y, params, scaling)
    return seen[:, : channel.x_shape[0]] if len(channel.x_shape) == 3 else seen


def _sliced(a: Tensor, b: Tensor) -> float:
    gap = a.sort(0).values - b.sort(0).values
    return math.sqrt(float(gap.double().square().mean()))


def _jackknife(
    statistic: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor
) -> tuple[float, float]:
    blocks = min(_JACKKNIFE_BLOCKS, len(a))
    number = torch.arange(len(a), device=a.device) % blocks
    left_out = torch.tensor(
        [statistic(a[number != k], b[number != k]) for k in range(blocks)], dtype=torch.float64
    )
    error = math.sqrt((blocks - 1) * float(left_out.var(correction=0))) if blocks > 1 else math.nan
    return statistic(a, b), error
