"""Tests of two sets of observations: they hold their level, and see what they should."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffem_core import (
    Measurement,
    PrincipalComponents,
    area_under_curve,
    classifier_test,
    energy_test,
    frechet_distance,
    frechet_test,
    mmd_test,
    observation_features,
)
from diffem_core.channel import RandomMask, RandomMatrix
from diffem_core.feature_distance import _distances_of
from diffem_core.gaussian_condition import GaussianMeanChannel
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.measurement import block_jackknife
from diffem_core.two_sample import permuted_labels
from tests.core.planted import (
    KEEP,
    NOISE,
    SCALING,
    SHAPE,
    clean,
    collapsed,
    features,
    most_alarms,
    observe,
)

Test = Callable[[Tensor, Tensor, int], Measurement]


def energy(a: Tensor, b: Tensor, seed: int) -> Measurement:
    return energy_test(a, b, permutations=99, seed=seed)


def mmd(a: Tensor, b: Tensor, seed: int) -> Measurement:
    return mmd_test(a, b, permutations=99, seed=seed)


def frechet(a: Tensor, b: Tensor, seed: int) -> Measurement:
    principal = PrincipalComponents.fit(features(observe(clean(400, 77), 78)), 12)
    return frechet_test(principal(a), principal(b), permutations=99, seed=seed)


def logistic(a: Tensor, b: Tensor, seed: int) -> Measurement:
    return classifier_test(a, b, seed=seed)


def mlp(a: Tensor, b: Tensor, seed: int) -> Measurement:
    return classifier_test(a, b, model="mlp", seed=seed)


TESTS: dict[str, Test] = {"energy": energy, "mmd": mmd, "frechet": frechet, "logistic": logistic}


@pytest.mark.parametrize("name", TESTS)
def test_without_a_fault_alarms_come_at_their_level(name: str) -> None:
    # Reconstructions of the right distribution, re-corrupted by the true channel. Each p-value is
    # at most 0.1 with a probability of at most 0.1: of 120 trials, more than 26 alarms come with a
    # probability below 1e-4.
    trials, level = 120, 0.1
    p_values = []
    for seed in range(trials):
        real = features(observe(clean(80, 3 * seed + 100), seed))
        made = features(observe(clean(100, 3 * seed + 101), seed + 5000))
        p_value = TESTS[name](real, made, seed).p_value
        assert p_value is not None
        p_values.append(p_value)
    assert sum(p <= level for p in p_values) <= most_alarms(trials, level)
    # And they are no constant that never alarms.
    assert min(p_values) < 0.25
    assert max(p_values) > 0.75


FAULTS: dict[str, Callable[[int], Tensor]] = {
    "collapse": lambda seed: features(observe(collapsed(400, 3, seed), seed)),
    "noise": lambda seed: features(observe(clean(400, seed), seed, noise=3 * NOISE)),
    "mask": lambda seed: features(observe(clean(400, seed), seed, keep=KEEP - 0.15)),
}


# Not the mask rate for the small network: of 300 images it learns too little of it.
@pytest.mark.parametrize(
    ("name", "fault"),
    [*((n, f) for n in TESTS for f in FAULTS), ("mlp", "collapse"), ("mlp", "noise")],
)
def test_a_planted_fault_is_seen(name: str, fault: str) -> None:
    test = {**TESTS, "mlp": mlp}[name]
    real = features(observe(clean(300, 1), 2))
    other = features(observe(clean(400, 3), 4))
    floor = test(real, other, 0)
    wrong = test(real, FAULTS[fault](5), 0)
    assert floor.value is not None
    assert floor.p_value is not None
    assert wrong.value is not None
    assert wrong.p_value is not None
    assert wrong.p_value <= 0.01
    assert floor.p_value > 0.01
    assert wrong.value > floor.value


def test_the_energy_distance_is_its_definition_and_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(15, 4, generator=generator)
    b = torch.randn(20, 4, generator=generator) + 1
    within = [torch.pdist(v.double()).mean() for v in (a, b)]
    between = torch.cdist(a.double(), b.double()).mean()
    assert energy_test(a, b, seed=0).value == pytest.approx(
        float(2 * between - within[0] - within[1])
    )
    # Unbiased: over 200 pairs of sets of one distribution its mean is 0 within 4 standard errors.
    values = torch.tensor(
        [
            energy_test(
                *torch.randn(2, 12, 2, generator=generator).unbind(0), permutations=1, seed=0
            ).value
            for _ in range(200)
        ]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(200)


def test_the_jackknife_error_is_that_of_repetitions() -> None:
    # Shifted by 1 in 3 dimensions; 150 repetitions know a standard deviation to 6 %, jackknives of
    # 60 are off by some more each, their mean by little: 25 %.
    generator = torch.Generator().manual_seed(1)
    for test in (energy_test, mmd_test):
        found = [
            test(
                torch.randn(60, 3, generator=generator),
                torch.randn(60, 3, generator=generator) + 1,
                permutations=1,
                seed=0,
            )
            for _ in range(150)
        ]
        spread = float(torch.tensor([m.value for m in found]).std())
        errors = float(torch.tensor([m.standard_error for m in found]).mean())
        assert errors == pytest.approx(spread, rel=0.25)


def test_the_jackknife_leaves_out_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(12, 3, generator=generator), torch.randn(14, 3, generator=generator) + 0.5

    def left_out(rows: Tensor, other: Tensor) -> float:
        values = [
            energy_test(torch.cat([rows[:i], rows[i + 1 :]]), other, permutations=1, seed=0).value
            for i in range(len(rows))
        ]
        return (len(rows) - 1) * float(torch.tensor(values).double().var(correction=0))

    expected = math.sqrt(left_out(a, b) + left_out(b, a))
    error = energy_test(a, b, permutations=1, seed=0).standard_error
    assert error == pytest.approx(expected, rel=1e-4)


def test_the_intervals_hold_the_mean_of_repetitions() -> None:
    # The expected energy distance, from all repetitions; 95 % intervals miss it 5 % of the time:
    # of 150, more than 18 times with a probability below 1e-4.
    generator = torch.Generator().manual_seed(2)
    found = [
        energy_test(
            torch.randn(60, 3, generator=generator),
            torch.randn(60, 3, generator=generator) + 1,
            permutations=1,
            seed=0,
        )
        for _ in range(150)
    ]
    mean = float(torch.tensor([m.value for m in found]).mean())
    missed = sum(not m.interval[0] <= mean <= m.interval[1] for m in found if m.interval)
    assert missed <= most_alarms(150, 0.05)


def test_mmd_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(14, 3, generator=generator), torch.randn(11, 3, generator=generator) * 2
    pooled = torch.cat([a, b]).double()
    width = float(torch.pdist(pooled).median())

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(u.double(), v.double()).square() / (2 * (0.5 * width) ** 2))

    within = [(kernel(v, v).sum() - len(v)) / (len(v) * (len(v) - 1)) for v in (a, b)]
    expected = float(within[0] + within[1] - 2 * kernel(a, b).mean())
    # torch's median of an even number of distances is the lower middle one, of both lists alike.
    assert mmd_test(a, b, bandwidth=0.5, seed=0).value == pytest.approx(expected)
    with pytest.raises(ValueError, match="a positive number"):
        mmd_test(a, b, bandwidth=0.0, seed=0)


def test_permutations_deal_as_many_and_begin_with_the_deal_as_it_is() -> None:
    labels = permuted_labels(5, 7, permutations=50, seed=3)
    assert labels[0].tolist() == [1] * 5 + [0] * 7
    assert labels.sum(1).tolist() == [5] * 51
    assert len({tuple(row) for row in labels.tolist()}) > 40


def test_the_permuted_frechet_distances_are_the_distance_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = permuted_labels(15, 25, permutations=5, seed=0)
    expected = [frechet_distance(rows[deal > 0], rows[deal == 0]) for deal in labels]
    ratio = (_distances_of(labels, rows) / torch.tensor(expected, dtype=torch.float64)).tolist()
    assert ratio == pytest.approx([ratio[0]] * 6, rel=1e-6)


def test_principal_components_are_white_where_they_were_fitted() -> None:
    x = features(observe(clean(300, 1), 2))
    principal = PrincipalComponents.fit(x, 8)
    torch.testing.assert_close(torch.cov(principal(x).mT), torch.eye(8, dtype=torch.float64))
    # A direction without variance is no component.
    flat = torch.cat([x[:, :2], torch.ones(300, 3)], dim=1)
    assert PrincipalComponents.fit(flat, 5).directions.shape == (5, 2)
    with pytest.raises(ValueError, match="at least 2 vectors"):
        PrincipalComponents.fit(x[:1], 2)


def test_the_area_under_the_curve_and_its_error() -> None:
    area, error = area_under_curve(np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0]))
    assert area == pytest.approx((1 + 1.5 + 2) / 6)  # 1 > 0; 2 > 0, 2 = 2; 3 > 0, 3 > 2
    # Normal scores one apart: the error against that of 400 repetitions, known to 3.5 %.
    rng = np.random.default_rng(0)
    found = [
        area_under_curve(rng.standard_normal(40) + 1, rng.standard_normal(60)) for _ in range(400)
    ]
    spread = float(np.std([a for a, _ in found]))
    assert float(np.mean([e for _, e in found])) == pytest.approx(spread, rel=0.15)
    assert error > 0


def test_the_classifier_repeats_itself_and_the_seed_deals_the_halves() -> None:
    a, b = features(observe(clean(60, 1), 2)), features(observe(clean(60, 3), 4, noise=0.6))
    torch.manual_seed(0)
    first = classifier_test(a, b, model="mlp", seed=1)
    torch.manual_seed(1)
    assert classifier_test(a, b, model="mlp", seed=1) == first
    assert classifier_test(a, b, model="mlp", seed=2) != first


@pytest.mark.parametrize("name", TESTS)
def test_too_few_or_constant_observations_are_left_out_with_the_reason(name: str) -> None:
    x = features(observe(clean(100, 1), 2))
    few = TESTS[name](x[:5], x[5:], 0)
    assert few.value is None
    assert few.reason is not None
    assert "raise data.holdout" in few.reason
    same = torch.ones(60, 36)
    found = TESTS[name](same, same, 0)
    assert found.value is None
    assert found.reason is not None
    assert "is the same" in found.reason
    # One side alone that is constant is a difference, not a missing number.
    assert TESTS[name](x, x[:1].expand(60, -1), 0).value is not None


def test_a_measurement_is_a_number_or_a_reason() -> None:
    with pytest.raises(ValueError, match="give one"):
        Measurement(value=None)
    with pytest.raises(ValueError, match="give one"):
        Measurement(value=1.0, reason="both")
    with pytest.raises(ValueError, match="not all of them finite"):
        Measurement(value=1.0, standard_error=math.nan)


def test_the_block_jackknife_is_that_of_a_difference_of_means() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(320, generator=generator), 2 * torch.randn(640, generator=generator)
    error, degrees = block_jackknife(lambda u, v: float(u.mean() - v.mean()), a, b)
    # 15 degrees of freedom: a relative error of 1/sqrt(30) = 18 %, three times.
    assert error == pytest.approx(math.sqrt(1 / 320 + 4 / 640), rel=0.55)
    assert degrees == 15


def test_what_is_compared_leaves_maps_of_parameters_out() -> None:
    x = clean(8, 0)
    y, params = observe(x, 1)
    channel = RandomMask(SHAPE, keep=KEEP, noise_std=NOISE)
    seen = observation_features(channel, SCALING, y, params)
    torch.testing.assert_close(seen, y)
    prior = GaussianPrior(
        mean=torch.zeros(36).double(), factor=torch.eye(36).double(), diag=torch.zeros(36).double()
    )
    wrapped = GaussianMeanChannel(channel, prior)
    assert torch.equal(observation_features(wrapped, SCALING, y, params), seen)
    matrices = RandomMatrix(5, rows=2, noise_std=0.1)
    generator = torch.Generator().manual_seed(0)
    drawn = matrices.draw_params(4, generator=generator)
    y = matrices.corrupt(torch.randn(4, 5, generator=generator), drawn, generator=generator)
    assert observation_features(matrices, SCALING, y, drawn).shape == (4, 2 + 10 + 5)
