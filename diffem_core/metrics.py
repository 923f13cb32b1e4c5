"""Measures of reconstructions. None of them feeds back into training.

Where clean samples are known: errors per pixel, and distances between the distributions of
reconstructions and of clean samples. Distances take feature vectors, so that the caller decides
what is compared.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "frechet_distance",
    "masked_rmse",
    "psnr",
    "rmse",
    "sinkhorn_divergence",
    "sliced_image_distance",
    "sliced_wasserstein",
]


def rmse(x_hat: Tensor, x: Tensor) -> float:
    """Compute the root of the mean squared error over all entries.

    Arguments:
        x_hat: Estimates, of any shape.
        x: The truth, of the same shape.

    Returns:
        The error, in the units of both.
    """
    _same_shape(x_hat, x)
    return math.sqrt(float((x_hat.double() - x.double()).square().mean()))


def masked_rmse(x_hat: Tensor, x: Tensor, mask: Tensor) -> tuple[float, float]:
    """Compute the root mean squared errors on hidden and on seen entries.

    Arguments:
        x_hat: Reconstructions of shape (n, C, H, W).
        x: Clean samples of the same shape and units.
        mask: 1 where an entry is seen, 0 where it is hidden; of a shape that broadcasts to that of
            x.

    Returns:
        The errors on hidden and on seen entries; NaN where there are none.
    """
    _same_shape(x_hat, x)
    error = (x_hat.double() - x.double()).square()
    seen = mask.double().expand_as(error)
    hidden = 1 - seen
    values = [float((error * m).sum() / m.sum()) for m in (hidden, seen)]
    return math.sqrt(values[0]), math.sqrt(values[1])


def psnr(x_hat: Tensor, x: Tensor, *, data_range: float) -> float:
    """Compute the mean over samples of the peak signal-to-noise ratio.

    Arguments:
        x_hat: Reconstructions of shape (n, ...).
        x: Clean samples of the same shape and units.
        data_range: Largest minus smallest possible value.

    Returns:
        Decibels; infinite where a reconstruction is perfect.
    """
    _same_shape(x_hat, x)
    error = (x_hat.double() - x.double()).square().flatten(1).mean(1)
    return float((10 * torch.log10(data_range**2 / error)).mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the squared 2-Wasserstein distance between Gaussians fitted to two sets of features.

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    Arguments:
        a: Features of shape (n, F), n >= 2.
        b: Features of shape (m, F), m >= 2.

    Returns:
        The distance, not negative.

    References:
        Heusel et al. 2017 (FID, arXiv 1706.08500).
    """
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"frechet_distance received `{name}` of shape {tuple(features.shape)}; give at "
                "least two rows of features"
            )
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.mT), torch.cov(b.mT)
    values, vectors = torch.linalg.eigh(cov_a.reshape(a.shape[1], -1))
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    # (C_a C_b)^(1/2) has the eigenvalues of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric.
    cross = (
        torch.linalg.eigvalsh(root @ cov_b.reshape(b.shape[1], -1) @ root)
        .clamp_min(0)
        .sqrt()
        .sum()
    )
    trace = cov_a.reshape(a.shape[1], -1).trace() + cov_b.reshape(b.shape[1], -1).trace()
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + trace - 2 * cross))


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Compute the sliced 2-Wasserstein distance between two sets of vectors of equal number.

    Arguments:
        a: Vectors of shape (n, D).
        b: Vectors of shape (n, D).
        projections: Random directions.
        seed: Seed of the directions.

    Returns:
        The root of the mean, over directions, of the squared distance between sorted projections.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            f"sliced_wasserstein received shapes {tuple(a.shape)} and {tuple(b.shape)}; give as "
            "many vectors on both sides (subsample the larger)"
        )
    directions = unit_directions(a.shape[1], projections, seed=seed).to(a.device, a.dtype)
    gap = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return math.sqrt(float(gap.double().square().mean()))


def sliced_image_distance(
    a: Tensor, b: Tensor, *, projections: int = 128, texture: float = 0.75, seed: int = 0
) -> float:
    """Compute a relative sliced 2-Wasserstein distance of images that sees their texture.

        D^2 = (1 - w) SW^2(a, b) / V(b) + w SW^2(F a, F b) / V(F b)

    F are the responses to random filters of 3 x 3 pixels, unit vectors whose entries sum to 0 in
    each band, at all places of all images (on a grid of at most about 12 x 12 places, since close
    ones say the same). V is the mean variance of the projections, so that a set collapsed to its
    mean has distance about 1. A whole image projected on a direction is dominated by its coarse
    structure, and Gaussian nearly; a response is local, so that it shows how sharp edges are and
    how often they occur.

    Arguments:
        a: Images of shape (n, C, H, W), or vectors of shape (n, D), which have no texture.
        b: Images or vectors of the same shape: those of which V is taken.
        projections: Random directions, and random filters.
        texture: Weight w of the texture, in [0, 1]; not used for vectors.
        seed: Seed of directions and filters.

    Returns:
        The distance, not negative; 0 for equal sets.

    Raises:
        ValueError: The shapes differ, a set has fewer than 2 members, or `texture` is out of
            range.

    References:
        Karras et al. 2018 (arXiv 1710.10196), section 5, for sliced distances of local patches.
    """
    if a.shape != b.shape or a.ndim not in (2, 4) or len(a) < 2:
        raise ValueError(
            f"sliced_image_distance received shapes {tuple(a.shape)} and {tuple(b.shape)}; give "
            "as many images (n, C, H, W) on both sides, at least 2 (subsample the larger set)"
        )
    if not 0 <= texture <= 1:
        raise ValueError(f"sliced_image_distance received texture {texture}; give 0 to 1")
    directions = unit_directions(a[0].numel(), projections, seed=seed).to(a.device, a.dtype)
    whole = _relative_gap(a.flatten(1) @ directions, b.flatten(1) @ directions)
    if a.ndim == 2 or texture == 0:
        return math.sqrt(whole)
    bands, height, width = a.shape[1:]
    side = min(3, height, width)
    filters = unit_directions(bands * side * side, projections, seed=seed).mT
    filters = filters.reshape(projections, bands, side, side)
    filters = filters - filters.mean(dim=(2, 3), keepdim=True)
    filters = (filters / filters.flatten(1).norm(dim=1)[:, None, None, None]).to(a)
    stride = math.ceil(max(height, width) / 12)

    def responses(x: Tensor) -> Tensor:
        return F.conv2d(x, filters, stride=stride).movedim(1, -1).flatten(0, -2)

    local = _relative_gap(responses(a), responses(b))
    return math.sqrt((1 - texture) * whole + texture * local)


def _relative_gap(a: Tensor, b: Tensor) -> float:
    """Return the squared distance of sorted columns, relative to the variance of those of `b`."""
    gap = (a.sort(0).values - b.sort(0).values).double().square().mean()
    return float(gap / b.double().var(0).mean()) if float(gap) > 0 else 0.0


def unit_directions(dimension: int, count: int, *, seed: int) -> Tensor:
    """Draw `count` unit vectors, as the columns of a (dimension, count) tensor."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(dimension, count, generator=generator)
    norms: Tensor = torch.linalg.vector_norm(directions, dim=0)
    return directions / norms


def sinkhorn_divergence(
    a: Tensor, b: Tensor, *, regularization: float = 1e-3, iterations: int = 100
) -> float:
    """Compute the debiased entropic transport cost between two sets of vectors.

    With the squared Euclidean distance as cost,

        S(a, b) = OT(a, b) - (OT(a, a) + OT(b, b)) / 2

    Sinkhorn's iterations start from the potentials of exact transport: from 0, they would need
    thousands at a small regularization.

    Arguments:
        a: Vectors of shape (n, D).
        b: Vectors of shape (m, D).
        regularization: Entropic regularization epsilon, in squared data units.
        iterations: Largest number of Sinkhorn's iterations; they end when potentials move by less
            than epsilon / 100.

    Returns:
        The divergence, in squared data units; 0 for equal sets.

    Raises:
        ValueError: The dimensions differ, or a number is out of range.

    References:
        Feydy et al. 2019 (arXiv 1810.08278), equation 3; Chizat et al. 2020 (arXiv 2006.08172).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"sinkhorn_divergence received shapes {tuple(a.shape)} and {tuple(b.shape)}; give (n, "
            "D) and (m, D)"
        )
    if not (regularization > 0 and iterations >= 1):
        raise ValueError(
            f"sinkhorn_divergence received regularization {regularization} and {iterations} "
            "iterations; give a positive regularization and at least 1 iteration"
        )
    center = (a.mean(0) + b.mean(0)) / 2
    a, b = (a - center).double(), (b - center).double()
    settings = regularization, iterations
    between = _cost_between(a, b, *settings)
    return between - 0.5 * (_cost_within(a, *settings) + _cost_within(b, *settings))


def _cost_between(a: Tensor, b: Tensor, epsilon: float, iterations: int) -> float:
    import ot  # Half a second, for those who ask for it.

    cost = _squared_distances(a, b)
    exact = ot.emd([], [], cost.double().cpu().numpy(), numItermax=10**7, log=True)[1]
    f, g = (torch.from_numpy(exact[name]).to(cost) for name in ("u", "v"))
    work = torch.empty_like(cost)
    for _ in range(iterations):
        before = f
        f = _soft_min(cost, g, epsilon, 1, work)
        g = _soft_min(cost, f, epsilon, 0, work)
        if float((f - before - (f - before).mean()).abs().mean()) < epsilon / 100:
            break
    return float(f.double().mean() + g.double().mean())


def _cost_within(a: Tensor, epsilon: float, iterations: int) -> float:
    cost = _squared_distances(a, a)
    work = torch.empty_like(cost)
    f = cost.new_zeros(len(a))
    for _ in range(iterations):
        before = f
        f = (f + _soft_min(cost, f, epsilon, 1, work)) / 2  # Both potentials are equal.
        if float((f - before).abs().mean()) < epsilon / 100:
            break
    return 2 * float(f.double().mean())


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"  # Products of large norms would lose small distances.
    return torch.cdist(a, b, compute_mode=exact).square_().float()


def _soft_min(cost: Tensor, potential: Tensor, epsilon: float, dim: int, work: Tensor) -> Tensor:
    # -epsilon log mean exp((potential - cost) / epsilon), in place: the matrices are large.
    torch.sub(potential.unsqueeze(1 - dim), cost, out=work).div_(epsilon)
    peak = work.amax(dim, keepdim=True)
    total = work.sub_(peak).exp_().mean(dim)
    return -epsilon * (total.log() + peak.squeeze(dim))


def _same_shape(x_hat: Tensor, x: Tensor) -> None:
    if x_hat.shape != x.shape:
        raise ValueError(
            f"received reconstructions of shape {tuple(x_hat.shape)} and clean samples of shape "
            f"{tuple(x.shape)}; they must agree"
        )
