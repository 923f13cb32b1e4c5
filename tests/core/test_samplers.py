"""Every sampler on a Gaussian target: exact mean and covariance in the limit, at the stated
order."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffem_core import (
    GaussianPrior,
    SampleNoise,
    ddim,
    ddpm,
    dpm_solver,
    heun,
    karras_grid,
    log_linear_grid,
    predictor_corrector,
)

HIGH, LOW = 50.0, 1e-3
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
VARIANCE = torch.tensor([2.5, 0.6, 0.1], dtype=torch.float64)
PRIOR = GaussianPrior(mean=MEAN, factor=torch.zeros(3, 1, dtype=torch.float64), diag=VARIANCE)

Moments = Callable[[Callable[[SampleNoise], Tensor], int], tuple[Tensor, Tensor]]
# Sampler, order of the error, largest relative error of a variance with 64 steps.
SAMPLERS = {
    "ddpm": (ddpm, 1, 0.2),
    "ddim": (ddim, 1, 0.1),
    "dpm_solver_ode": (functools.partial(dpm_solver, stochastic=False), 2, 0.01),
    "dpm_solver_sde": (dpm_solver, 2, 0.03),
    "heun": (heun, 2, 0.02),
}


def errors(sampler: Callable[..., Tensor], grid: Tensor, moments: Moments) -> tuple[float, float]:
    """Return the errors of mean and variances for a start with the law of x_t at the first
    level."""
    spread = (VARIANCE + float(grid[0]) ** 2).sqrt()

    def sample(noise: SampleNoise) -> Tensor:
        x_start = MEAN + noise.normal((3,)) * spread
        return sampler(PRIOR.denoise, sigmas=grid, noise=noise, shape=(3,), x_start=x_start)

    mean, variance = moments(sample, 2 * len(grid))
    return float((mean - MEAN).norm()), float((variance / VARIANCE - 1).abs().max())


@pytest.mark.parametrize("grid", [log_linear_grid, karras_grid])
@pytest.mark.parametrize("name", SAMPLERS)
def test_convergence(name: str, grid: Callable[..., Tensor], moments: Moments) -> None:
    sampler, order, bound = SAMPLERS[name]
    error = {}
    for steps in (64, 128, 256):
        mean, error[steps] = errors(sampler, grid(HIGH, LOW, steps), moments)
        # An exact denoiser is affine around the mean: every sampler keeps a start at the mean
        # there.
        assert mean < 1e-10
    assert error[64] < bound
    observed = [math.log2(error[64] / error[128]), math.log2(error[128] / error[256])]
    assert all(order - 0.15 < o < order + 0.45 for o in observed), observed


def test_predictor_corrector_converges_to_the_bias_of_its_corrector(moments: Moments) -> None:
    # A Langevin step of size tau inflates the stationary variance by up to 1 / (1 - tau / 2).
    grid = log_linear_grid(HIGH, 0.02, 600)
    _, error = errors(functools.partial(predictor_corrector, tau=0.1), grid, moments)
    _, smaller = errors(functools.partial(predictor_corrector, tau=0.02), grid, moments)
    assert smaller < 0.01
    assert smaller < error < 0.06


def test_predictor_without_corrector_is_ddim(moments: Moments) -> None:
    grid = log_linear_grid(HIGH, LOW, 12)
    without = functools.partial(predictor_corrector, corrections=0)
    assert errors(without, grid, moments) == errors(ddim, grid, moments)


def test_first_order_steps_of_the_solver_are_ddpm_and_ddim(moments: Moments) -> None:
    grid = log_linear_grid(
        HIGH, LOW, 2
    )  # With two calls, the solver never has an earlier estimate to use.
    assert errors(dpm_solver, grid, moments) == pytest.approx(errors(ddpm, grid, moments))
    ode = functools.partial(dpm_solver, stochastic=False)
    assert errors(ode, grid, moments) == pytest.approx(errors(ddim, grid, moments))


@pytest.mark.parametrize("name", [*SAMPLERS, "predictor_corrector"])
def test_calls_and_levels(name: str) -> None:
    sampler = SAMPLERS[name][0] if name in SAMPLERS else predictor_corrector
    levels = []

    def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
        assert x_t.shape == (2, 3)
        assert sigma.shape == (1,)
        levels.append(float(sigma))
        return x_t.new_full(x_t.shape, 7.0)

    grid = log_linear_grid(10.0, 0.1, 5)
    x = sampler(denoise, sigmas=grid, noise=SampleNoise([1, 2]), shape=(3,))
    torch.testing.assert_close(x, torch.full((2, 3), 7.0))  # The last step returns the estimate.
    once = [pytest.approx(float(s)) for s in grid[:-1]]
    if name in ("heun", "predictor_corrector"):
        assert levels == sorted([*once, *once[1:]], key=lambda s: -s.expected)
    else:
        assert levels == once


@pytest.mark.parametrize("name", [*SAMPLERS, "predictor_corrector"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    sampler = SAMPLERS[name][0] if name in SAMPLERS else predictor_corrector

    def draw(seeds: list[int]) -> Tensor:
        noise = SampleNoise(seeds, dtype=torch.float64)
        grid = log_linear_grid(HIGH, LOW, 40)
        return sampler(PRIOR.denoise, sigmas=grid, noise=noise, shape=(3,))

    torch.testing.assert_close(draw([3, 1, 4, 15])[2:3], draw([4]), rtol=1e-10, atol=1e-10)


def test_samples_of_a_whole_run_have_the_target_s_moments() -> None:
    n = 4000
    noise = SampleNoise(range(n), dtype=torch.float64)
    x = ddpm(PRIOR.denoise, sigmas=log_linear_grid(HIGH, LOW, 256), noise=noise, shape=(3,))
    # 5 standard errors, and the biases of the start (|mean| / 50) and of 256 steps
    # (`test_convergence`: below 5 %).
    spread = VARIANCE.sqrt()
    assert ((x.mean(0) - MEAN).abs() < 5 * spread / math.sqrt(n) + MEAN.abs() / HIGH).all()
    assert ((x.var(0) / VARIANCE - 1).abs() < 5 * math.sqrt(2 / n) + 0.05).all()
    correlation = torch.corrcoef(x.mT) - torch.eye(3, dtype=torch.float64)
    assert (correlation.abs() < 5 / math.sqrt(n)).all()


@pytest.mark.parametrize("grid", [[1.0], [1.0, 2.0], [1.0, 1.0, 0.0], [1.0, -0.5]])
def test_grids_that_do_not_fall_are_refused(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="give at least two"):
        ddpm(
            PRIOR.denoise,
            sigmas=torch.tensor(grid, dtype=torch.float64),
            noise=SampleNoise([0], dtype=torch.float64),
            shape=(3,),
        )


def test_bad_corrector() -> None:
    with pytest.raises(ValueError, match=r"1 corrections with tau 2\.0"):
        predictor_corrector(
            PRIOR.denoise,
            sigmas=log_linear_grid(HIGH, LOW, 4),
            noise=SampleNoise([0], dtype=torch.float64),
            shape=(3,),
            tau=2.0,
        )
