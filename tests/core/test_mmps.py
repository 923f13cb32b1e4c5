"""Moment-matching posterior sampling: exact for a Gaussian prior and a linear channel."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from diffem_core import (
    Channel,
    Denoiser,
    GaussianPosterior,
    GaussianPrior,
    MMPSPosterior,
    RandomMask,
    RandomMatrix,
    Scaling,
    conjugate_gradients,
    ddim,
    ddpm,
    log_linear_grid,
    mmps_denoise,
)

CHANNELS = {
    "mask": lambda: RandomMask((1, 2, 3), keep=0.6, noise_std=0.3),
    "matrix": lambda: RandomMatrix(6, rows=2, noise_std=0.2),
}


class ExactDenoiser(Denoiser):
    """The denoiser of a Gaussian prior, stated in the data's units, in network units."""

    def __init__(self, prior: GaussianPrior, scaling: Scaling) -> None:
        super().__init__(
            nn.Linear(1, 1)
        )  # Holds a parameter, from which posteriors take the device.
        self.prior = prior.rescaled(scaling.center, scaling.scale)

    def forward(self, x_t: Tensor, sigma_t: Tensor, condition: Tensor | None = None) -> Tensor:
        assert condition is None
        return self.prior.denoise(x_t, sigma_t)


def gaussian() -> GaussianPrior:
    generator = torch.Generator().manual_seed(3)
    return GaussianPrior(
        mean=torch.randn(6, generator=generator, dtype=torch.float64) + 8,
        factor=3 * torch.randn(6, 2, generator=generator, dtype=torch.float64),
        diag=torch.rand(6, generator=generator, dtype=torch.float64) + 0.5,
    )


def observe(channel: Channel, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    prior = gaussian()
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    e = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    x = (prior.mean + z @ prior.factor.mT + e * prior.diag.sqrt()).reshape(n, *channel.x_shape)
    params = {k: v.double() for k, v in channel.draw_params(n, generator=generator).items()}
    return channel.corrupt(x, params, generator=generator), params


@pytest.mark.parametrize("heuristic", ["tweedie", "cov_x"])
@pytest.mark.parametrize("name", CHANNELS)
def test_the_estimate_is_exact_for_a_gaussian(name: str, heuristic: str) -> None:
    """E[x | x_t, y] of x ~ N(m, S): x_t is one more observation of all of x, with noise
    sigma_t."""
    channel = CHANNELS[name]()
    prior, n = gaussian(), 5
    y, params = observe(channel, n)
    assert channel.noise_std is not None
    sigma_t = torch.tensor([0.05, 0.5, 2.0, 10.0, 50.0], dtype=torch.float64)
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x_t = (prior.mean + sigma_t.unsqueeze(1) * noise).reshape(n, *channel.x_shape)
    estimate = mmps_denoise(
        prior.denoise,
        x_t,
        sigma_t,
        y,
        A=lambda x: channel.A(x, params),
        A_adjoint=lambda v: channel.A_adjoint(v, params),
        noise_variance=channel.noise_std**2,
        covariance=prior if heuristic == "cov_x" else None,
        iterations=12,
        tolerance=0.0,
    )
    A = channel.matrix(params)
    S, eye = prior.covariance(), torch.eye(6, dtype=torch.float64)
    for i in range(n):
        precision = (
            torch.linalg.inv(S) + eye / sigma_t[i] ** 2 + A[i].mT @ A[i] / channel.noise_std**2
        )
        pull = (
            torch.linalg.solve(S, prior.mean)
            + x_t[i].flatten() / sigma_t[i] ** 2
            + A[i].mT @ y[i].flatten() / channel.noise_std**2
        )
        torch.testing.assert_close(
            estimate[i].flatten(), torch.linalg.solve(precision, pull), rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize("scaling", [Scaling.identity(), Scaling.from_range(0, 16)])
@pytest.mark.parametrize("name", CHANNELS)
def test_its_samples_are_those_of_the_exact_posterior(name: str, scaling: Scaling) -> None:
    # Deterministic sampling from the exact posterior denoiser: a Gaussian's probability flow is
    # affine, and 1,000 samples of
    # one observation have the exact mean and spread within 5 standard errors and 2 % of
    # discretization.
    channel = CHANNELS[name]()
    prior, n = gaussian(), 1000
    y, params = observe(channel, 1)
    y = y.expand(n, *channel.y_shape)
    params = {k: v.expand(n, *v.shape[1:]) for k, v in params.items()}
    sampler = functools.partial(ddim, sigmas=log_linear_grid(2e2, 1e-3, 150))
    posterior = MMPSPosterior(
        ExactDenoiser(prior, scaling),
        channel,
        scaling,
        sampler,
        covariance=prior,
        iterations=8,
        tolerance=1e-8,
    )
    x = posterior.sample(y, params, seeds=range(n)).flatten(1)
    exact = GaussianPosterior(prior, channel)
    mean = exact.mean(y[:1], {k: v[:1] for k, v in params.items()}).flatten()
    spread = exact.sample(y, params, seeds=range(n)).flatten(1).std(0)
    assert ((x.mean(0) - mean).abs() < 5 * spread / math.sqrt(n) + 0.02 * spread).all()
    # Both spreads are estimates from n samples, each with a relative standard error of 1 / sqrt(2
    # n).
    assert ((x.std(0) / spread - 1).abs() < 5 / math.sqrt(n) + 0.03).all()


def test_samples_do_not_depend_on_the_batch() -> None:
    channel = CHANNELS["matrix"]()
    y, params = observe(channel, 6)
    sampler = functools.partial(ddpm, sigmas=log_linear_grid(1e2, 1e-2, 12))
    scaling = Scaling.from_range(0, 16)
    posterior = MMPSPosterior(ExactDenoiser(gaussian(), scaling), channel, scaling, sampler)
    whole = posterior.sample(y, params, seeds=range(6))
    one = posterior.sample(y[4:5], {"matrix": params["matrix"][4:5]}, seeds=[4])
    torch.testing.assert_close(whole[4:5], one, rtol=1e-9, atol=1e-9)
    assert not whole.requires_grad


def test_a_system_that_is_not_positive_enough_takes_no_runaway_step() -> None:
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    # The second sample's matrix is 1e-4 I plus what should be a covariance and is none.
    matrices = torch.tensor(
        [[[2.0, 0.0], [0.0, 1.0]], [[1e-4 - 0.9e-4, 0.0], [0.0, 1e-4 - 1.09e-4]]],
        dtype=torch.float64,
    )

    def operator(v: torch.Tensor) -> torch.Tensor:
        return (matrices @ v.unsqueeze(2)).squeeze(2)

    free = conjugate_gradients(operator, b, iterations=1)
    held = conjugate_gradients(operator, b, iterations=1, least=0.5e-4)
    assert free[1].abs().max() > 1e5, "one step, divided by next to nothing"
    assert torch.equal(held[1], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(held[0], free[0]), "others go on as before"


def test_conjugate_gradients_solve_each_sample_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(5, dtype=torch.float64)
    b = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    b[2] = 0  # Nothing to solve: must stay 0, not 0 / 0.
    b[3] *= 1e6
    calls = []

    def operator(v: Tensor) -> Tensor:
        calls.append(1)
        return (matrix @ v.unsqueeze(-1)).squeeze(-1)

    solution = conjugate_gradients(operator, b, iterations=30, tolerance=1e-12)
    expected = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(solution, expected, rtol=1e-6, atol=1e-9)
    assert (solution[2] == 0).all()
    assert len(calls) < 30, "stops when all have converged"
    one = conjugate_gradients(lambda v: v @ matrix[1], b[1:2], iterations=3)
    several = conjugate_gradients(operator, b, iterations=3)
    torch.testing.assert_close(several[1:2], one)


def test_bad_input() -> None:
    channel = CHANNELS["mask"]()
    scaling = Scaling.identity()
    model = ExactDenoiser(gaussian(), scaling)
    sampler = functools.partial(ddpm, sigmas=log_linear_grid(1e2, 1e-2, 4))
    with pytest.raises(ValueError, match="0 iterations; give at least 1"):
        MMPSPosterior(model, channel, scaling, sampler, iterations=0)
    channel.noise_std = None
    with pytest.raises(ValueError, match="MMPS needs a linear channel with Gaussian noise"):
        MMPSPosterior(model, channel, scaling, sampler)
