"""The pair histograms tell what a Gaussian fit cannot, and nothing where there is nothing to
tell."""

import math

import pytest
import torch
from torch import Tensor

from diffem_core.cooccurrence import cooccurrence_divergence, pair_histograms


def binary_fields(n: int, seed: int) -> Tensor:
    """Draw images whose neighbouring pixels agree, with values -1.2 and 1.2."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 2, (n, 1, 4, 4), generator=generator).float() * 2.4 - 1.2
    return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)


def gaussian_like(x: Tensor, seed: int) -> Tensor:
    """Draw Gaussian samples with the mean and covariance of x."""
    flat = x.flatten(1).double()
    cov = torch.cov(flat.mT) + 1e-9 * torch.eye(flat.shape[1])
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(x), flat.shape[1], generator=generator, dtype=torch.float64)
    return (flat.mean(0) + z @ torch.linalg.cholesky(cov).mT).float().reshape(x.shape)


def masks(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_it_tells_a_gaussian_fit_from_the_truth_by_many_standard_errors() -> None:
    a, b = binary_fields(250, 0), binary_fields(1000, 1)
    fit = gaussian_like(b, 2)
    floor = cooccurrence_divergence(a, masks(a.shape, 3), b, masks(b.shape, 4))
    value = cooccurrence_divergence(a, masks(a.shape, 3), fit, masks(b.shape, 5))
    assert value.value - floor.value > 10 * max(value.standard_error, floor.standard_error)


def test_equal_sets_have_none() -> None:
    a = binary_fields(50, 0)
    seen = masks(a.shape, 1)
    result = cooccurrence_divergence(a, seen, a, seen)
    assert abs(result.value) < 1e-9
    assert math.isfinite(result.standard_error)


def test_hidden_pixels_do_not_count() -> None:
    a = binary_fields(50, 0)
    seen = masks(a.shape, 1)
    spoilt = torch.where(seen, a, 1e6 * torch.ones(()))
    assert cooccurrence_divergence(spoilt, seen, a, seen).value == pytest.approx(0, abs=1e-9)


def test_counts_are_those_of_the_definition() -> None:
    x = torch.tensor([[-2.0, 2.0], [0.0, 2.0]]).reshape(1, 1, 2, 2)
    counts = pair_histograms(x, torch.ones_like(x, dtype=torch.bool), levels=3, half_width=2.0)
    right = torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 0]]).double()
    below = torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 1]]).double()
    torch.testing.assert_close(counts[0, 0], right)
    torch.testing.assert_close(counts[0, 1], below)
    assert counts[0, 2].sum() == 1  # one pair down the diagonal, one up
    assert counts[0, 3].sum() == 1
    assert counts[0, 4:].sum() == 0  # no pixels lie two apart


def test_the_standard_error_is_that_of_repetition() -> None:
    b = binary_fields(2000, 999)
    fit, seen_fit = gaussian_like(b, 1), masks(b.shape, 2)
    results = []
    for seed in range(40):
        a = binary_fields(200, seed)
        results.append(cooccurrence_divergence(a, masks(a.shape, 100 + seed), fit, seen_fit))
    spread = torch.tensor([r.value for r in results]).std()
    told = torch.tensor([r.standard_error for r in results]).mean()
    # Of 40 repetitions, the standard deviation has a relative error of 1 / sqrt(80) = 0.11.
    assert 1 - 4 * 0.11 < told / spread < 1 + 4 * 0.11


def test_shapes_that_disagree_are_refused() -> None:
    a = binary_fields(4, 0)
    with pytest.raises(ValueError, match="a mask of the same shape"):
        cooccurrence_divergence(a, masks((4, 1, 8, 7), 0), a, masks(a.shape, 0))


def test_nothing_seen_together_is_refused() -> None:
    a = binary_fields(4, 0)
    nothing = torch.zeros_like(a, dtype=torch.bool)
    with pytest.raises(ValueError, match="seen together"):
        cooccurrence_divergence(a, nothing, a, nothing)
