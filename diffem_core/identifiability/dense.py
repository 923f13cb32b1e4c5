"""Looking at H directly: diagonal for operators that select entries, dense in few dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffem_core.identifiability.normals import (
    MatrixNormals,
    Normals,
    chunks,
    combinations,
    frequency_diagonal,
)
from diffem_core.identifiability.pairs import (
    Pairs,
    pairs_in_window,
    pairs_of_commuting,
    pairs_of_few,
    pairs_of_selection,
    seen_together_by_shift,
)
from diffem_core.identifiability.problem import FLOOR, Look, Problem, spread
from diffem_core.identifiability.response import has_plain_response, roughness, secant_matrices
from diffem_core.seeds import derive_seed

__all__ = ["look_at_all_entries", "look_at_secants", "look_at_selection"]

_VALUES = 2**25  # Of all n P_i together, each D x D.
_SECANT_FLOOR = 0.02
_ALIKE = 1e-5  # Difference of levels, as a part of the greatest, that may be all rounding.
_BASE_POINTS = 8
_ROUGH_POINTS = 64
_FEW = 64  # Directions up to which T of all pairs is written down.
_REPEATS = 16
_SHIFTED = 128  # Masks of which pairs are counted by shift.


def look_at_selection(problem: Problem, seen: Tensor) -> Look:
    """Count how often entries, and pairs of them, are seen.

    Arguments:
        problem: The problem.
        seen: Which entries n operators select, of shape (n, D).
    """
    p = seen.double()
    h = p.mean(0)
    half = len(seen) // 2
    settled = problem.fixed or bool((seen[:half].any(0) == seen.any(0)).all())
    variance = problem.prior.variances()
    needed = problem.needed(p, variance)
    entries = h.reshape(problem.x_shape)
    together = None
    if problem.image:
        pixels = seen[:_SHIFTED].reshape(-1, *problem.x_shape).any(1)
        together = seen_together_by_shift(pixels)
    return Look(
        method="selection",
        operators=len(seen),
        level=h,
        share=torch.full_like(h, 1 / problem.size),
        energy=variance / variance.sum(),
        needed=needed,
        floor=0.0,
        settled=settled,
        seen_once=float(h.mean()),
        entries=entries,
        # Of a diagonal H every frequency has the mean.
        frequencies=h.mean().expand(problem.x_shape[-2:]) if problem.image else None,
        lost_variance=torch.where((h == 0) | (needed > problem.observations), variance, 0.0),
        never_seen=(entries == 0).nonzero(),
        pairs=None
        if problem.fixed
        else pairs_of_selection(seen, generator=problem.generator("pairs")),
        together=together,
    )


def look_at_all_entries(problem: Problem, normals: Normals) -> Look:
    """Write H down and diagonalize it.

    Operators that commute have directions in common, which are then those of H; their pairs are
    known one by one. In 65 or more directions that they do not share, pairs of a window are looked
    at.
    """
    return _look(problem, spread(normals, max(64, _VALUES // problem.size**2)), linear=True)


def look_at_secants(problem: Problem) -> Look:
    """Look at a channel that is not linear through its secants around draws of the prior."""
    channel, params = problem.channel, problem.params
    step = 0.5 * math.sqrt(float(problem.prior.variances().mean()))
    seed = derive_seed(problem.seed, "secants")

    def some(n: int) -> dict[str, Tensor]:
        return {k: v[torch.arange(n) % len(v)] for k, v in params.items()}

    rough = roughness(
        channel,
        problem.samples(_ROUGH_POINTS),
        some(_ROUGH_POINTS),
        step=step,
        repeats=_REPEATS,
        seed=seed,
    )
    matrices = secant_matrices(
        channel,
        problem.samples(_BASE_POINTS),
        some(_BASE_POINTS),
        step=step,
        repeats=_REPEATS,
        seed=seed,
    )
    return _look(problem, MatrixNormals(matrices), linear=False, roughness=rough)


def _look(problem: Problem, normals: Normals, *, linear: bool, roughness: float = 1.0) -> Look:
    n = normals.count
    first = torch.zeros(n, dtype=torch.float64)
    first[: max(1, n // 2)] = 1.0
    random = torch.rand(n, dtype=torch.float64, generator=problem.generator("combination"))
    sums = combinations(normals, torch.stack([first, 1 - first, random], dim=1))
    h = (sums[0] + sums[1]) / n
    level, directions = torch.linalg.eigh(h)
    exact = linear or has_plain_response(problem.channel)
    relative_floor = FLOOR if exact else _SECANT_FLOOR
    floor = relative_floor * max(float(level[-1]), 0.0)
    p, common = None, False
    if n > 1 and linear and _commute(problem, normals):
        # A random combination of operators that commute separates all common eigenspaces.
        shared = torch.linalg.eigh(sums[2])[1]
        p, rest = _levels(normals, shared)
        common = rest <= 1e-3
    if p is not None and common:
        level = p.mean(0)
        directions = _principal(problem, shared, p)
        p, _ = _levels(normals, directions)
    else:
        directions = _principal(problem, directions, level.unsqueeze(0))
        p, _ = _levels(normals, directions)
    order = level.argsort(descending=True, stable=True)
    level, directions, p = level[order].clamp_min(0), directions[:, order], p[:, order]
    variance = (directions * problem.prior.times(directions)).sum(0).clamp_min(0)
    needed = problem.needed(torch.where(p > floor, p, 0.0), variance)
    hidden = level <= floor
    settled = True
    if linear and n > 1 and bool(hidden.any()):
        rank = int((torch.linalg.eigvalsh(sums[0] / first.sum()) > floor).sum())
        settled = rank == int((~hidden).sum())
    lost = directions[:, hidden | (needed > problem.observations)]
    lost_variance = ((lost @ (lost.mT @ problem.prior.times(lost))) * lost).sum(1)
    entries = h.diagonal().reshape(problem.x_shape).clamp_min(0)
    pairs = None
    if linear and n > 1:
        pairs = (
            pairs_of_commuting(p, floor)
            if common
            else _pairs(problem, normals, directions, hidden)
        )
    return Look(
        method="dense" if linear else "linearized",
        operators=n,
        level=level,
        share=torch.full_like(level, 1 / problem.size),
        energy=variance / variance.sum(),
        needed=needed,
        floor=floor,
        settled=settled,
        seen_once=_seen_once(normals, p if common else None, relative_floor),
        entries=entries,
        frequencies=frequency_diagonal(h, problem.x_shape) if problem.image else None,
        lost_variance=lost_variance.clamp_min(0).reshape(problem.x_shape),
        never_seen=(entries <= floor).nonzero(),
        pairs=pairs,
        roughness=roughness,
    )


def _principal(problem: Problem, directions: Tensor, p: Tensor) -> Tensor:
    """Take x's principal components among directions that are seen alike.

    Where operators do not tell directions apart, any orthonormal combination of them is as good a
    direction; how much of x drowns is told by those along which x varies most and least.

    Arguments:
        problem: The problem.
        directions: Orthonormal, of shape (D, D).
        p: Levels of n operators along them, of shape (n, D).
    """
    order = p.mean(0).argsort()
    same = (p[:, order[1:]] - p[:, order[:-1]]).abs().amax(0) <= _ALIKE * p.max()
    ends = [*((~same).nonzero().squeeze(1) + 1).tolist(), len(order)]
    out, start = directions.clone(), 0
    for end in ends:
        group = order[start:end]
        if len(group) > 1:
            v = directions[:, group]
            inner = v.mT @ problem.prior.times(v)
            out[:, group] = v @ torch.linalg.eigh((inner + inner.mT) / 2)[1]
        start = end
    return out


def _commute(problem: Problem, normals: Normals) -> bool:
    """Tell whether neighbouring operators commute on a random vector, eight pairs of them."""
    z = torch.randn(problem.size, 1, dtype=torch.float64, generator=problem.generator("commute"))
    for i in range(min(8, normals.count - 1)):
        a, b = slice(i, i + 1), slice(i + 1, i + 2)
        ab = normals.apply(a, normals.apply(b, z)[0])
        ba = normals.apply(b, normals.apply(a, z)[0])
        scale = torch.linalg.vector_norm(ab) + torch.linalg.vector_norm(ba)
        if float(torch.linalg.vector_norm(ab - ba)) > 1e-5 * float(scale):
            return False
    return True


def _levels(normals: Normals, directions: Tensor) -> tuple[Tensor, float]:
    """Return v_j' P_i v_j, of shape (n, D), and what of P_i v_j is not along v_j, at most."""
    values, worst = [], 0.0
    for rows in chunks(normals, directions.shape[1]):
        product = normals.apply(rows, directions)
        p = (directions * product).sum(1)
        rest = torch.linalg.vector_norm(product - directions * p.unsqueeze(1))
        worst = max(worst, float(rest / torch.linalg.vector_norm(product).clamp_min(1e-300)))
        values.append(p.clamp_min(0))
    return torch.cat(values), worst


def _pairs(problem: Problem, normals: Normals, directions: Tensor, hidden: Tensor) -> Pairs | None:
    seen = directions[:, ~hidden]
    if 1 <= seen.shape[1] <= _FEW:
        return pairs_of_few(normals, seen)
    return pairs_in_window(normals, problem.x_shape)


def _seen_once(normals: Normals, p: Tensor | None, floor: float) -> float:
    """Return the share of directions that one operator sees, on average."""
    if p is None:
        some = min(normals.count, 16 if normals.size <= 256 else 4)
        eye = torch.eye(normals.size, dtype=torch.float64)
        p = torch.cat(
            [torch.linalg.eigvalsh(normals.apply(slice(i, i + 1), eye)) for i in range(some)]
        )
    return float((p > floor * p.max(1, keepdim=True).values).double().mean())
