"""Schedules: both are maps between time and noise level that the times agree with."""

import pytest
import torch

from diffem_core import (
    BetaMixtureTime,
    BetaTime,
    LogNormalTime,
    Schedule,
    TimeDistribution,
    UniformTime,
    VEKarras,
    VELogLinear,
)

SCHEDULES: dict[str, Schedule] = {
    "log_linear": VELogLinear(sigma_min=2e-3, sigma_max=80.0),
    "karras": VEKarras(),
    "karras_flat": VEKarras(sigma_min=0.01, sigma_max=10.0, rho=1.0),
    "karras_steep": VEKarras(sigma_min=1e-3, sigma_max=1e2, rho=30.0),
}
TIMES: dict[str, TimeDistribution] = {
    "uniform": UniformTime(),
    "beta": BetaTime(),
    "mixture": BetaMixtureTime(),
    "log_normal": LogNormalTime(),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_round_trip_and_ends(name: str) -> None:
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = schedule.sigma(t)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(schedule.t(sigma), t, rtol=1e-12, atol=1e-12)
    ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
    torch.testing.assert_close(sigma[[0, -1]], ends, rtol=1e-13, atol=0)
    torch.testing.assert_close(schedule.t(ends), t[[0, -1]], rtol=0, atol=1e-14)
    # Training works in float32, where an error of one in 2^24 in the root grows by rho.
    torch.testing.assert_close(
        schedule.sigma(t[[0, -1]].float()), ends.float(), rtol=100 / 2**24, atol=0
    )


def test_karras_is_the_paper_s_grid() -> None:
    # EDM, equation 5: sigma_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho.
    steps, rho, low, high = 18, 7.0, 0.002, 80.0
    grid = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ]
    t = torch.linspace(1, 0, steps, dtype=torch.float64)
    torch.testing.assert_close(
        VEKarras().sigma(t), torch.tensor(grid, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_a_large_root_is_a_logarithm() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    # The difference is of the order of (log sigma)^2 / rho.
    torch.testing.assert_close(
        VEKarras(rho=1e6).sigma(t), SCHEDULES["log_linear"].sigma(t), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("times", TIMES)
def test_times_work_with_every_schedule(times: str, schedule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    t = TIMES[times].sample(1000, schedule=SCHEDULES[schedule], generator=generator)
    assert t.shape == (1000,)
    assert t.dtype == torch.float32
    assert ((t >= 0) & (t <= 1)).all()
    assert t.std() > 0.01


def test_log_normal_times_mean_the_same_noise_under_either_schedule() -> None:
    drawn = []
    for schedule in (VELogLinear(sigma_min=2e-3, sigma_max=80.0), VEKarras()):
        generator = torch.Generator().manual_seed(0)
        t = LogNormalTime().sample(4000, schedule=schedule, generator=generator)
        drawn.append(schedule.sigma(t).log())
    # The same uniforms give the same sigma, but for the rounding of t to float32: 2^-24 times
    # d log sigma / dt, which is at most 7 (80^(1/7) - 0.002^(1/7)) / 0.002^(1/7) < 30, and that of
    # the schedule itself, of the same order.
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=4 * 30 / 2**24)
    # And they are N(-1.2, 1.2^2): 4000 stratified draws are closer than independent ones.
    assert abs(float(drawn[1].mean()) + 1.2) < 5 * 1.2 / 4000**0.5
    assert abs(float(drawn[1].std()) - 1.2) < 5 * 1.2 / 8000**0.5


def test_bad_schedules() -> None:
    for build in (VELogLinear, VEKarras):
        with pytest.raises(ValueError, match=r"sigma_min 2\.0 and sigma_max 1\.0; give 0 <"):
            build(sigma_min=2.0, sigma_max=1.0)
        with pytest.raises(ValueError, match=r"sigma_min 0 and sigma_max 1\.0; give 0 <"):
            build(sigma_min=0, sigma_max=1.0)
    with pytest.raises(ValueError, match=r"rho 0; give a positive number"):
        VEKarras(rho=0)
