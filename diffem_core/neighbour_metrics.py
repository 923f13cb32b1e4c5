"""How much of one set of samples lies where another one has its own, told by nearest neighbours.

With B_k(u) the ball around u that reaches to its k-th nearest neighbour in u's own set, for real
samples x_i (n of them) and generated ones z_j (m of them), all of them features,

    precision = share of z_j inside some B_k(x_i)
    recall    = share of x_i inside some B_k(z_j)
    density   = mean over j of #{i : z_j in B_k(x_i)} / k
    coverage  = share of x_i with some z_j in B_k(x_i)

Precision and density say whether samples look real, recall and coverage whether all of the real
ones are met. A single outlier among the real samples makes a large ball, which precision counts in
full; density and coverage are less moved by it. All four depend on n, m and k: compare with two
sets of real samples of the same sizes.

References:
    Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2, for precision and recall; Naeem
    et al. 2020 (arXiv 2002.09797), equations 6 and 7, for density and coverage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffem_core.measurement import Measurement

__all__ = ["neighbour_metrics"]

_ROWS = 1024  # of a matrix of distances at a time


def neighbour_metrics(
    samples: Tensor, real: Tensor, *, neighbours: int = 5
) -> dict[str, Measurement]:
    """Measure precision, recall, density and coverage of samples.

    Arguments:
        samples: Features of generated samples, shape (m, F).
        real: Features of real samples, shape (n, F).
        neighbours: Which nearest neighbour k ends a ball.

    Returns:
        `precision`, `recall` and `coverage` in [0, 1] and `density`, not negative; left out where
        a set has at most k samples, or where all samples of one are the same.

    Raises:
        ValueError: The shapes do not fit each other, or `neighbours` is less than 1.
    """
    names = ("precision", "recall", "density", "coverage")
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ValueError(
            f"neighbour_metrics received features of shapes {tuple(samples.shape)} and "
            f"{tuple(real.shape)}; give (m, F) and (n, F)"
        )
    if neighbours < 1:
        raise ValueError(f"neighbour_metrics received {neighbours} neighbours; give at least 1")
    fewest = min(len(samples), len(real))
    if fewest <= neighbours:
        reason = f"{neighbours} neighbours need {neighbours + 1} samples, there are {fewest}"
        return {name: Measurement.left_out(reason) for name in names}
    for what, rows in (("generated", samples), ("real", real)):
        if not bool((rows != rows[0]).any()):
            reason = f"all {len(rows)} {what} samples are the same"
            return {name: Measurement.left_out(reason) for name in names}
    center = real.double().mean(0)
    z, x = samples.double() - center, real.double() - center
    reach_x, reach_z = _reach(x, neighbours), _reach(z, neighbours)
    inside = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    recalled, covered = 0, 0
    for first in range(0, len(x), _ROWS):
        part = slice(first, first + _ROWS)
        distances = torch.cdist(x[part], z)
        within = distances <= reach_x[part, None]
        inside += within.sum(0)
        covered += int(within.any(1).sum())
        recalled += int((distances <= reach_z).any(1).sum())
    values = (
        float((inside > 0).double().mean()),
        recalled / len(x),
        float(inside.mean()) / neighbours,
        covered / len(x),
    )
    return {name: Measurement(value=v) for name, v in zip(names, values, strict=True)}


def _reach(rows: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, shape (n,)."""
    found = []
    for first in range(0, len(rows), _ROWS):
        part = rows[first : first + _ROWS]
        distances = torch.cdist(part, rows)
        # By its place, since an equal row is a neighbour like any other.
        here = torch.arange(len(part), device=rows.device)
        distances[here, first + here] = torch.inf
        found.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(found)
