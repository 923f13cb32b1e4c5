"""Proof 2: with a learned network, DiffEM follows the linear-Gaussian EM recursion."""

import functools
import math

import torch
from torch import Tensor

from diffem_core import (
    MLP,
    Denoiser,
    GaussianPosterior,
    GaussianPrior,
    RandomMatrix,
    Scaling,
    UniformTime,
    VELogLinear,
    cosine_rate,
    dpm_solver,
    em,
    log_linear_grid,
    seeded_initialization,
)

NOISE = 0.8


def exact_update(mean: Tensor, cov: Tensor, y: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Average the textbook posteriors of x ~ N(mean, cov), each y_i seen through a row A_i."""
    variance = torch.einsum("ni,ij,nj->n", A, cov, A) + NOISE**2
    gain = (A @ cov) / variance.unsqueeze(1)
    means = mean + gain * (y - A @ mean).unsqueeze(1)
    left = cov - torch.einsum("ni,nj,n->ij", gain, gain, variance) / len(y)
    return means.mean(0), left + torch.cov(means.mT, correction=0)


def test_learned_iterates_follow_the_exact_recursion() -> None:
    n, iterations, steps = 2000, 6, 500
    channel = RandomMatrix(2, rows=1, noise_std=NOISE)
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.5, 0.0], [1.2, 0.5]])
    x = torch.tensor([0.8, -0.6]) + torch.randn(n, 2, generator=generator) @ root.mT
    params = channel.draw_params(n, generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    start = GaussianPrior(
        mean=torch.zeros(2, dtype=torch.float64),
        factor=0.7 * torch.eye(2, dtype=torch.float64),
        diag=torch.zeros(2, dtype=torch.float64),
    )
    with seeded_initialization(0):
        network = MLP(
            features=2,
            condition_features=channel.condition_channels,
            hidden=(64, 64),
            embedding=32,
        )
    rounds = em(
        y,
        params,
        channel,
        Denoiser(network),
        GaussianPosterior(start, channel),
        scaling=Scaling.identity(),
        sampler=functools.partial(dpm_solver, sigmas=log_linear_grid(20.0, 0.02, 24)),
        schedule=VELogLinear(sigma_min=1e-2, sigma_max=20.0),
        times=UniformTime(),
        iterations=iterations,
        steps=steps,
        learning_rate=cosine_rate(4e-3, floor=0.05, steps=steps * iterations),
        ema_decay=0.99,
        seed=1,
    )
    A, observed = params["matrix"].squeeze(1).double(), y.squeeze(1).double()
    # Moments of n samples have standard errors sd / sqrt(n) and at most var sqrt(2 / n). Each
    # round
    # is allowed 3 of them for its own sampling and 4 for what the network has not learned,
    # starting
    # from the moments that the round before really had.
    before = (start.mean, start.covariance())
    recursion = before
    for r in rounds:
        mean, cov = exact_update(*before, observed, A)
        x_hat = r.x_hat.double()
        before = (x_hat.mean(0), torch.cov(x_hat.mT, correction=0))
        largest = float(cov.diagonal().max())
        assert (before[0] - mean).abs().max() < 7 * math.sqrt(largest / n), r.number
        assert (before[1] - cov).abs().max() < 7 * largest * math.sqrt(2 / n), r.number
        recursion = exact_update(*recursion, observed, A)
    # The six rounds together end where six exact ones do: closer by far than where they began.
    gap = torch.linalg.matrix_norm(before[1] - recursion[1])
    way = torch.linalg.matrix_norm(start.covariance() - recursion[1])
    assert gap < 0.2 * way
    assert (before[0] - recursion[0]).norm() < 0.2 * recursion[0].norm()
