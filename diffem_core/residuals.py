"""Do reconstructions explain their own observations, as well as the noise allows and no better?

Let x_hat ~ q(x | y). If q is the posterior, (x_hat, y) has the distribution of a clean sample and
its observation, so that

    y - A x_hat ~ N(0, sigma^2 I),        |y - A x_hat|^2 / sigma^2 ~ chi^2 with M degrees

with M measured entries: also for a posterior *sample*, not only for the truth. (The posterior mean
would come closer.) A ratio above 1 means that the observation is not taken seriously enough, or
that there is more noise in it than the channel says; below 1, that its noise is reproduced, or
that there is less.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.measurement import Measurement

__all__ = ["noisy_entries", "predictive_test", "residual_test"]

_LEAST = 10


def residual_test(
    channel: Channel, draws: Tensor, y: Tensor, params: Mapping[str, Tensor], *, seed: int = 0
) -> Measurement:
    """Compare the residuals of reconstructions with the noise level.

    Arguments:
        channel: A linear channel with Gaussian noise.
        draws: Posterior samples of shape (S, n, *x_shape), in the data's units.
        y: Their observations, shape (n, *y_shape).
        params: Their operator parameters.
        seed: Seed of the two trials that tell which entries of y carry noise.

    Returns:
        The mean over observations of |y - A x_hat|^2 / (M sigma^2), without unit: 1 is right. The
        p-value is Student's, two-sided, over observations (the samples of one are averaged).
        Left out for other channels, without noise, or with fewer than 10 observations.
    """
    if not channel.linear or channel.noise_std is None:
        return Measurement.left_out(
            f"{type(channel).__name__} is not linear with Gaussian noise of one known level"
        )
    if channel.noise_std == 0:
        return Measurement.left_out("the channel has no noise to compare residuals with")
    noisy = noisy_entries(channel, y, params, seed=seed).flatten(1)
    counted = noisy.sum(1) > 0
    if int(counted.sum()) < _LEAST:
        return Measurement.left_out(
            f"{int(counted.sum())} held-out observations measure anything, {_LEAST} are needed; "
            "raise data.holdout"
        )
    ratios = []
    for x_hat in draws:
        residual = (y - channel.A(x_hat, params)).double().flatten(1).square()
        ratios.append((residual * noisy).sum(1)[counted] / noisy.sum(1)[counted])
    values = torch.stack(ratios).mean(0) / channel.noise_std**2
    return Measurement.of_means(values, expected=1.0)


def predictive_test(
    channel: Channel, draws: Tensor, y: Tensor, params: Mapping[str, Tensor], *, seed: int
) -> Measurement:
    """Compare observations with what their reconstructions would be observed as.

    Where x_hat ~ q(x | y) is a posterior sample and y' ~ Q(. | x_hat) with the operator of y,
    y and y' can be exchanged given x_hat, so that each is as likely to be the farther one:

        P(|y - A x_hat| > |y' - A x_hat|) = 1/2

    for any channel, whatever its noise. More means that reconstructions are too far from their
    observations, less that they are too close. It cannot tell anything about what A hides, and a
    posterior that errs both ways may go unnoticed.

    Arguments:
        channel: The channel.
        draws: Posterior samples of shape (S, n, *x_shape), in the data's units.
        y: Their observations, shape (n, *y_shape).
        params: Their operator parameters.
        seed: Seed of the corruption.

    Returns:
        The share, 1/2 if all is well; ties count for one half. The p-value is Student's,
        two-sided, over observations. Left out with fewer than 10, or where all are ties.

    References:
        Gelman, Meng and Stern 1996, for discrepancies of data and parameters; one replicate a
        draw, so that both are exchangeable.
    """
    if len(y) < _LEAST:
        return Measurement.left_out(
            f"{len(y)} held-out observations are too few, {_LEAST} are needed; raise data.holdout"
        )
    generator = torch.Generator(y.device).manual_seed(seed)
    farther = []
    for x_hat in draws:
        clean = channel.A(x_hat, params)
        again = channel.corrupt(x_hat, params, generator=generator)
        ours = (y - clean).double().flatten(1).square().sum(1)
        theirs = (again - clean).double().flatten(1).square().sum(1)
        farther.append((ours > theirs).double() + 0.5 * (ours == theirs).double())
    values = torch.stack(farther).mean(0)
    if bool((values == 0.5).all()):
        return Measurement.left_out("observations and their repetitions are the same")
    return Measurement.of_means(values, expected=0.5)


def noisy_entries(
    channel: Channel, y: Tensor, params: Mapping[str, Tensor], *, seed: int
) -> Tensor:
    """Tell which entries of y carry noise: those in which two corruptions of one x differ.

    Returns:
        Booleans of the shape of y.
    """
    generator = torch.Generator(y.device).manual_seed(seed)
    x = torch.zeros(len(y), *channel.x_shape, dtype=y.dtype, device=y.device)
    first, second = (channel.corrupt(x, params, generator=generator) for _ in range(2))
    return first != second
