"""Gaussian priors fitted by EM, their exact posteriors, and the linear-Gaussian EM recursion."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffem_core import (
    Channel,
    GaussianPosterior,
    GaussianPrior,
    RandomMask,
    RandomMatrix,
    derive_seed,
    e_step,
    fit_gaussian_prior,
    log_likelihood,
)


def world(
    channel: Channel, n: int, *, rank: int = 3, seed: int = 0
) -> tuple[GaussianPrior, Tensor, Tensor, dict[str, Tensor]]:
    """Return a prior, samples of it and their observations, in float64."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(channel.x_shape)
    prior = GaussianPrior(
        mean=torch.randn(size, generator=generator, dtype=torch.float64) + 3,
        factor=torch.randn(size, rank, generator=generator, dtype=torch.float64),
        diag=torch.rand(size, generator=generator, dtype=torch.float64) * 0.2 + 0.05,
    )
    z = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    e = torch.randn(n, size, generator=generator, dtype=torch.float64)
    x = (prior.mean + z @ prior.factor.mT + e * prior.diag.sqrt()).reshape(n, *channel.x_shape)
    params = {k: v.double() for k, v in channel.draw_params(n, generator=generator).items()}
    return prior, x, channel.corrupt(x, params, generator=generator), params


CHANNELS = {
    "mask": lambda: RandomMask((1, 3, 4), keep=0.6, noise_std=0.3),
    "colour_mask": lambda: RandomMask((2, 2, 3), keep=0.6, noise_std=0.3),
    "matrix": lambda: RandomMatrix(6, rows=3, noise_std=0.2),
}


def dense_posterior(
    prior: GaussianPrior, channel: Channel, y: Tensor, params: dict[str, Tensor], i: int
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of x_i given y_i by the textbook formula, from the operator's
    matrix."""
    one = {k: v[i : i + 1] for k, v in params.items()}
    A = channel.matrix(one)[0]
    S = prior.covariance()
    assert channel.noise_std is not None
    # Hidden entries of y are rows of zeros in A: they change nothing.
    G = A @ S @ A.mT + channel.noise_std**2 * torch.eye(len(A), dtype=torch.float64)
    K = S @ A.mT @ torch.linalg.inv(G)
    return prior.mean + K @ (y[i].flatten() - A @ prior.mean), S - K @ A @ S


@pytest.mark.parametrize("name", CHANNELS)
def test_posterior_mean_is_the_textbook_s(name: str) -> None:
    channel = CHANNELS[name]()
    prior, _, y, params = world(channel, 20)
    mean = GaussianPosterior(prior, channel).mean(y, params).flatten(1)
    for i in range(20):
        expected, _ = dense_posterior(prior, channel, y, params, i)
        torch.testing.assert_close(mean[i], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CHANNELS)
def test_posterior_samples_have_the_textbook_s_moments(name: str) -> None:
    channel = CHANNELS[name]()
    prior, _, y, params = world(channel, 2)
    n = 20000
    repeated = {k: v[1:2].expand(n, *v.shape[1:]) for k, v in params.items()}
    x = GaussianPosterior(prior, channel).sample(
        y[1:2].expand(n, *y.shape[1:]), repeated, seeds=range(n)
    )
    mean, covariance = dense_posterior(prior, channel, y, params, 1)
    spread = covariance.diagonal().sqrt()
    x = x.flatten(1)
    # 5 standard errors of a sample mean and of a sample covariance of n Gaussians.
    assert ((x.mean(0) - mean).abs() < 5 * spread / math.sqrt(n)).all()
    bound = 5 * math.sqrt(2 / n) * spread.unsqueeze(1) * spread
    assert ((torch.cov(x.mT) - covariance).abs() < bound).all()


@pytest.mark.parametrize("name", CHANNELS)
def test_posterior_samples_do_not_depend_on_the_batch(name: str) -> None:
    channel = CHANNELS[name]()
    prior, _, y, params = world(channel, 30)
    posterior = GaussianPosterior(prior, channel)
    seeds = [derive_seed("sample", i) for i in range(30)]
    whole = e_step(posterior, y, params, seeds=seeds, batch_size=30)
    parts = e_step(posterior, y, params, seeds=seeds, batch_size=7)
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mask", "colour_mask"])
def test_the_factor_form_is_the_dense_form(name: str) -> None:
    # Few factors for many entries: the posterior works in the factors' space (Woodbury).
    channel = CHANNELS[name]()
    prior, _, y, params = world(channel, 25, rank=2)
    thin = GaussianPosterior(prior, channel)
    padded = GaussianPrior(
        mean=prior.mean,
        factor=torch.cat([prior.factor, torch.zeros(12, 10, dtype=torch.float64)], dim=1),
        diag=prior.diag,
    )
    torch.testing.assert_close(
        thin.mean(y, params), GaussianPosterior(padded, channel).mean(y, params)
    )
    assert log_likelihood(prior, y, params, channel) == pytest.approx(
        log_likelihood(padded, y, params, channel), rel=1e-12
    )


def test_log_likelihood_is_the_density_of_what_is_seen() -> None:
    channel = CHANNELS["mask"]()
    prior, _, y, params = world(channel, 8)
    S, total = prior.covariance(), 0.0
    for i in range(8):
        seen = params["mask"][i].flatten() > 0
        noise = 0.3**2 * torch.eye(int(seen.sum()), dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(prior.mean[seen], S[seen][:, seen] + noise)
        total += float(law.log_prob(y[i].flatten()[seen]))
    assert log_likelihood(prior, y, params, channel) == pytest.approx(total / 8, rel=1e-6)


@pytest.mark.parametrize("name", CHANNELS)
def test_full_em_rises_and_is_the_moment_recursion(name: str) -> None:
    channel = CHANNELS[name]()
    _, _, y, params = world(channel, 40)
    history: list[float] = []
    rounds: list[int] = []

    def watch(k: int, value: float) -> None:
        rounds.append(k)
        history.append(value)

    priors = [
        fit_gaussian_prior(
            y, params, channel, iterations=k, on_progress=watch if k == 12 else None
        )
        for k in (1, 2, 12)
    ]
    assert rounds == list(range(1, 13))
    history.append(log_likelihood(priors[-1], y, params, channel))
    assert all(b > a for a, b in itertools.pairwise(history)), history
    assert log_likelihood(priors[0], y, params, channel) == pytest.approx(history[1], rel=1e-9)
    # From the first round's prior to the second's: moments of the textbook posteriors, averaged.
    means, covariances = zip(
        *(dense_posterior(priors[0], channel, y, params, i) for i in range(40)), strict=True
    )
    m, C = torch.stack(means), torch.stack(covariances)
    torch.testing.assert_close(priors[1].mean, m.mean(0), rtol=1e-7, atol=1e-9)
    expected = C.mean(0) + torch.cov(m.mT, correction=0)
    torch.testing.assert_close(priors[1].covariance(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["mask", "colour_mask"])
def test_factor_em_rises(name: str) -> None:
    channel = CHANNELS[name]()
    _, _, y, params = world(channel, 400, rank=2)
    history: list[float] = []
    prior = fit_gaussian_prior(
        y,
        params,
        channel,
        rank=2,
        iterations=15,
        on_progress=lambda k, value: history.append(value),
    )
    history.append(log_likelihood(prior, y, params, channel))
    assert all(b > a for a, b in itertools.pairwise(history)), history
    assert prior.factor.shape == (12, 2)


def test_factor_em_stays_at_a_maximum() -> None:
    # Everything seen: a maximum of the likelihood is a fixed point, where the gradient in every
    # parameter is 0.
    channel = RandomMask((1, 2, 3), keep=1.0, noise_std=0.1)
    _, _, y, params = world(channel, 300, rank=1)
    prior = fit_gaussian_prior(y, params, channel, rank=1, iterations=600)
    torch.testing.assert_close(prior.mean, y.flatten(1).mean(0))
    tensors = [prior.mean, prior.factor, prior.diag]
    for t in tensors:
        t.requires_grad_()
    S = prior.factor @ prior.factor.mT + torch.diag(prior.diag) + 0.01 * torch.eye(6).double()
    law = torch.distributions.MultivariateNormal(prior.mean, S)
    gradients = torch.autograd.grad(law.log_prob(y.flatten(1)).mean(), tensors)
    for gradient in gradients:
        assert gradient.abs().max() < 1e-3


def test_fits_recover_the_prior() -> None:
    # 4,000 observations of 6 entries, 60 % seen: the relative error of the covariance is about
    # sqrt(2 / (0.36 n)) = 4 %.
    channel = RandomMask((1, 2, 3), keep=0.6, noise_std=0.1)
    truth, _, y, params = world(channel, 4000, rank=1)
    S = truth.covariance()
    for rank in (None, 1):
        fitted = fit_gaussian_prior(y, params, channel, rank=rank, iterations=60)
        error = torch.linalg.matrix_norm(fitted.covariance() - S) / torch.linalg.matrix_norm(S)
        assert error < 0.1, rank
        assert (fitted.mean - truth.mean).abs().max() < 0.15


def test_em_does_not_care_about_units() -> None:
    channel = RandomMask((1, 2, 3), keep=0.7, noise_std=0.2)
    _, x, y, params = world(channel, 50)
    big = RandomMask((1, 2, 3), keep=0.7, noise_std=20.0)
    small = fit_gaussian_prior(y, params, channel, iterations=4)
    large = fit_gaussian_prior(100 * y, params, big, iterations=4)
    torch.testing.assert_close(large.covariance(), 1e4 * small.covariance(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(small.rescaled(0.0, 100.0).covariance(), 1e4 * small.covariance())
    assert x.shape == y.shape


def test_linear_gaussian_recursion() -> None:
    """Proof 1: with exact posteriors of one operator A, EM is a closed recursion, and the KL in y
    falls.

    K = S A'(A S A' + G)^-1,  m <- m + K (mean_y - A m),  S <- K S_y K' + (I - K A) S
    """
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cases = 0
    for _ in range(220):
        D, M = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(2))
        M = min(M, D)
        A = torch.linalg.qr(randn(D, M)).Q.mT * (0.5 + torch.rand(M, 1, generator=generator))
        noise = 0.1 + float(torch.rand((), generator=generator))
        channel = RandomMatrix(D, rows=M, noise_std=noise)
        n = 6
        y = randn(n, M) * 2 + 1
        params = {"matrix": A.expand(n, M, D)}
        mean_y, S_y = y.mean(0), torch.cov(y.mT, correction=0).reshape(M, M)
        # Start the recursion from the prior after round 1, whose first moments are this module's
        # own.
        steps = [fit_gaussian_prior(y, params, channel, iterations=k) for k in (1, 2, 3)]
        m, S = steps[0].mean, steps[0].covariance()
        divergences = []
        for k in range(3):
            G = A @ S @ A.mT + noise**2 * torch.eye(M, dtype=torch.float64)
            gap = mean_y - A @ m
            # KL(empirical Gaussian of y || model) up to the constant entropy of the former.
            divergences.append(
                float(
                    torch.linalg.solve(G, S_y).trace()
                    + gap @ torch.linalg.solve(G, gap)
                    + G.logdet()
                )
            )
            if k == 2:
                break
            K = S @ A.mT @ torch.linalg.inv(G)
            m = m + K @ gap
            S = K @ S_y @ K.mT + (torch.eye(D, dtype=torch.float64) - K @ A) @ S
            torch.testing.assert_close(steps[k + 1].mean, m, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(steps[k + 1].covariance(), S, rtol=1e-5, atol=1e-6)
        assert divergences[0] >= divergences[1] - 1e-9
        assert divergences[1] >= divergences[2] - 1e-9
        cases += divergences[0] > divergences[1] > divergences[2]
    assert cases >= 200


def test_a_prior_survives_its_tensors() -> None:
    prior, *_ = world(CHANNELS["mask"](), 2)
    copy = GaussianPrior.from_tensors(prior.tensors())
    assert all(torch.equal(a, copy.tensors()[k]) for k, a in prior.tensors().items())


def test_bad_input() -> None:
    mask = CHANNELS["mask"]()
    prior, _, y, params = world(mask, 5)
    with pytest.raises(ValueError, match="0 iterations; give at least 1"):
        fit_gaussian_prior(y, params, mask, iterations=0)
    with pytest.raises(ValueError, match="rank 13; give 1 to 12, or None"):
        fit_gaussian_prior(y, params, mask, rank=13)
    matrix = CHANNELS["matrix"]()
    _, _, y_matrix, params_matrix = world(matrix, 5)
    with pytest.raises(ValueError, match="rank 6; give 1 to 5, or None"):
        fit_gaussian_prior(y_matrix, params_matrix, matrix, rank=6)
    with pytest.raises(ValueError, match=r"12 dimensions but .* shape \(6,\)"):
        GaussianPosterior(prior, matrix)
    with pytest.raises(ValueError, match="see nothing"):
        fit_gaussian_prior(y, {"mask": torch.zeros_like(params["mask"])}, mask)
    ones = {"mask": torch.ones_like(params["mask"])}
    with pytest.raises(ValueError, match="the constant"):
        fit_gaussian_prior(torch.full_like(y, 3.0), ones, mask)
    with pytest.raises(ValueError, match="4 seeds for 5 observations"):
        GaussianPosterior(prior, mask).sample(y, params, seeds=range(4))
    mask.linear = False
    with pytest.raises(ValueError, match="needs a linear channel with Gaussian noise"):
        fit_gaussian_prior(y, params, mask)
