"""Conjugate gradients for batches of symmetric positive definite systems, one per sample.

Every sample has step lengths and a stopping rule of its own, so that its solution does not depend
on the other samples of its batch (beyond the rounding of batched operations).

References:
    Hestenes and Stiefel 1952 (Methods of conjugate gradients for solving linear systems).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["conjugate_gradients", "solve"]

Operator = Callable[[Tensor], Tensor]

_PASSES = 3


def conjugate_gradients(
    operator: Operator,
    b: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
    least: float = 0.0,
) -> Tensor:
    """Run some iterations of conjugate gradients from 0.

    Arguments:
        operator: Applies the matrices to vectors of the shape of b.
        b: Right-hand sides of shape (n, ...).
        iterations: Largest number of iterations.
        tolerance: A sample stops when its residual has fallen to this fraction of |b|; the loop
            ends when all have.
        least: Least eigenvalue that the matrices are known to have. A sample whose matrix acts
            as if it had a lesser one takes no further step.

    Returns:
        Approximate solutions of the shape of b, converged or not. A sample's solution does not
        depend on the others.
    """
    return _iterate(operator, b, iterations, tolerance**2 * _dot(b, b), least)


def solve(
    operator: Operator,
    b: Tensor,
    *,
    tolerance: float = 1e-5,
    stalled: float = 1e-3,
    iterations: int = 500,
) -> Tensor:
    """Solve systems by conjugate gradients, or fail.

    The residual b - G v is computed afresh after the iterations have stopped, since rounding lets
    the one that they update drift away from it; samples that still miss the tolerance go on from
    where they are. Where an operator rounds to float32, G v is known to about 1e-7 |G| |v| only,
    which can be more than the tolerance: a residual that no longer falls is let pass up to
    `stalled`.

    Arguments:
        operator: Applies the matrices G to vectors of the shape of b.
        b: Right-hand sides of shape (n, ...).
        tolerance: Wanted |b - G v| of a sample, as a fraction of |b|.
        stalled: Largest |b - G v| that is let pass, as a fraction of |b|.
        iterations: Largest number of iterations between two computations of the residual.

    Returns:
        Solutions v of the shape of b.

    Raises:
        FloatingPointError: A sample's residual is more than `stalled`.
    """
    square = _dot(b, b)
    limit = tolerance**2 * square
    v, r = torch.zeros_like(b), b
    for _ in range(_PASSES):
        v = v + _iterate(operator, r, iterations, limit / 4)
        r = b - operator(v)
        missed = _dot(r, r) > limit
        if not missed.any():
            return v
        r = torch.where(missed, r, 0.0)
    worst = float((_dot(r, r) / square.clamp_min(1e-300)).max().sqrt())
    if worst <= stalled:
        return v
    raise FloatingPointError(
        f"conjugate gradients left a residual of {worst:.1e} of the right-hand side after "
        f"{_PASSES} times {iterations} iterations, where {stalled:.1e} is the largest allowed: "
        "the system is too ill-conditioned; use a channel with more noise, or a prior with a "
        "larger diagonal"
    )


def _iterate(
    operator: Operator, b: Tensor, iterations: int, limit: Tensor, least: float = 0.0
) -> Tensor:
    """Iterate from 0 until the squared residual of every sample is at most its limit."""
    v = torch.zeros_like(b)
    r = b
    p = r
    square = _dot(r, r)
    for _ in range(iterations):
        active = square > limit
        if not active.any():
            break
        image = operator(p)
        curvature = _dot(p, image)
        sound = (curvature > 0) & (curvature >= least * _dot(p, p))
        alpha = torch.where(active & sound, square / curvature, 0.0)
        v = v + alpha * p
        r = r - alpha * image
        new_square = _dot(r, r)
        p = torch.where(active, r + new_square / square.clamp_min(1e-38) * p, p)
        square = torch.where(active, new_square, square)
    return v


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))
