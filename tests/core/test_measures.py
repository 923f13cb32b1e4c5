"""Metrics, the classifier and the monitor."""

import math

import numpy as np
import ot
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from diffem_core import (
    DigitClassifier,
    RandomMask,
    Scaling,
    frechet_distance,
    masked_rmse,
    observation_divergence,
    psnr,
    rmse,
    sinkhorn_divergence,
    sliced_wasserstein,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_errors() -> None:
    x = torch.zeros(2, 1, 2, 2)
    x_hat = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 0.0]]]])
    assert rmse(x_hat, x) == pytest.approx(math.sqrt(34 / 8))
    assert masked_rmse(x_hat, x, mask) == pytest.approx((math.sqrt(29 / 3), 1.0))
    expected = [10 * math.log10(16**2 / 7.5), 10 * math.log10(16**2 / 1.0)]
    assert psnr(x_hat, x, data_range=16.0) == pytest.approx(sum(expected) / 2)
    with pytest.raises(ValueError, match="they must agree"):
        rmse(x_hat, x[:1])


def test_masked_errors_count_every_band() -> None:
    x = torch.zeros(1, 3, 1, 2)
    x_hat = torch.tensor([1.0, 2.0]).expand(1, 3, 1, 2)
    assert masked_rmse(x_hat, x, torch.tensor([[[[0.0, 1.0]]]])) == pytest.approx((1.0, 2.0))


def test_frechet_distance_of_gaussians() -> None:
    # Whitened samples have the moments exactly: N(m, S) against N(0, I) in closed form.
    z = randn(500, 3)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.mT))).mT
    root = torch.diag(torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64))
    m = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    expected = 2.0 + (2 - 1) ** 2 + (0.5 - 1) ** 2
    assert frechet_distance(z, z @ root + m) == pytest.approx(expected)
    assert frechet_distance(z, z) == pytest.approx(0.0, abs=1e-9)
    # It is symmetric and blind to rotations of both, also where covariances do not commute.
    rotation = torch.linalg.qr(randn(3, 3, seed=1)).Q
    a, b = z @ root @ rotation, z @ torch.diag(m.abs() + 0.3)
    there = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(there)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(there)
    with pytest.raises(ValueError, match="at least two rows"):
        frechet_distance(z[:1], z)


def test_sliced_wasserstein() -> None:
    a = randn(300, 4)
    shift = torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert sliced_wasserstein(a, a) == 0
    # A shift s moves every projection by <s, d>; the mean of its square over directions is |s|^2 /
    # D (here within 10 %).
    moved = sliced_wasserstein(a, a + shift, projections=4000)
    assert moved == pytest.approx(math.sqrt(9 / 4), rel=0.1)
    assert sliced_wasserstein(a, (a + shift).flip(0), projections=4000) == pytest.approx(moved)
    with pytest.raises(ValueError, match="as many vectors on both"):
        sliced_wasserstein(a, a[:10])


def entropic_cost(u: Tensor, v: Tensor, regularization: float) -> float:
    """Return POT's cost with the entropy relative to the product of the marginals."""
    M = ot.dist(u.numpy(), v.numpy())
    uniform = [np.full(len(w), 1 / len(w)) for w in (u, v)]
    plan = ot.sinkhorn(
        *uniform, M, regularization, method="sinkhorn_log", numItermax=20000, stopThr=1e-7
    )
    entropy = (plan * np.log(plan * plan.size + 1e-300)).sum()
    return float((plan * M).sum() + regularization * entropy)


@pytest.mark.parametrize("regularization", [2.0, 0.5])
def test_sinkhorn_divergence_is_pot_s(regularization: float) -> None:
    a, b = randn(60, 2), randn(50, 2, seed=1) * 0.5 + 1
    cross, own_a, own_b = (entropic_cost(*p, regularization) for p in ((a, b), (a, a), (b, b)))
    ours = sinkhorn_divergence(a, b, regularization=regularization, iterations=3000)
    assert ours == pytest.approx(cross - 0.5 * (own_a + own_b), rel=1e-3)


def test_sinkhorn_divergence_at_little_regularization_is_optimal_transport() -> None:
    a, b = randn(200, 3), randn(200, 3, seed=1) + 1
    exact = ot.emd2([], [], ot.dist(a.numpy(), b.numpy()))
    assert sinkhorn_divergence(a, b, regularization=1e-3) == pytest.approx(exact, rel=0.01)
    assert abs(sinkhorn_divergence(a, a.flip(0), regularization=1e-3)) < 1e-4 * exact


def test_sinkhorn_divergence_of_a_shift_is_its_square() -> None:
    a = randn(150, 2)
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert sinkhorn_divergence(a, a + shift, regularization=0.05) == pytest.approx(0.25, rel=1e-2)
    with pytest.raises(ValueError, match="a positive regularization"):
        sinkhorn_divergence(a, a, regularization=0.0)
    with pytest.raises(ValueError, match=r"\(n, D\) and \(m, D\)"):
        sinkhorn_divergence(a, randn(5, 3))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1), torch.from_numpy(data.target)


def test_the_classifier_learns_and_repeats_itself(digits: tuple[Tensor, Tensor]) -> None:
    x, labels = digits
    settings = {"scaling": Scaling.from_range(0, 16), "seed": 3, "epochs": 6}
    torch.manual_seed(1)
    model = DigitClassifier.fit(x[:1000], labels[:1000], **settings)
    torch.manual_seed(2)
    again = DigitClassifier.fit(x[:1000], labels[:1000], **settings)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert model.accuracy(x[1000:1500], labels[1000:1500]) > 0.85
    features = model.features(x[1000:1400])
    assert features.ndim == 2
    assert len(features) == 400
    # Blurred digits are farther from digits than other digits are.
    floor = frechet_distance(model.features(x[1400:]), features)
    blurred = torch.nn.functional.avg_pool2d(x[1400:], 3, stride=1, padding=1)
    assert frechet_distance(model.features(blurred), features) > 3 * floor
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        DigitClassifier.fit(x[:3], labels[:2], **settings)


def test_the_monitor_tells_true_from_false_reconstructions(digits: tuple[Tensor, Tensor]) -> None:
    x, _ = digits
    channel = RandomMask((1, 8, 8), keep=0.5, noise_std=0.4)
    scaling = Scaling.from_range(0, 16)
    generator = torch.Generator().manual_seed(0)
    params = channel.draw_params(len(x), generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    held_out = y[:400], {"mask": params["mask"][:400]}
    reference = y[400:], {"mask": params["mask"][400:]}

    def measure(x_hat: Tensor, seed: int = 0):
        return observation_divergence(
            channel, scaling, x_hat, *held_out, reference=reference, seed=seed
        )

    true = measure(x[400:])
    false = measure(torch.full_like(x[400:], float(x.mean())))
    assert true.floor is not None
    assert true.floor == false.floor
    assert abs(true.value - true.floor) < 4 * true.standard_error
    assert false.value > true.floor + 8 * false.standard_error
    assert measure(x[400:]) == true
    assert measure(x[400:], seed=1) != true
