"""A condition that holds the best linear estimate."""

import torch

from diffem_core import (
    GaussianMeanChannel,
    GaussianPosterior,
    GaussianPrior,
    RandomMask,
    Scaling,
    compressed_sensing,
    with_observed_operators,
)
from diffem_core.channel import Channel

SHAPE = (2, 4, 4)
SCALING = Scaling.from_range(0, 16)


def prior() -> GaussianPrior:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    return GaussianPrior(
        mean=torch.full((32,), 8.0, dtype=torch.float64),
        factor=factor,
        diag=torch.full((32,), 0.5, dtype=torch.float64),
    )


def channels() -> list[Channel]:
    return [
        RandomMask(SHAPE, keep=0.5, noise_std=0.3),
        compressed_sensing(SHAPE, measurements=12, noise_std=0.3),
    ]


def test_it_ends_with_the_posterior_mean_and_begins_with_what_was_seen_before() -> None:
    for channel in channels():
        wrapped = GaussianMeanChannel(channel, prior())
        generator = torch.Generator().manual_seed(1)
        x = 16 * torch.rand(5, *SHAPE, generator=generator)
        params = wrapped.draw_params(5, generator=generator)
        y = wrapped.corrupt(x, params, generator=generator)
        condition = wrapped.condition(y, params, SCALING)
        before = channel.condition_channels
        assert condition.shape == (5, wrapped.condition_channels, 4, 4)
        assert torch.equal(condition[:, :before], channel.condition(y, params, SCALING))
        mean = GaussianPosterior(prior(), channel).mean(y, params)
        torch.testing.assert_close(SCALING.to_data(condition[:, before:]), mean)


def test_it_corrupts_as_the_channel_does() -> None:
    for channel in channels():
        wrapped = GaussianMeanChannel(channel, prior())
        x = 16 * torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))
        results = []
        for one in (channel, wrapped):
            generator = torch.Generator().manual_seed(2)
            params = one.draw_params(5, generator=generator)
            y = one.corrupt(x, params, generator=generator)
            assert (one.selection(params) is None) == (channel.selection(params) is None)
            results.append(
                [
                    y,
                    one.A(x, params),
                    one.A_adjoint(y, params),
                    one.A_dagger(y, params),
                    one.matrix(params),
                    *params.values(),
                ]
            )
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_of_the_observations_stay_those_of_the_observations() -> None:
    channel = channels()[0]
    bank = channel.draw_params(3, generator=torch.Generator().manual_seed(3))
    wrapped = GaussianMeanChannel(with_observed_operators(channel, bank), prior())
    drawn = wrapped.draw_params(20, generator=torch.Generator().manual_seed(4))["mask"]
    assert all(any(torch.equal(mask, known) for known in bank["mask"]) for mask in drawn)
