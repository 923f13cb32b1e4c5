"""Schedules, grids, training times, learning rates and seeds."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from diffem_core import (
    BetaMixtureTime,
    BetaTime,
    LogNormalTime,
    SampleNoise,
    TimeDistribution,
    UniformTime,
    VELogLinear,
    constant_rate,
    cosine_rate,
    derive_seed,
    karras_grid,
    linear_rate,
    log_linear_grid,
    seeded_initialization,
)


def test_grids_hit_their_ends_and_have_one_entry_per_call() -> None:
    for grid in (log_linear_grid(1e2, 1e-3, 16), karras_grid(1e2, 1e-3, 16)):
        assert grid.shape == (17,)
        assert grid.dtype == torch.float64
        assert (grid[0], grid[-2], grid[-1]) == (1e2, 1e-3, 0)
        assert (grid.diff() < 0).all()


def test_log_linear_grid_is_even_in_log_sigma() -> None:
    steps = log_linear_grid(1e2, 1e-3, 11)[:-1].log().diff()
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(1e-5) / 10))


def test_karras_grid_is_edm_equation_5() -> None:
    steps, rho, low, high = 8, 7.0, 0.002, 80.0
    expected = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ]
    grid = karras_grid(high, low, steps, rho=rho)
    torch.testing.assert_close(grid[:-1], torch.tensor(expected, dtype=torch.float64))


def test_a_grid_of_one_step_starts_at_the_largest_noise() -> None:
    assert log_linear_grid(1e2, 1e-3, 1).tolist() == [1e2, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1e-3, 1e2, 8), r"from 0.001 down to 100.0; give sigma_max > sigma_min > 0"),
        ((1.0, 1e-3, 0), "0 steps; give at least 1"),
    ],
)
def test_bad_grids(arguments: tuple[float, float, int], message: str) -> None:
    for grid in (log_linear_grid, karras_grid):
        with pytest.raises(ValueError, match=message):
            grid(*arguments)


def test_a_reversed_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sigma_min 100.0 and sigma_max 0.001"):
        VELogLinear(sigma_min=1e2, sigma_max=1e-3)


SCHEDULE = VELogLinear()
LOW, HIGH = (math.log(s) for s in (SCHEDULE.sigma_min, SCHEDULE.sigma_max))
DISTRIBUTIONS = {
    "uniform": (UniformTime(), stats.uniform()),
    "paper": (BetaTime(), stats.beta(3, 3)),
    "skewed": (BetaTime(a=0.5, b=2.0), stats.beta(0.5, 2.0)),
    "manifold": (BetaMixtureTime(weight=0.4), None),
    "edm": (
        LogNormalTime(),
        # In t, log sigma ~ N(-1.2, 1.2^2) is a normal distribution, truncated to [0, 1].
        stats.truncnorm(
            (LOW + 1.2) / 1.2,
            (HIGH + 1.2) / 1.2,
            loc=(-1.2 - LOW) / (HIGH - LOW),
            scale=1.2 / (HIGH - LOW),
        ),
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_times_have_the_stated_distribution(name: str) -> None:
    times, law = DISTRIBUTIONS[name]
    n = 4096
    t = times.sample(n, schedule=SCHEDULE, generator=torch.Generator().manual_seed(0))
    assert t.shape == (n,)
    assert t.dtype == torch.float32
    assert 0 <= float(t.min()) <= float(t.max()) <= 1
    # One draw in each of n strata: the empirical distribution function is within 1 / n of the true
    # one (and 1e-4 for the
    # table and float32), where independent draws would be off by 1 / sqrt(n).
    ordered = np.sort(t.double().numpy())
    if law is None:
        cdf = 0.4 * stats.beta(2, 5).cdf(ordered) + 0.6 * stats.beta(5, 2).cdf(ordered)
    else:
        cdf = law.cdf(ordered)
    distance = np.abs(cdf - (np.arange(n) + 0.5) / n).max()
    # (A mixture is stratified in each of its two parts.)
    assert distance < (0.5 if law is not None else 2.0) / n + 1e-4


def test_every_batch_covers_the_range_of_times() -> None:
    times: TimeDistribution = BetaTime()
    for seed in range(20):
        t = times.sample(16, schedule=SCHEDULE, generator=torch.Generator().manual_seed(seed))
        edges = torch.from_numpy(stats.beta(3, 3).ppf(np.linspace(0, 1, 17)))
        counts = torch.histogram(t.double(), edges).hist
        assert counts.tolist() == [1.0] * 16


def test_bad_mixture() -> None:
    with pytest.raises(ValueError, match=r"weight 1.0; give one in \(0, 1\)"):
        BetaMixtureTime(weight=1.0)


def test_a_log_normal_far_from_the_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 1e-6 of its mass"):
        LogNormalTime(mean=40.0).sample(8, schedule=SCHEDULE, generator=torch.Generator())


def test_learning_rates() -> None:
    assert constant_rate(2e-4)(12345) == 2e-4
    linear, cosine = (rate(1.0, floor=0.1, steps=101) for rate in (linear_rate, cosine_rate))
    for rate in (linear, cosine):
        assert rate(0) == pytest.approx(1.0)
        assert rate(50) == pytest.approx(0.55)
        assert rate(100) == pytest.approx(0.1)
        assert rate(1000) == pytest.approx(0.1)
    assert linear(25) == pytest.approx(0.775)
    assert cosine(25) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_a_rate_over_the_run_goes_on_where_the_last_m_step_ended() -> None:
    whole = cosine_rate(1e-3, floor=0.0, steps=300)
    third = cosine_rate(1e-3, floor=0.0, steps=300, offset=200)
    assert [third(k) for k in range(100)] == [whole(200 + k) for k in range(100)]


def test_bad_rates() -> None:
    with pytest.raises(ValueError, match=r"floor 1.5; give a fraction in \[0, 1\]"):
        linear_rate(1.0, floor=1.5, steps=10)


def test_seeds_are_the_same_in_every_process() -> None:
    code = "from diffem_core import derive_seed; print(derive_seed(7, 'e_step', 3, 42))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(other.stdout) == derive_seed(7, "e_step", 3, 42) == 1890673420167484376


def test_seeds_tell_their_parts_apart() -> None:
    parts = [(1, 23), (12, 3), ("1", 23), (1, "23"), ("1,23",), (1, 2, 3), (123,), ("123",)]
    seeds = {derive_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= s < 2**63 for s in seeds)
    with pytest.raises(ValueError, match="no parts"):
        derive_seed()


def test_seeded_initialization_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded_initialization(1):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded_initialization(1):
        assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("shape", [(1, 8, 8), (5,), (3, 64, 64), ()])
def test_noise_belongs_to_the_sample(shape: tuple[int, ...]) -> None:
    seeds = [derive_seed("noise", i) for i in range(6)]
    together = SampleNoise(seeds)
    alone = SampleNoise(seeds[4:5])
    draws = 40
    for k in range(draws):
        a, b = together.normal(shape), alone.normal(shape)
        assert a.shape == (6, *shape)
        assert torch.equal(a[4], b[0]), f"draw {k} depends on the batch"


def test_whole_sixteens_of_values_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    """What `SampleNoise` makes use of on a GPU, where it draws in larger blocks."""
    for dtype in (torch.float32, torch.float64):
        few, all_ = (torch.Generator().manual_seed(8) for _ in range(2))
        expected = torch.empty(6 * 48, dtype=dtype).normal_(generator=all_)
        blocks = [torch.empty(size * 48, dtype=dtype) for size in (1, 2, 3)]
        found = torch.cat([block.normal_(generator=few) for block in blocks])
        assert torch.equal(found, expected)


def test_noise_is_standard_normal_and_fresh() -> None:
    noise = SampleNoise(range(200))
    z = torch.stack([noise.normal((4, 4)) for _ in range(100)]).double()
    # 320,000 values: 5 standard errors of mean, variance and of the correlation between
    # consecutive draws and samples.
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z[1:] * z[:-1]).mean())) < 5 / math.sqrt(n * 0.99)
    assert abs(float((z[:, 1:] * z[:, :-1]).mean())) < 5 / math.sqrt(n * 0.99)
