"""Residuals, diversity and calibration, on posteriors that are known in closed form."""

import math

import pytest
import torch
from torch import Tensor

from diffem_core import (
    Measurement,
    calibration,
    collapse_verdict,
    draw_spread,
    hide_more,
    nearest_neighbours,
    participation_ratio,
    predictive_test,
    rank_positions,
    residual_test,
    uncovered_test,
)
from diffem_core.channel import Channel, RandomMask
from diffem_core.gaussian import GaussianPosterior
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.physics_channels import accelerated_mri, denoising, gaussian_blur, poisson
from tests.core.planted import KEEP, NOISE, SHAPE, clean, collapsed, most_alarms, observe

CHANNEL = RandomMask(SHAPE, keep=KEEP, noise_std=NOISE)


def true_prior(width: float = 1.0) -> GaussianPrior:
    """The prior of `clean`, or one that is narrower or wider."""
    x = clean(3, 1).flatten(1).double()
    # Three images span what all images lie in: x = B w.
    basis = torch.randn(3, 36, generator=torch.Generator().manual_seed(0)) / math.sqrt(3)
    assert torch.linalg.matrix_rank(torch.cat([basis.double(), x]), tol=1e-4) == 3
    return GaussianPrior(
        mean=torch.zeros(36, dtype=torch.float64),
        factor=width * basis.mT.double(),
        diag=torch.full((36,), 1e-6, dtype=torch.float64),
    )


def draw(
    y: Tensor, params: dict[str, Tensor], *, draws: int, seed: int, width: float = 1.0
) -> Tensor:
    """Draw exact posterior samples, under the true prior or another."""
    posterior = GaussianPosterior(true_prior(width), CHANNEL)
    n = len(y)
    return torch.stack(
        [
            posterior.sample(y, params, seeds=range(seed + s * n, seed + (s + 1) * n)).float()
            for s in range(draws)
        ]
    )


def test_residuals_of_the_true_posterior_alarm_at_their_level() -> None:
    trials, level = 120, 0.1
    residual, predictive = [], []
    for seed in range(trials):
        y, params = observe(clean(40, seed + 500), seed)
        x_hat = draw(y, params, draws=2, seed=10**6 * (seed + 1))
        for found, values in (
            (residual_test(CHANNEL, x_hat, y, params), residual),
            (predictive_test(CHANNEL, x_hat, y, params, seed=seed + 777_000), predictive),
        ):
            assert found.p_value is not None
            values.append(found.p_value)
    for values in (residual, predictive):
        # Student's test of 40 skewed values: its level is 0.1 up to a percent or so.
        assert sum(p <= level for p in values) <= most_alarms(trials, level + 0.02)
        assert max(values) > 0.75


def test_a_wrong_noise_level_is_seen_and_how_far_it_is_off() -> None:
    # The observations have 1.5 times the noise that the channel says. Of 36 x 0.6 seen entries,
    # three directions are fitted to the noise, the others keep it: between 1.5^2 and a bit less.
    y, params = observe(clean(200, 1), 2, noise=1.5 * NOISE)
    x_hat = draw(y, params, draws=2, seed=0)
    found = residual_test(CHANNEL, x_hat, y, params)
    assert found.value is not None
    assert 1.8 < found.value < 2.3
    assert found.p_value is not None
    assert found.p_value < 1e-6
    again = predictive_test(CHANNEL, x_hat, y, params, seed=0)
    assert again.value is not None
    assert again.value > 0.9
    assert again.interval is not None
    assert again.interval[0] > 0.5


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.0, 0.01), (0.6, 4.0, 6.0)])
def test_residuals_tell_a_copied_observation_from_one_that_is_ignored(
    shift: float, low: float, high: float
) -> None:
    x = clean(100, 1)
    y, params = observe(x, 2)
    x_hat = (y if shift == 0 else x + shift)[None]
    found = residual_test(CHANNEL, x_hat, y, params)
    assert found.value is not None
    # Ignored: 1 + (0.6 / 0.3)^2 = 5.
    assert low <= found.value < high


@pytest.mark.parametrize(
    "channel",
    [
        gaussian_blur(SHAPE, sigma=0.7, noise_std=0.5),
        accelerated_mri((6, 6), acceleration=2.0, noise_std=0.5),
    ],
)
def test_residuals_of_the_truth_are_chi_square_whatever_the_operator(channel: Channel) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, *channel.x_shape, generator=generator)
    params = channel.draw_params(300, generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    found = residual_test(channel, x[None], y, params)
    # Some 36 measured entries of 300: a relative error of sqrt(2 / 10800) = 1.4 %.
    assert found.value == pytest.approx(1, abs=4 * 0.014)


def test_residuals_are_left_out_where_they_say_nothing() -> None:
    x = torch.rand(50, *SHAPE)
    for channel, reason in (
        (poisson(SHAPE, gain=0.1), "not linear with Gaussian noise"),
        (denoising(SHAPE, noise_std=0.0), "no noise"),
    ):
        found = residual_test(channel, x[None], x, {})
        assert found.value is None
        assert found.reason is not None
        assert reason in found.reason
    channel = denoising(SHAPE, noise_std=1.0)
    few = residual_test(channel, x[None, :5], x[:5], {})
    assert few.reason is not None
    assert "raise data.holdout" in few.reason
    ties = predictive_test(denoising(SHAPE, noise_std=0.0), x[None], x, {}, seed=0)
    assert ties.reason is not None


def test_the_predictive_check_works_for_counts() -> None:
    channel = poisson(SHAPE, gain=0.5)
    generator = torch.Generator().manual_seed(0)
    x = 1 + 3 * torch.rand(300, *SHAPE, generator=generator)
    y = channel.corrupt(x, {}, generator=generator)
    # The truth is one of its own posterior's samples.
    right = predictive_test(channel, x[None], y, {}, seed=1)
    assert right.p_value is not None
    assert right.p_value > 0.01
    copied = predictive_test(channel, y[None], y, {}, seed=1)
    assert copied.value is not None
    assert copied.value < 0.05


# ------------------------------------------------------------------------------------- diversity


def uncovered(x_hat: Tensor, seed: int) -> Measurement:
    half = len(x_hat) // 2
    return uncovered_test(
        CHANNEL,
        x_hat[:half],
        held_out=observe(clean(60, seed + 30_000), seed),
        corrupted=observe(x_hat[half:], seed + 1),
    )


def test_diverse_reconstructions_alarm_at_their_level() -> None:
    trials, level = 100, 0.1
    p_values, warnings = [], 0
    for seed in range(trials):
        x_hat = clean(120, seed + 900)
        found = uncovered(x_hat, seed)
        assert found.p_value is not None
        p_values.append(found.p_value)
        warnings += collapse_verdict(
            uncovered=found,
            participation=participation_ratio(x_hat),
            start=participation_ratio(clean(120, seed + 5000)),
        ).warn
    assert sum(p <= level for p in p_values) <= most_alarms(trials, level)
    assert max(p_values) > 0.75
    # 0.5 is five standard errors (of 0.053) from the border: a warning has a probability of 1e-5.
    assert warnings == 0


@pytest.mark.parametrize("images", [2, 5, 10])
def test_a_collapse_to_few_images_is_warned_of(images: int) -> None:
    start = participation_ratio(clean(200, 1))
    for seed in range(5):
        x_hat = collapsed(200, images, seed)
        found = uncovered(x_hat, seed)
        verdict = collapse_verdict(
            uncovered=found, participation=participation_ratio(x_hat), start=start
        )
        assert verdict.warn, verdict
        assert "held-out observations are farther" in verdict.reason
        assert float(nearest_neighbours(x_hat).median()) < 0.5 * float(
            nearest_neighbours(clean(200, 1)).median()
        )


def test_a_collapse_of_the_covariance_is_warned_of() -> None:
    x = clean(200, 1)
    direction = clean(1, 7)
    flat = torch.randn(200, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * direction
    nothing = Measurement.left_out("too few")
    verdict = collapse_verdict(
        uncovered=nothing, participation=participation_ratio(flat), start=participation_ratio(x)
    )
    assert verdict.warn
    assert "directions" in verdict.reason
    unknown = collapse_verdict(
        uncovered=nothing, participation=participation_ratio(flat), start=None
    )
    assert not unknown.warn
    assert "nothing is known" in unknown.reason


def test_the_participation_ratio_counts_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 6, generator=generator)
    assert participation_ratio(z).value == pytest.approx(6, rel=0.02)
    assert participation_ratio(z * torch.tensor([1.0, 1, 1, 0, 0, 0])).value == pytest.approx(
        3, rel=0.02
    )
    # Variances 4, 1: 25 / 17.
    two = participation_ratio(z[:, :2] * torch.tensor([2.0, 1.0]))
    assert two.value == pytest.approx(25 / 17, rel=0.05)
    # More entries than samples: the same number from the smaller matrix.
    wide = torch.randn(30, 100, generator=generator).double()
    covariance = torch.cov(wide.mT)
    expected = float(covariance.trace() ** 2 / covariance.square().sum())
    assert participation_ratio(wide).value == pytest.approx(expected)
    assert participation_ratio(torch.ones(50, 4)).reason == "every reconstruction is the same"
    assert participation_ratio(z[:5]).value is None


def test_neighbours_and_spread() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])
    # Root mean square distance: sqrt((2 x 25 + 2 x 25 + 0) / 6).
    expected = torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64) / math.sqrt(100 / 6)
    torch.testing.assert_close(nearest_neighbours(x), expected)
    assert nearest_neighbours(torch.ones(4, 2)).tolist() == [0] * 4
    generator = torch.Generator().manual_seed(0)
    center = 3 * torch.randn(1, 400, 5, generator=generator)
    draws = center + torch.randn(6, 400, 5, generator=generator)
    found = draw_spread(draws)
    assert found.value == pytest.approx(1 / 10, rel=0.1)
    assert draw_spread(center.expand(3, -1, -1)).value == 0
    assert draw_spread(draws[:1]).value is None


# ----------------------------------------------------------------------------------- calibration


def normal_case(seed: int, *, spread: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Truth and samples of one posterior per image, whose 8 entries go together."""
    generator = torch.Generator().manual_seed(seed)
    mean, width = torch.randn(2, 80, 1, generator=generator)

    def sample(*shape: int) -> Tensor:
        shared = torch.randn(*shape, 1, generator=generator)
        return 0.8 * shared + 0.6 * torch.randn(*shape, 8, generator=generator)

    truth = mean + width.exp() * sample(80)
    return mean + shift + width.exp() * spread * sample(5, 80), truth


def test_calibrated_samples_alarm_at_their_level_though_entries_go_together() -> None:
    trials, level = 200, 0.1
    alarms: dict[str, int] = {"ranks": 0, "0.5": 0, "0.9": 0}
    for seed in range(trials):
        found = calibration(*normal_case(seed), seed=seed + 777_000)
        for name, measured in (
            ("ranks", found.ranks),
            *((str(level), m) for level, m in found.coverage.items()),
        ):
            assert measured.p_value is not None
            alarms[name] += measured.p_value <= level
    # Hotelling's and Student's tests of 80 values that are not normal: 0.1 up to some percent.
    for name, count in alarms.items():
        assert count <= most_alarms(trials, level + 0.04), name
        assert count > 0, name


@pytest.mark.parametrize(
    ("case", "dispersion", "coverage"),
    [
        ({"spread": 0.4}, (1.2, 3.0), (0.0, 0.45)),
        ({"spread": 2.5}, (0.2, 0.8), (0.55, 1.0)),
    ],
)
def test_samples_that_are_too_sure_or_too_wide_are_told_apart(
    case: dict[str, float],
    dispersion: tuple[float, float],
    coverage: tuple[float, float],
) -> None:
    found = calibration(*normal_case(0, **case), seed=0)
    assert found.ranks.value is not None
    assert dispersion[0] < found.ranks.value < dispersion[1]
    assert found.ranks.p_value is not None
    assert found.ranks.p_value < 1e-3
    half = found.coverage[0.5].value
    assert half is not None
    assert coverage[0] < half < coverage[1]


def test_a_bias_bends_the_histogram() -> None:
    found = calibration(*normal_case(0, shift=2.0), seed=0)
    assert found.ranks.p_value is not None
    assert found.ranks.p_value < 1e-3
    bins = found.ranks.bins
    assert bins is not None
    assert len(bins) == 6
    assert sum(bins) == pytest.approx(1)
    assert bins[0] > 2 * bins[-1]
    # Samples that never vary: every rank at an end, and no division by zero.
    stuck = calibration(torch.full((4, 60, 3), 9.0), torch.zeros(60, 3), seed=0)
    assert stuck.ranks.p_value is not None
    assert stuck.ranks.p_value < 1e-6


def test_coverage_is_that_of_the_definition_and_has_a_map() -> None:
    # 19 samples and a truth in the middle of them, or outside.
    draws = torch.arange(1.0, 20.0)[:, None, None].expand(19, 100, 2)
    truth = torch.tensor([10.5, 25.0]).expand(100, 2)
    found = calibration(draws, truth, seed=0)
    assert found.coverage[0.5].value == 0.5
    assert found.coverage_maps[0.9].tolist() == [1.0, 0.0]
    counted = torch.tensor([True, False]).expand(100, 2)
    only = calibration(draws, truth, counted=counted, seed=0)
    assert only.coverage[0.9].value == 1.0
    assert calibration(draws[:, :5], truth[:5], seed=0).ranks.value is None
    with pytest.raises(ValueError, match=r"give \(S, n"):
        calibration(draws, truth[:5], seed=0)


def test_ties_are_broken_evenly() -> None:
    u = rank_positions(torch.zeros(3, 4000), torch.zeros(4000), seed=0)
    # Uniform: a mean of 1/2 within 4 / sqrt(12 x 4000).
    assert float(u.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(48_000))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1


def hidden_ranks(seed: int, *, width: float = 1.0, channel: Channel = CHANNEL) -> Measurement:
    """Hide a fifth of what is seen, and rank it among samples of the posterior under a prior."""
    y, params = observe(clean(60, seed + 40_000), seed)
    hidden = hide_more(channel, y, params, fraction=0.2, seed=seed + 777_000)
    assert hidden is not None
    fewer, fewer_params, where = hidden
    x_hat = draw(fewer, fewer_params, draws=4, seed=10**6 * (seed + 1), width=width)
    generator = torch.Generator().manual_seed(seed + 888_000)
    again = torch.stack([channel.corrupt(x, params, generator=generator) for x in x_hat])
    return calibration(again, y, counted=where, seed=seed + 999_000).ranks


def test_hidden_pixels_are_calibrated_under_the_true_posterior() -> None:
    trials, level = 100, 0.1
    p_values = [hidden_ranks(seed).p_value for seed in range(trials)]
    assert sum(p is not None and p <= level for p in p_values) <= most_alarms(trials, level + 0.04)
    assert max(p for p in p_values if p is not None) > 0.75


def test_hidden_pixels_tell_a_prior_that_is_too_narrow() -> None:
    found = hidden_ranks(0, width=0.15)
    assert found.value is not None
    assert found.p_value is not None
    assert found.p_value < 1e-3
    assert found.value > 1.1


def test_noise_blunts_the_ranks_of_hidden_pixels() -> None:
    # The same narrow prior where noise is all that is seen: nothing is noticed.
    loud = RandomMask(SHAPE, keep=KEEP, noise_std=20.0)
    y, params = observe(clean(60, 1), 2, noise=20.0)
    hidden = hide_more(loud, y, params, fraction=0.2, seed=0)
    assert hidden is not None
    generator = torch.Generator().manual_seed(0)
    nothing = torch.zeros(60, *SHAPE)
    again = torch.stack([loud.corrupt(nothing, params, generator=generator) for _ in range(4)])
    found = calibration(again, y, counted=hidden[2], seed=0).ranks
    assert found.p_value is not None
    assert found.p_value > 0.01


def test_hiding_more_hides_what_was_seen_and_nothing_else() -> None:
    y, params = observe(clean(400, 1), 2)
    hidden = hide_more(CHANNEL, y, params, fraction=0.25, seed=3)
    assert hidden is not None
    fewer, fewer_params, where = hidden
    seen = params["mask"].bool()
    assert not (where & ~seen).any()
    assert torch.equal(fewer_params["mask"].bool(), seen & ~where)
    assert torch.equal(fewer, torch.where(where, 0.0, y))
    # About 8,640 seen pixels: a share of 1/4 within 4 x 0.0047.
    assert float(where.sum() / seen.sum()) == pytest.approx(0.25, abs=0.019)
    assert hide_more(denoising(SHAPE, noise_std=1.0), y, {}, fraction=0.25, seed=3) is None
    with pytest.raises(ValueError, match=r"a number in \(0, 1\)"):
        hide_more(CHANNEL, y, params, fraction=1.0, seed=3)
