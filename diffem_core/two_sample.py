"""Do two sets of vectors come from one distribution? Kernel tests.

    D(a, b) = E k(a, a') + E k(b, b') - 2 E k(a, b)

With k(u, v) = -|u - v| this is the energy distance, with k(u, v) = exp(-|u - v|^2 / (2 h^2)) the
squared maximum mean discrepancy. It is 0 for equal distributions and positive for different ones.
The estimate is unbiased, so that it may be a little below 0.

The p-value is of a permutation test: under equal distributions every way to deal the pooled
vectors into two sets is as likely, so that it is at most alpha with a probability of at most
alpha, whatever the distribution and the number of vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffem_core.measurement import Measurement, confidence_interval

__all__ = ["energy_test", "mmd_test", "permuted_labels", "subsample", "too_few"]

_LEAST = 10


def energy_test(a: Tensor, b: Tensor, *, permutations: int = 199, seed: int) -> Measurement:
    """Estimate the energy distance between two sets of vectors.

        D(a, b) = 2 E|a - b| - E|a - a'| - E|b - b'|

    Arguments:
        a: Vectors of shape (n, D), n >= 10.
        b: Vectors of shape (m, D), m >= 10.
        permutations: Permutations for the p-value, which is at least 1 / (permutations + 1).
        seed: Seed of the permutations.

    Returns:
        The distance, in the vectors' units, with its p-value; left out where there are fewer
        vectors, or all are the same.

    References:
        Székely and Rizzo 2013 (Energy statistics), equation 6.1.
    """
    _same_width(a, b)
    reason = too_few(a, b, least=_LEAST) or all_the_same(a, b)
    if reason is not None:
        return Measurement.left_out(reason)
    return _kernel_test(-_distances(a, b), len(a), permutations=permutations, seed=seed)


def mmd_test(
    a: Tensor, b: Tensor, *, bandwidth: float = 1.0, permutations: int = 199, seed: int
) -> Measurement:
    """Estimate the squared maximum mean discrepancy of two sets of vectors, Gaussian kernel.

    Arguments:
        a: Vectors of shape (n, D), n >= 10.
        b: Vectors of shape (m, D), m >= 10.
        bandwidth: Width h of the kernel, in medians of the distances between all vectors.
        permutations: Permutations for the p-value.
        seed: Seed of the permutations.

    Returns:
        The discrepancy, without unit, at most 2, with its p-value; left out where there are fewer
        vectors, or all are the same.

    References:
        Gretton et al. 2012 (A kernel two-sample test), equation 3.
    """
    if not bandwidth > 0:
        raise ValueError(f"mmd_test received bandwidth {bandwidth}; give a positive number")
    _same_width(a, b)
    reason = too_few(a, b, least=_LEAST) or all_the_same(a, b)
    if reason is not None:
        return Measurement.left_out(reason)
    distances = _distances(a, b)
    apart = distances[~torch.eye(len(distances), dtype=torch.bool)]
    width = float(apart.median()) or float(apart.mean())
    kernel = torch.exp(-0.5 * (distances / (bandwidth * width)).square())
    return _kernel_test(kernel, len(a), permutations=permutations, seed=seed)


def permuted_labels(n: int, m: int, *, permutations: int, seed: int) -> Tensor:
    """Deal n + m things into two sets again and again.

    Arguments:
        n: Size of the first set.
        m: Size of the second set.
        permutations: How often, at least 1.
        seed: Seed.

    Returns:
        1 for members of the first set, else 0, float64 of shape (1 + permutations, n + m); the
        first row is the deal as it is: the first n.
    """
    if permutations < 1:
        raise ValueError(f"received {permutations} permutations; give at least 1")
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(permutations, n + m, generator=generator, dtype=torch.float64)
    labels = torch.zeros(1 + permutations, n + m, dtype=torch.float64)
    labels[0, :n] = 1
    labels[1:].scatter_(1, keys.argsort(1)[:, :n], 1.0)
    return labels


def permutation_p_value(statistics: Tensor) -> float:
    """Return the share of deals whose statistic is at least that of the first, itself included."""
    return float((statistics >= statistics[0]).double().mean())


def subsample(rows: Tensor, count: int, *, seed: int) -> Tensor:
    """Take at most `count` rows at random, without replacement."""
    if len(rows) <= count:
        return rows
    generator = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]


def too_few(a: Tensor, b: Tensor, *, least: int) -> str | None:
    """Say what is missing where a statistic needs more observations than there are."""
    if min(len(a), len(b)) >= least:
        return None
    return (
        f"{len(a)} held-out and {len(b)} other observations are too few, {least} of each are "
        "needed; raise data.holdout or evaluation.reconstructions"
    )


def all_the_same(a: Tensor, b: Tensor) -> str | None:
    """Say so where there is nothing to tell apart."""
    if bool((a == a[0]).all()) and bool((b == a[0]).all()):
        return "every observation is the same, held out or not; there is nothing to compare"
    return None


def _same_width(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"received vectors of shapes {tuple(a.shape)} and {tuple(b.shape)}; give (n, D) and "
            "(m, D)"
        )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    pooled = torch.cat([a, b]).double().cpu()
    distances: Tensor = torch.cdist(pooled, pooled)
    return distances.fill_diagonal_(0.0)


def _kernel_test(kernel: Tensor, n: int, *, permutations: int, seed: int) -> Measurement:
    m = len(kernel) - n
    labels = permuted_labels(n, m, permutations=permutations, seed=seed)
    own = kernel.diagonal().clone()
    statistics = _unbiased(labels, kernel, own, n, m)
    value = float(statistics[0])
    error = _leave_one_out_error(kernel - torch.diag(own), n)
    return Measurement(
        value=value,
        standard_error=error,
        interval=confidence_interval(value, error, degrees=min(n, m) - 1),
        p_value=permutation_p_value(_rounded(statistics, kernel)),
    )


def _rounded(statistics: Tensor, kernel: Tensor) -> Tensor:
    # Sums that are equal on paper differ in their last digits, and would not count as ties.
    unit = float(kernel.abs().mean()) * 1e-12
    return (statistics / unit).round() if unit > 0 else statistics


def _unbiased(labels: Tensor, kernel: Tensor, own: Tensor, n: int, m: int) -> Tensor:
    sums = labels @ kernel
    aa = (sums * labels).sum(1)
    ab = sums.sum(1) - aa
    total = kernel.sum()
    bb = total - aa - 2 * ab
    own_a = labels @ own
    within = (aa - own_a) / (n * (n - 1)) + (bb - (own.sum() - own_a)) / (m * (m - 1))
    return within - 2 * ab / (n * m)


def _leave_one_out_error(kernel: Tensor, n: int) -> float:
    """Return the jackknife's standard error; the diagonal of `kernel` is 0."""
    m = len(kernel) - n
    rows_a, rows_b = kernel[:, :n].sum(1), kernel[:, n:].sum(1)
    aa, bb, ab = rows_a[:n].sum(), rows_b[n:].sum(), rows_b[:n].sum()
    variance = 0.0
    for size, other, within, without, own, cross in (
        (n, m, aa, bb, rows_a[:n], rows_b[:n]),
        (m, n, bb, aa, rows_b[n:], rows_a[n:]),
    ):
        left_out = (
            (within - 2 * own) / ((size - 1) * (size - 2))
            + without / (other * (other - 1))
            - 2 * (ab - cross) / ((size - 1) * other)
        )
        variance += (size - 1) * float(left_out.var(correction=0))
    return math.sqrt(variance)
