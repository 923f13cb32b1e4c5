"""Fréchet distance between observations, in features fitted to other real observations.

    d = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

The moments are of features: by default the leading principal components of observations that are
on neither side, each of unit variance there. Means and covariances are all that it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from diffem_core.measurement import Measurement, block_jackknife, confidence_interval
from diffem_core.metrics import frechet_distance
from diffem_core.two_sample import (
    all_the_same,
    permutation_p_value,
    permuted_labels,
    too_few,
)

__all__ = ["PrincipalComponents", "frechet_test"]


@dataclass(frozen=True, kw_only=True)
class PrincipalComponents:
    """Leading principal components, of unit variance where they were fitted.

    Arguments:
        mean: Mean, shape (D,).
        directions: Shape (D, K): z = (x - mean) @ directions.
    """

    mean: Tensor
    directions: Tensor

    @classmethod
    def fit(cls, x: Tensor, components: int) -> Self:
        """Fit components to vectors.

        Arguments:
            x: Vectors of shape (n, D), n >= 2.
            components: How many, at most; those without variance are left out.

        Raises:
            ValueError: There are fewer than 2 vectors.
        """
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(
                f"PrincipalComponents.fit received {tuple(x.shape)}; give at least 2 vectors (n, "
                "D)"
            )
        x = x.double()
        mean = x.mean(0)
        _, singular, vectors = torch.linalg.svd(x - mean, full_matrices=False)
        deviation = singular / (len(x) - 1) ** 0.5
        kept = deviation > 1e-6 * deviation[0].clamp_min(1e-12)
        count = min(components, int(kept.sum()))
        return cls(mean=mean, directions=vectors[:count].mT / deviation[:count])

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the components of vectors (n, D), float64 of shape (n, K)."""
        return (x.double() - self.mean) @ self.directions


def frechet_test(a: Tensor, b: Tensor, *, permutations: int = 199, seed: int) -> Measurement:
    """Compute the Fréchet distance between two sets of features.

    The distance between two samples of one distribution is positive, and the more so the fewer
    they are: compare with its floor, not with 0.

    Arguments:
        a: Features of shape (n, F), n >= 2 F and at least 20.
        b: Features of shape (m, F), m likewise.
        permutations: Permutations for the p-value, which is at least 1 / (permutations + 1). It
            holds its level where the features do not depend on which set a row belongs to.
        seed: Seed of the permutations.

    Returns:
        The distance in squared units of the features, with its jackknife standard error; left out
        where there are fewer rows, or all are the same.

    References:
        Heusel et al. 2017 (FID, arXiv 1706.08500).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(
            f"frechet_test received features of shapes {tuple(a.shape)} and {tuple(b.shape)}; "
            "give (n, F) and (m, F)"
        )
    reason = too_few(a, b, least=max(20, 2 * a.shape[1])) or all_the_same(a, b)
    if reason is not None:
        return Measurement.left_out(reason)
    a, b = a.double().cpu(), b.double().cpu()
    error, degrees = block_jackknife(frechet_distance, a, b)
    value = frechet_distance(a, b)
    labels = permuted_labels(len(a), len(b), permutations=permutations, seed=seed)
    return Measurement(
        value=value,
        standard_error=error,
        interval=confidence_interval(value, error, degrees=degrees),
        p_value=permutation_p_value(_distances_of(labels, torch.cat([a, b]))),
    )


def _distances_of(labels: Tensor, rows: Tensor) -> Tensor:
    """Return the distance for every deal of the rows into two sets, rounded to 12 digits."""
    rows = rows - rows.mean(0)
    width = rows.shape[1]
    products = (rows[:, :, None] * rows[:, None, :]).flatten(1)
    moments = []
    for weights in (labels, 1 - labels):
        size = weights.sum(1)
        mean = weights @ rows / size[:, None]
        second = (weights @ products).reshape(-1, width, width)
        outer = mean[:, :, None] * mean[:, None, :]
        size = size[:, None, None]
        moments.append((mean, (second - size * outer) / (size - 1)))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum(-1)
    trace = (cov_a + cov_b).diagonal(dim1=-2, dim2=-1).sum(-1)
    distances: Tensor = (mean_a - mean_b).square().sum(-1) + trace - 2 * cross
    unit = float(trace.mean()) * 1e-12
    return (distances / unit).round() if unit > 0 else distances
