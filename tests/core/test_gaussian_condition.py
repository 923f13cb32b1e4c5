"""A condition that holds the best linear estimate, or the whole Gaussian posterior."""

import pytest
import torch
from torch import Tensor, nn

from diffem_core import (
    Denoiser,
    GaussianMeanChannel,
    GaussianPosterior,
    GaussianPosteriorChannel,
    GaussianPrior,
    RandomMask,
    RandomMatrix,
    Scaling,
    accelerated_mri,
    compressed_sensing,
    with_observed_operators,
)
from diffem_core.channel import Channel
from diffem_core.preconditioning import FactorPreconditioning

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


def vector_prior() -> GaussianPrior:
    generator = torch.Generator().manual_seed(5)
    return GaussianPrior(
        mean=torch.randn(5, generator=generator, dtype=torch.float64),
        factor=torch.randn(5, 5, generator=generator, dtype=torch.float64),
        diag=torch.full((5,), 0.1, dtype=torch.float64),
    )


def observed(channel: Channel, prior: GaussianPrior, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    x = prior.mean.reshape(channel.x_shape) + torch.randn(
        n, *channel.x_shape, generator=generator, dtype=torch.float64
    )
    params = channel.draw_params(n, generator=generator)
    return channel.corrupt(x.float(), params, generator=generator).double(), params


def closed_form(
    channel: Channel, prior: GaussianPrior, y: Tensor, params: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of x given y, from precisions."""
    matrix = channel.matrix(params)
    assert channel.noise_std is not None
    variance = channel.noise_std**2
    precision = torch.linalg.inv(prior.covariance())
    covariance = torch.linalg.inv(precision + matrix.mT @ matrix / variance)
    evidence = (matrix.mT @ y.flatten(1).unsqueeze(2)).squeeze(2) / variance
    mean = covariance @ (evidence + precision @ prior.mean).unsqueeze(2)
    return mean.squeeze(2), covariance


@pytest.mark.parametrize(
    ("channel", "rank"),
    [
        (RandomMask((2, 4, 4), keep=0.5, noise_std=0.3), 3),  # in the space of the factors
        (RandomMask((2, 4, 4), keep=0.5, noise_std=0.3), 20),  # dense, selected entries
        (compressed_sensing((2, 4, 4), measurements=12, noise_std=0.3), 3),  # dense
        (RandomMatrix(5, rows=2, noise_std=0.1), 5),
    ],
)
def test_moments_are_those_of_the_closed_form(channel: Channel, rank: int) -> None:
    if rank == 5:
        prior_ = vector_prior()
    else:
        factor = torch.randn(
            32, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
        )
        diag = torch.linspace(0.2, 1.5, 32, dtype=torch.float64)
        prior_ = GaussianPrior(mean=diag * 4, factor=factor, diag=diag)
    y, params = observed(channel, prior_, 6)
    posterior = GaussianPosterior(prior_, channel)
    expected, covariance = closed_form(channel, prior_, y, params)
    mean, std = posterior.moments(y, params)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # A of some channels computes in float32.
    torch.testing.assert_close(mean.flatten(1), expected, **tolerance)
    variances = covariance.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(std.flatten(1).square(), variances, **tolerance)
    _, factor = posterior.moments(y, params, full=True)
    torch.testing.assert_close(factor @ factor.mT, covariance, **tolerance)
    assert torch.equal(factor, factor.tril())


class Constant(nn.Module):
    """A network that returns one value everywhere, and keeps what it was shown."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("sigma", [1e-3, 0.03, 1.0, 100.0])
def test_around_a_vector_s_posterior_a_silent_network_is_exact(sigma: float) -> None:
    # E[x | x_t, y] and its covariance under the Gaussian prior, from precisions.
    channel, scaling = RandomMatrix(5, rows=2, noise_std=0.1), Scaling(center=0.3, scale=0.5)
    wrapped = GaussianPosteriorChannel(channel, vector_prior())
    y, params = observed(channel, vector_prior(), 7)
    condition = wrapped.condition(y, params, scaling)
    assert condition.shape == (7, wrapped.condition_channels)
    mean, covariance = closed_form(channel, vector_prior(), y, params)
    mean, covariance = scaling.to_network(mean), scaling.scale**2 * covariance
    x_t = mean + sigma * torch.randn(
        7, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    identity = torch.eye(5, dtype=torch.float64)
    left = torch.linalg.inv(torch.linalg.inv(covariance) + identity / sigma**2)
    expected = left @ (torch.linalg.solve(covariance, mean) + x_t / sigma**2).unsqueeze(2)
    silent = Denoiser(Constant(0.0), preconditioning=wrapped.preconditioning)
    level = torch.tensor([sigma], dtype=torch.float64)
    estimate = silent(x_t, level, condition)
    torch.testing.assert_close(estimate, expected.squeeze(2), rtol=1e-6, atol=1e-7)
    # Errors of the network are scaled by B with B B' = Cov[x | x_t, y]: along each direction.
    off = []
    for j in range(5):
        network = Constant(0.0)
        network.forward = lambda x, *_, j=j: identity[j].expand_as(x)  # type: ignore[assignment, misc]
        off.append(
            Denoiser(network, preconditioning=wrapped.preconditioning)(x_t, level, condition)
        )
    columns = torch.stack(off, dim=2) - estimate.unsqueeze(2)
    torch.testing.assert_close(columns @ columns.mT, left, rtol=1e-5, atol=1e-9)


def test_around_an_image_s_posterior_it_is_edm_s_preconditioning_entry_by_entry() -> None:
    channel = RandomMask(SHAPE, keep=0.5, noise_std=0.3)
    diagonal = GaussianPrior(
        mean=torch.full((32,), 8.0, dtype=torch.float64),
        factor=torch.zeros(32, 1, dtype=torch.float64),
        diag=torch.linspace(0.2, 1.5, 32, dtype=torch.float64),
    )
    wrapped = GaussianPosteriorChannel(channel, diagonal)
    y, params = observed(channel, diagonal, 4)
    condition = wrapped.condition(y, params, SCALING)
    before = channel.condition_channels
    assert condition.shape == (4, before + 4, 4, 4)
    assert wrapped.condition_channels == before + 4
    assert torch.equal(condition[:, :before], channel.condition(y, params, SCALING))
    mean, covariance = closed_form(channel, diagonal, y, params)
    variance = SCALING.scale**2 * covariance.diagonal(dim1=1, dim2=2).reshape(4, *SHAPE)
    mean = SCALING.to_network(mean).reshape(4, *SHAPE)
    sigma = torch.tensor([0.01, 0.2, 1.0, 50.0], dtype=torch.float64)
    s = sigma.reshape(4, 1, 1, 1)
    x_t = mean + s * torch.randn(
        4, *SHAPE, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    network = Constant(0.0)
    estimate = Denoiser(network, preconditioning=wrapped.preconditioning)(x_t, sigma, condition)
    # Independent entries: two Gaussian measurements of each, weighted by their precisions.
    expected = (mean / variance + x_t / s**2) / (1 / variance + 1 / s**2)
    torch.testing.assert_close(estimate, expected, rtol=1e-5, atol=1e-6)
    # What the network sees has unit variance; what it is off by counts as the posterior's spread.
    torch.testing.assert_close(network.seen[0] * (variance + s**2).sqrt(), x_t - mean)
    loud = Denoiser(Constant(1.0), preconditioning=wrapped.preconditioning)
    spread = loud(x_t, sigma, condition) - estimate
    torch.testing.assert_close(spread.square(), 1 / (1 / variance + 1 / s**2), rtol=1e-4, atol=0)


def test_a_posterior_without_known_variances_is_refused() -> None:
    channel = accelerated_mri((32, 32), acceleration=3, center=0.1, noise_std=0.1)
    size = 2 * 32 * 32
    large = GaussianPrior(
        mean=torch.zeros(size, dtype=torch.float64),
        factor=torch.ones(size, 1, dtype=torch.float64),
        diag=torch.ones(size, dtype=torch.float64),
    )
    GaussianMeanChannel(channel, large)  # the mean alone is known
    with pytest.raises(ValueError, match=r"2048 entries of x are too large.*'gaussian_mean'"):
        GaussianPosteriorChannel(channel, large)


def test_a_covariance_that_cannot_be_factored_is_no_number() -> None:
    """In float32 one of a great range is not positive definite, whatever the prior says."""
    dimension, n = 64, 8
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(n, dimension, dimension, generator=generator)
    factor[..., 32:] = factor[..., :32]
    factor[0] = torch.eye(dimension)
    condition = torch.cat([torch.zeros(n, dimension), factor.flatten(1)], dim=1)
    denoise = FactorPreconditioning(dimension=dimension)
    x_t = torch.randn(n, dimension, generator=generator)
    estimate = denoise(torch.zeros_like, x_t, torch.tensor([1e-4]), condition)
    assert estimate[0].isfinite().all()
    assert not estimate[1:].isfinite().flatten(1).all(dim=1).any()
