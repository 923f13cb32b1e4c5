"""How grey levels of neighbouring pixels go together: a divergence for partly observed images.

A Gaussian prior fits the mean and the covariance of the observations, so that a distance that
looks at these (or at projections, which a few hundred observations determine poorly) does not tell
its samples from the truth. The joint histogram of two neighbouring pixels does, and it can be
estimated wherever both are seen:

    p_d(u, v) = share of pairs (i, i + d), both seen, with levels u at i and v at i + d
    D = mean over offsets d of H^2(p_d, q_d),        H^2(p, q) = 1 - sum sqrt(p q)

Levels are soft: a value between two levels counts for both in proportion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CooccurrenceDivergence", "cooccurrence_divergence", "pair_histograms"]

_OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))
_BLOCKS = 16
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class CooccurrenceDivergence:
    """A divergence between two sets of partly observed images.

    Arguments:
        value: Mean squared Hellinger distance of the pair histograms, in [0, 1].
        standard_error: Its standard error over the first set (delete-a-block jackknife).
    """

    value: float
    standard_error: float


def cooccurrence_divergence(
    a: Tensor,
    seen_a: Tensor,
    b: Tensor,
    seen_b: Tensor,
    *,
    levels: int = 6,
    half_width: float = 2.0,
) -> CooccurrenceDivergence:
    """Compare the pair histograms of two sets of partly observed images.

    Arguments:
        a: Images of shape (n, C, H, W), in network units; only seen pixels count.
        seen_a: Booleans of the same shape.
        b: Images of shape (m, C, H, W).
        seen_b: Booleans of the same shape.
        levels: Grey levels, at least 2.
        half_width: The levels span [-half_width, half_width]; values beyond count for the ends.

    Returns:
        The divergence, with its standard error over `a`.

    Raises:
        ValueError: The shapes disagree, or no two pixels are seen together.
    """
    for name, x, seen in (("a", a, seen_a), ("b", b, seen_b)):
        if x.ndim != 4 or x.shape != seen.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(x.shape)} and its mask {tuple(seen.shape)}; give "
                "images (n, C, H, W) and a mask of the same shape"
            )
    ours = pair_histograms(a, seen_a, levels=levels, half_width=half_width, blocks=_BLOCKS)
    theirs = pair_histograms(b, seen_b, levels=levels, half_width=half_width).sum(0)
    total = ours.sum(0)
    value = _hellinger(total, theirs)
    left_out = torch.stack([_hellinger(total - block, theirs) for block in ours])
    count = len(left_out)
    error = math.sqrt((count - 1) * float(left_out.var(correction=0))) if count > 1 else math.nan
    return CooccurrenceDivergence(value=float(value), standard_error=error)


def pair_histograms(
    x: Tensor, seen: Tensor, *, levels: int, half_width: float, blocks: int = 1
) -> Tensor:
    """Count how often two levels stand at two neighbouring, seen pixels.

    Arguments:
        x: Images of shape (n, C, H, W).
        seen: Booleans of the same shape.
        levels: Grey levels L.
        half_width: The levels span [-half_width, half_width].
        blocks: Number of groups that the images are counted in, at most n.

    Returns:
        Float64 counts of shape (blocks, offsets, L, L): image i counts for group i mod blocks.
    """
    blocks = min(blocks, len(x))
    counts = torch.zeros(blocks, len(_OFFSETS), levels, levels, dtype=torch.float64)
    step = 2 * half_width / (levels - 1)
    centers = torch.linspace(-half_width, half_width, levels)
    for block in range(blocks):
        for part, mask in zip(
            torch.split(x[block::blocks].float().cpu(), _CHUNK),
            torch.split(seen[block::blocks].cpu(), _CHUNK),
            strict=True,
        ):
            clipped = part.clamp(-half_width, half_width).unsqueeze(-1)
            weight = (1 - (clipped - centers).abs() / step).clamp_min(0) * mask.unsqueeze(-1)
            for k, (down, right) in enumerate(_OFFSETS):
                first, second = _shifted(weight, down, right)
                joint = first.reshape(-1, levels).mT @ second.reshape(-1, levels)
                counts[block, k] += joint.double()
    return counts


def _shifted(weight: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Return the pixels i and i + (down, right), wherever both lie in the image."""
    height, width = weight.shape[-3:-1]
    first = weight[..., : height - down, max(0, -right) : width - max(0, right), :]
    second = weight[..., down:, max(0, right) : width - max(0, -right), :]
    return first, second


def _hellinger(p: Tensor, q: Tensor) -> Tensor:
    p_sum, q_sum = p.sum((-1, -2), keepdim=True), q.sum((-1, -2), keepdim=True)
    known = (p_sum > 0).flatten() & (q_sum > 0).flatten()
    if not known.any():
        raise ValueError("no two neighbouring pixels are seen together; give more observations")
    p, q = (p / p_sum)[known], (q / q_sum)[known]
    return (1 - (p * q).sqrt().sum((-1, -2))).mean()
