"""Gaussian posteriors and fits by conjugate gradients, for any linear channel."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffem_core import (
    Channel,
    GaussianPosterior,
    GaussianPrior,
    RandomMask,
    RandomMatrix,
    accelerated_mri,
    derive_seed,
    e_step,
    fit_gaussian_prior,
    gaussian_blur,
    log_likelihood,
    super_resolution,
)
from diffem_core import gaussian_low_rank as low_rank
from diffem_core.gaussian_iterative import TOLERANCE, IterativeSystem
from diffem_core.linear_solvers import solve


def mask() -> Channel:
    """Return masks that are treated as any other operator."""
    channel = RandomMask((1, 6, 6), keep=0.5, noise_std=0.3)
    channel.selects = False
    return channel


CHANNELS: dict[str, Callable[[], Channel]] = {
    "mask": mask,
    "mri": lambda: accelerated_mri((6, 6), acceleration=2, noise_std=0.3),
    "blur": lambda: gaussian_blur((1, 6, 6), sigma=(0.4, 1.2), noise_std=0.3),
    "one_blur": lambda: gaussian_blur((1, 6, 6), sigma=0.7, noise_std=0.3),
    "blocks": lambda: super_resolution((1, 6, 6), factor=2, noise_std=0.3),
    "matrix": lambda: RandomMatrix(12, rows=5, noise_std=0.3),
}


def world(
    channel: Channel, n: int, *, rank: int = 3, diag: float = 0.1, seed: int = 0
) -> tuple[GaussianPrior, Tensor, dict[str, Tensor]]:
    """Return a prior, and observations of samples of it, in float64."""
    size = math.prod(channel.x_shape)
    generator = torch.Generator().manual_seed(0)
    prior = GaussianPrior(
        mean=torch.randn(size, generator=generator, dtype=torch.float64) + 3,
        factor=torch.randn(size, rank, generator=generator, dtype=torch.float64),
        diag=torch.full((size,), diag, dtype=torch.float64),
    )
    generator.manual_seed(seed + 1)
    z = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    e = torch.randn(n, size, generator=generator, dtype=torch.float64)
    x = (prior.mean + z @ prior.factor.mT + e * prior.diag.sqrt()).reshape(n, *channel.x_shape)
    params = {k: v.double() for k, v in channel.draw_params(n, generator=generator).items()}
    return prior, channel.corrupt(x, params, generator=generator), params


def error_bound(prior: GaussianPrior, channel: Channel, y: Tensor) -> float:
    """Bound |error of x| of a solution whose residual is a fraction TOLERANCE of |r|.

    |S A' G^-1| <= sqrt(|S|) / (2 sigma), whatever A is, and |r| <= |y - A x'| for the largest of
    the observations and of the perturbations, about 3 |y - mean y| at most. Twice that, for
    operators in float32.
    """
    assert channel.noise_std is not None
    scale = float(torch.linalg.matrix_norm(prior.covariance(), 2)) ** 0.5
    r = float((y - y.mean(0)).flatten(1).norm(dim=1).max())
    return 2 * TOLERANCE * scale * 3 * r / (2 * channel.noise_std)


@pytest.mark.parametrize("name", CHANNELS)
def test_the_iterative_posterior_is_the_dense_one(name: str) -> None:
    channel = CHANNELS[name]()
    prior, y, params = world(channel, 40)
    dense = GaussianPosterior(prior, channel, solver="dense")
    iterative = GaussianPosterior(prior, channel, solver="iterative")
    seeds = [derive_seed("x", i) for i in range(40)]
    bound = error_bound(prior, channel, y)
    assert bound < 0.03, "of samples with a standard deviation of sqrt(D) 1.8, at least 6"
    pairs = [
        (iterative.mean(y, params), dense.mean(y, params)),
        (iterative.sample(y, params, seeds=seeds), dense.sample(y, params, seeds=seeds)),
    ]
    for ours, theirs in pairs:
        assert ours.shape == (40, *channel.x_shape)
        assert ours.dtype == torch.float64
        assert (ours - theirs).flatten(1).norm(dim=1).max() < bound
    assert (pairs[0][0] - pairs[1][0]).abs().max() > 0.1


@pytest.mark.parametrize("name", CHANNELS)
def test_iterative_samples_do_not_depend_on_the_batch(name: str) -> None:
    # Rounding may let a sample stop an iteration earlier: within the bound of two solutions.
    channel = CHANNELS[name]()
    prior, y, params = world(channel, 30)
    # One sample is much harder than the others, and must not change when they stop.
    y[3] = 50 * torch.randn(channel.y_shape, generator=torch.Generator().manual_seed(0))
    posterior = GaussianPosterior(prior, channel, solver="iterative")
    seeds = [derive_seed("sample", i) for i in range(30)]
    whole = e_step(posterior, y, params, seeds=seeds, batch_size=30)
    parts = e_step(posterior, y, params, seeds=seeds, batch_size=7)
    one = e_step(
        posterior, y[5:6], {k: v[5:6] for k, v in params.items()}, seeds=seeds[5:6], batch_size=1
    )
    easy = [i for i in range(30) if i != 3]
    bound = 2 * error_bound(prior, channel, y[easy])
    assert (whole - parts)[easy].flatten(1).norm(dim=1).max() < bound
    assert (whole[5:6] - one).norm() < bound


def test_the_solver_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small systems are dense; large ones of operators of their own are never written down."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("the other solver")

    large = accelerated_mri((32, 32), acceleration=4, noise_std=0.1)
    y = torch.randn(3, *large.y_shape)
    params = large.draw_params(3, generator=torch.Generator().manual_seed(0))
    thin = GaussianPrior(
        mean=torch.zeros(2048).double(),
        factor=torch.randn(2048, 4, generator=torch.Generator().manual_seed(0)).double(),
        diag=torch.ones(2048).double(),
    )
    with monkeypatch.context() as patch:
        patch.setattr(Channel, "matrix", refuse)
        sample = GaussianPosterior(thin, large).sample(y, params, seeds=range(3))
        assert sample.shape == (3, 2, 32, 32)
        assert sample.dtype == torch.float32
        fit_gaussian_prior(y, params, large, rank=2, iterations=1)
    with monkeypatch.context() as patch:
        patch.setattr(IterativeSystem, "weights", refuse)
        for name in ("mri", "blur", "one_blur", "matrix"):
            channel = CHANNELS[name]()
            prior, y, params = world(channel, 3)
            GaussianPosterior(prior, channel).mean(y, params)
        # One matrix for all of 1,024 entries is small enough, too.
        shared = gaussian_blur((1, 32, 32), sigma=0.7, noise_std=0.1)
        prior, y, params = world(shared, 3)
        GaussianPosterior(prior, shared).mean(y, params)


@pytest.mark.parametrize("name", ["mask", "mri", "blur", "blocks", "matrix"])
def test_a_low_rank_fit_is_as_good_as_a_full_one(name: str) -> None:
    """The log-likelihood of held-out observations rises, to that of the full covariance.

    Criterion: it misses at most 5 % of what the full fit gains from its first round to its last.
    (Held out, since a full covariance fits its own observations better than the truth does.) Block
    averages hide so much that EM takes more rounds, and more with few factors than with all.
    """
    rounds = 60 if name == "blocks" else 15
    channel = CHANNELS[name]()
    _, y, params = world(channel, 400)
    _, y_new, params_new = world(channel, 200, seed=5)

    def judge(prior: GaussianPrior) -> float:
        return log_likelihood(prior, y_new, params_new, channel)

    first, last = (
        judge(fit_gaussian_prior(y, params, channel, rank=3, iterations=k)) for k in (1, rounds)
    )
    full_first, full_last = (
        judge(fit_gaussian_prior(y, params, channel, iterations=k)) for k in (1, rounds)
    )
    assert last > first
    assert last > full_last - 0.05 * (full_last - full_first)


def test_a_low_rank_fit_recovers_the_prior_from_mri() -> None:
    # Half of the lines are seen and a quarter of their pairs: with 4,000 observations, the
    # relative error of the covariance is about sqrt(2 / (0.25 n)) = 4.5 %.
    channel = accelerated_mri((4, 4), acceleration=2, noise_std=0.1)
    truth, y, params = world(channel, 4000, rank=1)
    fitted = fit_gaussian_prior(y, params, channel, rank=1, iterations=30)
    S = truth.covariance()
    error = torch.linalg.matrix_norm(fitted.covariance() - S) / torch.linalg.matrix_norm(S)
    assert error < 0.1
    # A mean's entry has a standard error of about 1.5 / sqrt(0.5 n) = 0.034.
    assert (fitted.mean - truth.mean).abs().max() < 4 * 0.034
    assert (fitted.diag[0] - 0.1).abs() < 0.02


@pytest.mark.parametrize("name", ["mri", "blur", "matrix"])
def test_moments_are_those_of_the_posteriors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round's closed form is given is the covariance of x under all posteriors."""
    channel = CHANNELS[name]()
    n, size = 1000, math.prod(channel.x_shape)
    _, y, params = world(channel, n)
    rounds: list[low_rank._Moments] = []
    original = low_rank.principal_components

    def spy(covariance: low_rank._Moments, **settings: object) -> tuple[Tensor, float]:
        rounds.append(covariance)
        return original(covariance, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(low_rank, "principal_components", spy)
    fit_gaussian_prior(y, params, channel, rank=3, iterations=2)
    moments = rounds[1]
    S = moments.prior.covariance()
    A = channel.matrix(params)
    assert channel.noise_std is not None
    G = A @ S @ A.mT + channel.noise_std**2 * torch.eye(A.shape[1], dtype=torch.float64)
    K = S @ A.mT @ torch.linalg.inv(G)
    m = moments.prior.mean + (K @ (y.flatten(1) - (A @ moments.prior.mean)).unsqueeze(2)).squeeze(
        2
    )
    expected = torch.cov(m.mT, correction=0) + S - (K @ A @ S).mean(0)
    found = moments(torch.eye(size, dtype=torch.float64))
    assert 0 < moments.share < 1
    # 5 standard errors of a covariance estimated from n draws of N(0, S).
    spread = S.diagonal().sqrt()
    bound = 5 * math.sqrt(2 / n) * spread.unsqueeze(1) * spread
    assert ((found - expected).abs() < bound).all()
    # Each of the two estimates is one on its own.
    for own in (
        moments.w.mT @ moments.w / n,
        S - moments.h.mT @ moments.h / n,
    ):
        assert ((own - (S - (K @ A @ S).mean(0))).abs() < bound).all()
    assert moments.trace == pytest.approx(float(found.diagonal().sum()), rel=1e-9)
    # Draw by draw: of x' = w + h, h is K (A x' + e'), so that what is left of it is K e'. Its mean
    # square has the relative error of a chi-square with at least n degrees of freedom.
    x = (moments.w + moments.h).unsqueeze(2)
    left = moments.h - (K @ (A @ x)).squeeze(2)
    expected_square = channel.noise_std**2 * K.expand(n, -1, -1).square().sum()
    assert float(left.square().sum() / expected_square) == pytest.approx(
        1, abs=5 * math.sqrt(2 / n)
    )


def test_principal_components_are_the_maximum_of_the_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 40, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(1, -1, 40, dtype=torch.float64)
    expected = GaussianPrior.from_samples(x, rank=4)

    class Dense:
        matrix = torch.cov(x.mT, correction=0)
        trace = float(matrix.diagonal().sum())

        def __call__(self, q: Tensor) -> Tensor:
            return self.matrix @ q

    zeros = torch.zeros(40, 4, dtype=torch.float64)
    factor, rest = low_rank.principal_components(Dense(), rank=4, start=zeros, seed=0)
    assert rest == pytest.approx(float(expected.diag[0]), rel=1e-6)
    torch.testing.assert_close(
        factor @ factor.mT, expected.factor @ expected.factor.mT, rtol=1e-5, atol=1e-5
    )


def test_a_low_rank_fit_reports_rounds_and_repeats() -> None:
    channel = CHANNELS["mri"]()
    _, y, params = world(channel, 20)
    seen: list[tuple[int, float]] = []
    first, second, other = (
        fit_gaussian_prior(
            y,
            params,
            channel,
            rank=2,
            iterations=3,
            seed=seed,
            on_progress=lambda k, value: seen.append((k, value)),
        )
        for seed in (0, 0, 1)
    )
    assert [k for k, _ in seen] == [1, 2, 3] * 3
    assert all(math.isnan(value) for _, value in seen)
    assert torch.equal(first.factor, second.factor)
    assert not torch.equal(first.factor, other.factor)
    assert first.factor.shape == (72, 2)
    assert first.factor.dtype == torch.float64


def test_solve_reaches_its_tolerance_or_fails() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64)
    b = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    b[2] = 0
    b[3] *= 1e6

    def operator(v: Tensor) -> Tensor:
        return (matrix @ v.unsqueeze(-1)).squeeze(-1)

    for tolerance in (1e-3, 1e-8):
        v = solve(operator, b, tolerance=tolerance)
        residual = (b - operator(v)).norm(dim=1)
        assert (residual <= tolerance * b.norm(dim=1)).all()
        assert (v[2] == 0).all()
    # Too few iterations in one go are made up for by starting again from where they ended.
    easy = matrix + 5 * torch.eye(6, dtype=torch.float64)
    v = solve(lambda u: (easy @ u.unsqueeze(-1)).squeeze(-1), b, tolerance=1e-3, iterations=4)
    residual = b - (easy @ v.unsqueeze(-1)).squeeze(-1)
    assert (residual.norm(dim=1) <= 1e-3 * b.norm(dim=1)).all()
    with pytest.raises(
        FloatingPointError, match=r"left a residual of .*; use a channel with more"
    ):
        solve(operator, b, tolerance=1e-8, iterations=1)


def test_float32_operators_are_accurate_enough_where_noise_is_low() -> None:
    # |S| / sigma^2 is about 10^6: residuals stall at float32's rounding, which must not matter.
    channel = accelerated_mri((6, 6), acceleration=2, noise_std=0.01)
    prior, y, params = world(channel, 40)
    dense = GaussianPosterior(prior, channel, solver="dense").mean(y, params)
    iterative = GaussianPosterior(prior, channel, solver="iterative").mean(y, params)
    spread = float(prior.covariance().diagonal().mean().sqrt())
    assert (iterative - dense).abs().max() < 0.01 * spread


def test_bad_input() -> None:
    large = accelerated_mri((32, 32), acceleration=4, noise_std=0.1)
    y = torch.randn(2, *large.y_shape)
    params = large.draw_params(2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"a full covariance builds dense .* 4194304 .*set rank"):
        fit_gaussian_prior(y, params, large)
    prior = GaussianPrior(
        mean=torch.zeros(2048).double(),
        factor=torch.ones(2048, 1).double(),
        diag=torch.ones(2048).double(),
    )
    with pytest.raises(ValueError, match="a Gaussian likelihood builds dense systems"):
        log_likelihood(prior, y, params, large)
    with pytest.raises(ValueError, match="rank 2048; give 1 to 2047, or None"):
        fit_gaussian_prior(y, params, large, rank=2048)
    with pytest.raises(ValueError, match="solver 'cg'; known are"):
        GaussianPosterior(prior, large, solver="cg")  # type: ignore[arg-type]
    pixels = RandomMask((1, 40, 40), keep=0.5, noise_std=0.1)
    y = torch.randn(2, 1, 40, 40)
    params = pixels.draw_params(2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"2560000 values for RandomMask .* 1048576 is the largest"
    ):
        fit_gaussian_prior(y, params, pixels)
